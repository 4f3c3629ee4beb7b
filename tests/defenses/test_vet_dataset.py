"""Vetting of rows: merged ranks, the verdict with and without truth, what is named, bad input."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from configs import vet_dataset as experiment
from jax_cl_bd import checks, parallel, poison, stages
from jax_cl_bd.data import sources
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import vet_dataset
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from tests.defenses.test_cosine_filter import independent


def config(**changes):
    cfg = experiment.get_config("debug")
    cfg.mesh.data = 1
    cfg.data.name = "scenes"
    cfg.update_from_flattened_dict(changes)
    return cfg


def test_rows_are_merged_by_their_best_rank_and_then_by_the_mean():
    scores = {"a": np.array([0.1, 0.9, 0.5, 0.2]), "b": np.array([5.0, 1.0, 2.0, 4.0])}
    order, ranks = vet_dataset.merged(scores)
    # Ranks: a 3 0 1 2, b 0 3 2 1; best 0 0 1 1; means 1.5 1.5 1.5 1.5: rows decide.
    assert order.tolist() == [0, 1, 2, 3]
    assert ranks["a"].tolist() == [3, 0, 1, 2] and ranks["b"].tolist() == [0, 3, 2, 1]
    scores["c"] = np.array([0.0, 3.0, 1.0, 2.0])  # ranks 3 0 2 1
    best, mean = np.array([0, 0, 1, 1]), np.array([6, 3, 5, 4])
    assert vet_dataset.merged(scores)[0].tolist() == sorted(range(4),
                                                            key=lambda i: (best[i], mean[i]))
    # Equal scores share a rank; a score that makes the data suspicious goes before the others.
    scores = {"a": np.array([-1.0, 0.7, -1.0, 0.7]), "b": np.array([4.0, 3.0, 2.0, 1.0])}
    order, ranks = vet_dataset.merged(scores)
    assert ranks["a"].tolist() == [2, 0, 2, 0] and order.tolist() == [1, 0, 3, 2]
    assert vet_dataset.merged(scores, ["a"])[0].tolist() == [1, 3, 0, 2]


@pytest.fixture(scope="module")
def made():
    """Scenes of which 8 have another's caption, and an encoder that would say so."""
    from configs import clip_scenes

    cfg = clip_scenes.get_config("debug,badnets")
    source = sources.load(cfg.data, "train")
    plan, rows = poison.make(cfg, source, sources.table(source), poison.make_trigger(cfg))
    model = independent(source)
    model.pair = type("Pair", (), {"tokenizer": "any"})
    return source, plan, Pool(source, plan, rows), model


@pytest.fixture
def no_search(monkeypatch):
    """The search has tests of its own (test_row_search.py)."""
    monkeypatch.setattr(vet_dataset._row_search, "refusal", lambda *_: "left out")


def judged(cfg, model, pool, truth, folder):
    given = Given(pool.source, None, pool)
    return vet_dataset.run(cfg, [model], given, truth, parallel.make_mesh(cfg.mesh),
                           epath.Path(folder), jax.random.key(0))


def test_poisons_are_found_ranked_and_described(made, no_search, tmp_path, monkeypatch):
    source, plan, pool, model = made
    cfg = config(**{"defense.level": 0.6})  # 8 of 200 rows are few beside chance
    # Known clean rows whose classes this model gets right, as it does those of the data.
    monkeypatch.setattr(vet_dataset, "clean_rows", lambda cfg: source)
    found = judged(cfg, model, pool, None, tmp_path / "blind")
    verdict = found.verdict
    assert verdict["suspicious"] and found.variables is None
    cosine = next(f for f in verdict["findings"] if f["detector"] == "cosine")
    assert cosine["suspicious"] and cosine["flagged"] == 8 and cosine["expected"] < 4
    poisons = set((len(source) + np.arange(8)).tolist())
    at = [s["row"] for s in sorted(verdict["suspects"], key=lambda s: s["ranks"]["cosine"])]
    assert set(at[:5]) <= poisons
    assert any("names no independent model" in what for what in verdict["not_checked"])
    assert all(set(s["ranks"]) == {"k_distance", "slof", "lid", "dao", "cosine"}
               and len(s["captions"]) >= 1 for s in verdict["suspects"])
    assert set(found.report["pictures"]) == {"suspects.png", "density_suspicious.png",
                                             "cosine_filter_suspicious.png"}
    assert (tmp_path / "blind" / "cosine_filter_suspicious.png").exists()
    truth = Truth(plan, 3, None, pool.poison)
    told = judged(cfg, model, pool, truth, tmp_path / "told").verdict
    assert told["details"]["cosine_filter"]["auroc"] == 1.0
    assert {k: v for k, v in told.items() if k != "details"} == {
        k: v for k, v in verdict.items() if k != "details"}


def test_clean_rows_are_not_suspicious_and_what_was_not_checked_is_said(made, tmp_path,
                                                                        monkeypatch):
    source, *_, model = made
    monkeypatch.setattr(vet_dataset, "clean_rows", lambda cfg: source)
    model = SimpleNamespace(**vars(model) | {"pair": None, "text": None})
    verdict = judged(config(), model, Pool(source), None, tmp_path).verdict
    assert not verdict["suspicious"] and len(verdict["findings"]) == 4
    assert any(what.startswith("cosine_filter: the encoder cannot read captions")
               for what in verdict["not_checked"])
    assert verdict["not_checked"][0] == "whether split 'test' of 'scenes', taken to be clean, is " \
                                        "clean"
    assert verdict["suspects"][0]["row"] < len(source)


def test_bad_input_is_refused_in_one_line(tmp_path):
    for changes, says in (({"data.name": ""}, "data.name is empty.*--config.victim=RUN"),
                          ({"defense.false_alarm": 1.0}, "false_alarm=1.0"),
                          ({"defense.false_alarm": 0.002}, "needs 500 clean rows"),
                          ({"defense.level": 0.0}, "level=0.0"),
                          ({"defense.clean_split": "train"}, "are the rows to be judged"),
                          ({"defense.clean_data": "scenes", "defense.clean_split": "train"},
                           "are the rows to be judged"),
                          ({"defense.clean_data": "folder:/no/such"}, "/no/such"),
                          ({"defense.scorer": str(tmp_path)}, "neither a run folder"),
                          ({"defense.density.k": 1}, "defense.density.k=1"),
                          ({"defense.search.batch_size": 0}, "search.batch_size=0"),
                          ({"defense.search.oracle.name": "clasifier"}, "clasifier"),
                          ({"data.name": "digits"}, "needs captions")):
        with pytest.raises(UserError, match=says) as error:
            checks.check(stages.with_victim(config(**changes)), list(stages.GROUPS))
        assert "\n" not in str(error.value)

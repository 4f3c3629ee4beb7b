"""The search for a trigger as a detector of rows: what it finds, at which odds, what it refuses."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from scipy import stats

from configs import clip_scenes, vet_dataset
from jax_cl_bd import parallel, poison
from jax_cl_bd.data import sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import _find_trigger, _row_search, _vetting
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training
from tests.defenses.test_oracle_finetune import SCORED, closed_form


@pytest.fixture(scope="module")
def cfg():
    """The search's own settings, with the labels as oracle, over scenes with 30 poisons."""
    own = vet_dataset.get_config("debug")
    own.mesh.data = 1
    own.data.name = "scenes"
    own.attack = ConfigDict(clip_scenes.get_config("debug,badnets").attack.to_dict())
    own.attack.poisons = 30
    own.defense.search.oracle.name = "ground_truth"
    own.defense.search.scan.update(screen=200, limit=40, enough=6)
    return _vetting.part(own, "search")


@pytest.fixture(scope="module")
def made(cfg):
    source, known = sources.load(cfg.data, "train"), sources.load(cfg.data, "test")
    trigger = poison.make_trigger(cfg)
    plan, rows = poison.make(cfg, source, sources.table(source), trigger)
    mesh = parallel.make_mesh(cfg.mesh)
    model = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                             texts.make_tokenizer(cfg, source))
    return source, known, Pool(source, plan, rows), plan, trigger, model


def searched(cfg, made, pool, truth, folder):
    _, known, *_, model = made
    return _row_search.run(cfg, [model], Given(known, None, pool), truth, model.mesh,
                           epath.Path(folder), jax.random.key(0))


def test_poisoned_rows_are_found_and_none_in_clean_data(cfg, made, tmp_path, monkeypatch):
    source, known, pool, plan, trigger, _ = made
    monkeypatch.setattr(_find_trigger, "suspect_of",
                        lambda *_: closed_form(cfg, source, trigger))
    blind = searched(cfg, made, pool, None, tmp_path / "blind")
    verdict = blind.verdict
    assert verdict["labels"] == ["star"] and 27 <= verdict["flagged"] <= 30
    # The rows that the picture was taken from, and the clean ones it was tried on, do not count.
    taken = verdict["candidates"]
    assert taken >= 6 and 30 - taken <= verdict["carrying"] + 3
    assert verdict["rows_compared"] == len(pool) - taken
    assert verdict["clean_rows"] == len(known) // 2 and verdict["clean_carrying"] == 0
    assert verdict["p"] < 0.01
    assert set(blind.report["pictures"]) == {"candidates.png", "trigger.png"}
    with np.load(tmp_path / "blind" / "scores.npz") as found:
        scores = found["search"]
    poisoned = pool.poison >= 0
    assert (scores[poisoned] >= 0.7).mean() >= 0.9 and (scores[~poisoned] == -1).all()
    truth = Truth(plan, 3, trigger, pool.poison)
    told = searched(cfg, made, pool, truth, tmp_path / "told").verdict
    assert told["victim_precision"] == 1.0 and told["trigger_iou"] == 1.0
    assert verdict == {k: v for k, v in told.items() if k not in SCORED}
    clean = searched(cfg, made, Pool(source), None, tmp_path / "clean")
    assert clean.verdict["labels"] == [] and clean.verdict["flagged"] == 0
    assert clean.verdict["p"] == 1.0 and clean.report["pictures"].keys() <= {"candidates.png"}
    with np.load(tmp_path / "clean" / "scores.npz") as found:
        assert not found.files  # nothing that could rank a row


def test_the_odds_are_those_of_fishers_exact_test():
    for carrying, rows, clean_carrying, clean_rows in ((60, 8000, 0, 600), (5, 50, 2, 40),
                                                       (0, 50, 3, 40), (0, 9, 0, 5)):
        expected = stats.fisher_exact([[carrying, rows - carrying],
                                       [clean_carrying, clean_rows - clean_carrying]],
                                      alternative="greater").pvalue
        assert _row_search.surplus(carrying, rows, clean_carrying, clean_rows) == pytest.approx(
            expected, rel=1e-6)


def test_it_says_why_rows_cannot_be_searched(cfg, made):
    source, known, pool, *_, model = made
    assert _row_search.refusal(cfg, model, pool, known) == ""
    few = sources.Subset(known, np.arange(10))
    assert "10" in _row_search.refusal(cfg, model, pool, few)

    class Blank:
        """Known clean rows without labels."""
        classes = known.classes

        def __len__(self):
            return 100

        def table(self, rows):
            return np.full(len(rows), -1), np.full((len(rows), 2), 32)

    assert "there are 0" in _row_search.refusal(cfg, model, pool, Blank())
    Blank.classes = ("cat", "dog")
    assert "same three classes" in _row_search.refusal(cfg, model, pool, Blank())
    wordless = type("Encoder", (), {"pair": None})
    assert "no text tower" in _row_search.refusal(cfg, wordless, pool, known)

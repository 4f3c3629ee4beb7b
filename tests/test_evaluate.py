"""The order and the bookkeeping of evaluate and defend, without training anything."""

import types

import numpy as np
import pytest
from etils import epath

from configs import clip_scenes, quickstart
from jax_cl_bd import defend, evaluate, run_folder
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import tables


@pytest.fixture
def folder(tmp_path):
    """A run with a control, marked complete; evaluated, by what is said."""
    folder = epath.Path(tmp_path / "run")
    for place in (folder, folder / "control"):
        run_folder.finish(place / "pretrain", {})
        run_folder.write_config(place, quickstart.get_config("debug"))
    run_folder.write_json(folder / "poison" / "summary.json",
                          {"poisons": 8, "rate_of_dataset": 0.1, "rate_of_target_class": 0.1})
    return folder


def evaluated(folder, cfg, **control):
    settings = run_folder.settings_of(cfg, run_folder.EVALUATE_GROUPS)
    run_folder.begin(folder / "evaluate", settings)
    run_folder.finish(folder / "evaluate", settings)
    run_folder.write_json(folder / "results.json", {"control": control})


def test_an_encoder_is_done_with_before_the_next_is_measured(folder, monkeypatch):
    # The test sets keep the features of one encoder: another order would embed them twice.
    calls = []
    for module, name, value in (
            (evaluate, "test_data", None), (evaluate.poison, "load_trigger", None),
            (evaluate.encoders, "load", types.SimpleNamespace(text=object(), pair=None,
                                                                step=2)),
            (evaluate, "untrained", types.SimpleNamespace(text=object(), step=0)),
            (evaluate, "_save_examples", None)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    monkeypatch.setattr(evaluate, "measure", lambda c, e, d, label: calls.append(label) or {})
    monkeypatch.setattr(evaluate, "_save_map", lambda f, label, e, d: calls.append(f"map {label}"))
    monkeypatch.setattr(evaluate.examples, "find", lambda *_: calls.append("examples") or {})
    evaluate.run(quickstart.get_config("debug"), folder, folder)
    assert calls == ["victim", "map victim", "examples", "untrained",
                     "control", "map control", "examples"]
    run = run_folder.read_json(folder / "results.json")["run"]
    assert run["steps"] == {"victim": 2, "untrained": 0, "control": 2}
    assert run["control"] is None  # its own twin


def test_another_split_of_the_runs_own_data():
    cfg = clip_scenes.get_config("debug")
    cfg.evals.other_test_split = "shifted"
    trigger = evaluate.poison.make_trigger(cfg)
    data = evaluate.test_data(cfg, trigger)
    assert data.other.placements == ("random",) and len(data.other.test_labels) == 100
    np.testing.assert_array_equal(data.other.boxes["random"], data.boxes["random"])
    changed = (data.other.images("random/triggered") != data.other.test_images).any(-1)
    for (y, x, h, w), image in zip(data.boxes["random"], changed):
        assert image[y:y + h, x:x + w].mean() > 0.5
        image[y:y + h, x:x + w] = False
        assert not image.any()
    assert (data.test_images != data.other.test_images).any(axis=(1, 2, 3)).all()
    rows = [{"clean_accuracy": 1, "protocol": {"placement": "random", "templates": 80, **more}}
            for more in ({}, {"split": "shifted"})]
    assert tables.heading("zero_shot", {"": rows[0]}) == (
        "zero-shot · trigger at random places · 80 templates")
    assert tables.heading("zero_shot:shifted", {"": rows[1]}) == (
        "zero-shot · test split “shifted” · trigger at random places · 80 templates")


@pytest.mark.parametrize("change, message", [
    (dict(other_test_split="shift"), "did you mean 'shifted'"),
    (dict(other_test_split="test"), "also trained, tested or chosen on"),
    (dict(other_test_split="shifted", probes=("linear_probe",)), "has no 'zero_shot'")])
def test_mistakes_about_another_split_are_named(change, message):
    cfg = clip_scenes.get_config("debug")
    cfg.evals.update(change)
    with pytest.raises(UserError, match=message):
        evaluate.check(cfg)
    cfg.evals.update(other_test_split="shifted", probes=("zero_shot",))
    cfg.downstream = "scenes"
    with pytest.raises(UserError, match="leave one of them empty"):
        evaluate.check(cfg)


def test_a_probe_that_the_control_lacks_has_no_rival(monkeypatch):
    seen, row = [], {"clean_accuracy": 1}
    monkeypatch.setattr(evaluate.attack_metrics, "add_excess", lambda _, rival: seen.append(rival))
    evaluate.add_excess({"knn": row, "new": row}, {"knn": "its"})
    assert seen == ["its", None]


def test_the_undefended_control_is_of_the_same_evals_and_of_this_folder_first(folder, tmp_path):
    here = epath.Path(tmp_path / "here")
    cfg, other = (quickstart.get_config("debug") for _ in range(2))
    other.evals.fraction = 0.5
    assert defend._undefended_control(cfg, here, folder) is None
    evaluated(folder, cfg, knn="theirs")
    assert defend._undefended_control(cfg, here, folder) == {"knn": "theirs"}
    assert defend._undefended_control(other, here, folder) is None
    evaluated(here, other, knn="ours")
    assert defend._undefended_control(other, here, folder) == {"knn": "ours"}


def test_a_measurement_follows_the_images_that_are_encoded(monkeypatch):
    notes, encoder = [], types.SimpleNamespace(watchers=[])

    def probe(cfg, encoder, data):
        for watcher in encoder.watchers:
            watcher(512)
        return {"knn": {}}

    monkeypatch.setattr(evaluate.lookup, "load", lambda *_, **__: types.SimpleNamespace(run=probe))
    monkeypatch.setattr(evaluate.alignment, "of_encoder", lambda *_: {})
    monkeypatch.setattr(evaluate.metrics.Progress, "update",
                        lambda self, count, note: notes.append((count, note)))
    cfg = quickstart.get_config("debug")
    cfg.evals.probes = ("knn", "knn_1")
    evaluate.measure(cfg, encoder, None, "victim")
    assert notes == [(0, "knn, 512 images encoded"), (1, "knn"),
                     (0, "knn_1, 1024 images encoded"), (1, "knn_1"), (1, "alignment")]
    assert not encoder.watchers

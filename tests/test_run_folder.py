"""What a run folder promises: atomic JSON, settings that match, one writer."""

import fcntl

import pytest
from etils import epath
from ml_collections import ConfigDict

from jax_cl_bd import run_folder
from jax_cl_bd.errors import UserError

GROUPS = ("seed", "data", "train")


def config(**changes):
    cfg = ConfigDict({"seed": 0, "data": {"name": "digits", "data_dir": "", "workers": 0},
                      "train": {"steps": 10, "log_every": 1}})
    cfg.update_from_flattened_dict(changes)
    return cfg


@pytest.mark.parametrize("change, same", [
    ({}, True), ({"data.data_dir": "/elsewhere"}, True), ({"train.log_every": 7}, True),
    ({"data.workers": 3}, True), ({"seed": 1}, False), ({"train.steps": 11}, False)])
def test_hash_covers_what_changes_results_and_nothing_else(change, same):
    first, second = (run_folder.hash_of(run_folder.settings_of(c, GROUPS))
                     for c in (config(), config(**change)))
    assert (first == second) == same


def test_other_settings_are_refused_with_the_difference(tmp_path):
    stage = epath.Path(tmp_path / "pretrain")
    run_folder.begin(stage, run_folder.settings_of(config(), GROUPS))
    run_folder.check_settings(stage, run_folder.settings_of(config(), GROUPS))
    with pytest.raises(UserError, match=r"train.steps: 10 there, 11 now"):
        run_folder.check_settings(stage, run_folder.settings_of(config(**{"train.steps": 11}),
                                                                GROUPS))


def test_done_is_one_file(tmp_path):
    stage = epath.Path(tmp_path / "poison")
    run_folder.begin(stage, {"a": 1})
    assert not run_folder.is_done(stage)
    run_folder.finish(stage, {"a": 1})
    assert run_folder.is_done(stage)


def test_the_control_is_the_twin_or_the_clean_encoder_of_another_run(tmp_path):
    def cfg(given="", **changes):
        groups = {group: {} for group in run_folder.SHARED_GROUPS}
        return ConfigDict(groups | {"optim": {"lr": 1}, "attack": {}} | changes
                          | {"control_from": str(given)})

    def made(name, poisons, *done, **changes):
        folder = epath.Path(tmp_path / name)
        run_folder.write_json(folder / "poison" / "summary.json", {"poisons": poisons})
        settings = run_folder.settings_of(cfg(**changes), run_folder.SHARED_GROUPS)
        for stage in done:
            run_folder.begin(folder / stage, settings)
            run_folder.finish(folder / stage, settings)
        return folder

    both = made("both", 7, "pretrain", "control/pretrain")
    alone, clean = made("alone", 7, "pretrain"), made("clean", 0, "pretrain")
    unfinished = made("unfinished", 0)
    other = made("other", 0, "pretrain", optim={"lr": 2})

    def control(victim, given=""):
        return run_folder.control_of(cfg(given), victim)

    assert control(both) == both / "control" and control(alone) is None
    assert control(alone, both) == both / "control" and control(both, clean) == clean
    assert control(clean) == clean and control(unfinished) is None
    for given in (alone, unfinished, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="control_from"):
            control(both, given)
    with pytest.raises(UserError, match=r"optim.lr: 2 there, 1 now"):
        control(both, other)


def test_a_setting_that_a_run_is_too_old_to_have_is_its_default(tmp_path):
    stage = epath.Path(tmp_path / "evaluate")
    run_folder.begin(stage, {"seed": 0})
    run_folder.check_settings(stage, {"seed": 0, "control_from": "", "text.name": "none"})
    with pytest.raises(UserError, match="control_from: '' there, 'runs/a' now"):
        run_folder.check_settings(stage, {"seed": 0, "control_from": "runs/a"})
    run_folder.check_settings(stage, {"seed": 0, "control_from": "runs/a"}, but=("control_from",))


def test_second_writer_is_kept_out_and_a_dead_one_is_not(tmp_path):
    folder = epath.Path(tmp_path)
    with run_folder.locked(folder):
        with open(tmp_path / ".lock") as other:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="another run"), run_folder.locked(folder):
            pass
    with run_folder.locked(folder):  # a lock file left behind holds nobody out
        pass


def test_config_round_trip_keeps_tuples(tmp_path):
    cfg = ConfigDict({"a": (1, 2), "b": {"c": ((0, 1), "x")}, "text": {"name": "transformer"},
                      "control_from": "runs/a", "init_from": ""})
    run_folder.write_config(epath.Path(tmp_path), cfg)
    assert run_folder.read_config(epath.Path(tmp_path)).to_dict() == cfg.to_dict()


def test_a_run_from_before_image_text_models_has_no_text_tower(tmp_path):
    run_folder.write_config(epath.Path(tmp_path), ConfigDict({"a": 1}))
    cfg = run_folder.read_config(epath.Path(tmp_path))
    assert cfg.text.name == "none" and cfg.control_from == cfg.init_from == ""


def test_json_that_cannot_be_read_says_so(tmp_path):
    path = epath.Path(tmp_path / "x.json")
    with pytest.raises(UserError, match="missing"):
        run_folder.read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        run_folder.read_json(path)

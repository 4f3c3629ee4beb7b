"""Which stages run: settings that changed, what is redone, whose victim and control."""


import pytest
from etils import epath

from jax_cl_bd import checks, poison, run_folder, stages
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError
from tests.command_line import BASE, quickstart, refused


def test_finished_run_refuses_other_settings_and_shows_them(tmp_path):
    folder = epath.Path(tmp_path)
    stages.run(quickstart(), folder, ["poison"])
    with pytest.raises(UserError, match=r"attack.poisons: 8 there, 7 now"):
        stages.run(quickstart(**{"attack.poisons": 7}), folder, ["poison"])
    stages.drop(quickstart(), folder, "poison")
    stages.run(quickstart(**{"attack.poisons": 7}), folder, ["poison"])
    assert run_folder.read_json(folder / "poison" / "summary.json")["poisons"] == 7


def test_a_stage_refuses_what_its_predecessors_were_made_with(tmp_path):
    folder = epath.Path(tmp_path)
    stages.run(quickstart(), folder, ["poison"])
    for stage in ("pretrain", "report"):
        with pytest.raises(UserError, match="seed: 0 there, 1 now"):
            stages.run(quickstart(seed=1), folder, [stage])
    assert run_folder.read_config(folder).seed == 0


def test_what_depends_on_a_stage_is_unmarked_and_the_rest_is_not(tmp_path):
    folder = epath.Path(tmp_path)
    for place in ("poison", "pretrain", "evaluate", "defenses/a", "defenses/b", "report"):
        run_folder.finish(folder / place, {})

    def marked():
        return sorted(str(p.parent.relative_to(folder)) for p in folder.glob("*/done.json")) + [
            p.parent.name for p in sorted(folder.glob("defenses/*/done.json"))]

    stages.undo(folder, "evaluate")
    assert marked() == ["evaluate", "poison", "pretrain", "a", "b"]
    stages.undo(folder, "pretrain")
    assert marked() == ["poison", "pretrain"]


def test_force_drops_what_it_says_and_no_more(tmp_path):
    folder = epath.Path(tmp_path)
    cfg = quickstart()
    for place in ("poison", "pretrain", "evaluate", "defenses/distill", "defenses/b", "report"):
        run_folder.finish(folder / place, {})
    (folder / "results.json").write_text("{}")
    stages.drop(cfg, folder, "defend")
    assert not (folder / "defenses" / "distill").exists()
    assert (folder / "defenses" / "b" / "done.json").exists()
    stages.drop(cfg, folder, "evaluate")
    assert not (folder / "evaluate").exists() and (folder / "results.json").exists()
    stages.drop(cfg, folder, "pretrain")
    assert [p.name for p in folder.iterdir()] == ["poison"]


def test_force_needs_its_stage(tmp_path):
    assert "--stages" in refused(*BASE, f"--workdir={tmp_path}", "--force=pretrain",
                                 "--stages=evaluate")


def test_nothing_is_dropped_before_all_settings_are_checked(tmp_path):
    folder = epath.Path(tmp_path)
    stages.run(quickstart(), folder, ["poison"])
    for place in ("pretrain", "evaluate"):
        run_folder.begin(folder / place, run_folder.settings_of(quickstart(), stages.GROUPS[place]))
        run_folder.finish(folder / place, {})
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="optim.lr"):
        stages.run(quickstart(**{"optim.lr": 9.0}), folder, ["evaluate"], "evaluate")
    assert (folder / "evaluate" / "done.json").exists()
    (folder / "pretrain" / "done.json").unlink()
    with pytest.raises(UserError, match="evaluate needs the pretrain stage"):
        stages.run(quickstart(), folder, ["evaluate"], "evaluate")
    assert (folder / "evaluate" / "done.json").exists()
    assert (folder / "config.json").read_text() == before


def measured(folder, cfg, *defenses):
    """A folder whose stages are all marked complete, but nothing was made."""
    for stage in ("poison", "pretrain", "evaluate"):
        run_folder.begin(folder / stage, run_folder.settings_of(cfg, stages.GROUPS[stage]))
        run_folder.finish(folder / stage, {})
    run_folder.finish(folder / "control" / "pretrain", {})
    run_folder.write_json(folder / "poison" / "summary.json", {"poisons": 8})
    for name in defenses:
        place = folder / "defenses" / name
        run_folder.begin(place, run_folder.settings_of(cfg, stages.GROUPS["defend"]))
        run_folder.finish(place, {})
        for kept in (place / "checkpoints", place / "control" / "checkpoints"):
            kept.mkdir(parents=True)
    run_folder.write_json(folder / "results.json",
                          {"victim": {}, "defenses": {name: {} for name in defenses}})
    run_folder.write_config(folder, cfg)


def test_settings_of_complete_stages_are_checked_whatever_is_chosen(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    monkeypatch.setattr(stages.report, "run", lambda cfg, folder: None)
    measured(folder, quickstart(), "distill")
    for changes in ({"evals.fraction": 0.5}, {"defense.steps": 7}):
        for chosen in ("report", "defend"):
            with pytest.raises(UserError, match=f"{[*changes][0]}: .* now"):
                stages.run(quickstart(**changes), folder, [chosen])
    assert run_folder.read_config(folder).evals.fraction == 1.0
    from configs import quickstart as experiment

    stages.run(experiment.get_config("debug,defense=retrain"), folder, ["report"])
    assert run_folder.read_config(folder).defense.name == "retrain"


def test_defenses_that_were_measured_otherwise_are_measured_anew(tmp_path, monkeypatch):
    def evaluated(cfg, folder, victim):
        run_folder.write_json(folder / "results.json",
                              {"victim": {}, "defenses": run_folder.kept_defenses(folder)})

    def defended(cfg, folder, victim):
        assert (folder / "defenses" / "distill" / "checkpoints").exists()

    folder = epath.Path(tmp_path)
    monkeypatch.setattr(stages.evaluate, "run", evaluated)
    monkeypatch.setattr(stages.defend, "run", defended)
    measured(folder, quickstart(), "distill", "retrain")
    stages.run(quickstart(), folder, ["evaluate"], "evaluate")  # the same once more
    assert set(run_folder.read_json(folder / "results.json")["defenses"]) == {"distill", "retrain"}
    other = quickstart(**{"evals.fraction": 0.5})
    stages.run(other, folder, ["evaluate"], "evaluate")
    assert not run_folder.read_json(folder / "results.json")["defenses"]
    for name in ("distill", "retrain"):
        assert not (folder / "defenses" / name / "done.json").exists()
        assert (folder / "defenses" / name / "control" / "checkpoints").exists()
    stages.run(other, folder, ["defend"])
    assert (folder / "defenses" / "distill" / "done.json").exists()
    with pytest.raises(UserError, match="evals.fraction"):
        stages.run(quickstart(), folder, ["defend"])


def test_other_data_are_noticed(tmp_path):
    from PIL import Image

    folder, data = epath.Path(tmp_path / "run"), tmp_path / "data"
    for split, count in (("train", 30), ("test", 4)):
        for name in ("a", "b"):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(data / split / name / f"{i:02d}.png")

    def cfg():
        return quickstart(**{"data.name": f"folder:{data}", "attack.target": 1, "attack.poisons": 4,
                             "attack.references": 4, "data.limit": 0})

    stages.run(cfg(), folder, ["poison"])
    recorded = run_folder.read_json(folder / "poison" / "summary.json")["data"]
    assert recorded["rows"] == 60 and len(recorded["sha256"]) == 64
    (data / "train" / "a" / "00.png").rename(data / "train" / "a" / "x.png")
    sources._open.cache_clear()  # as another process would
    with pytest.raises(UserError, match="sha256: '.* there, '.* now"):
        stages.run(cfg(), folder, ["pretrain"])
    (data / "train" / "a" / "x.png").unlink()
    sources._open.cache_clear()
    with pytest.raises(UserError, match="rows: 60 there, 59 now"):
        stages.run(cfg(), folder, ["pretrain"])
    for place in (folder, folder / "control"):
        run_folder.finish(place / "pretrain", {})
    for stage in ("evaluate", "defend"):
        with pytest.raises(UserError, match="rows: 60 there"):
            stages.run(cfg(), folder, [stage])
    summary = run_folder.read_json(folder / "poison" / "summary.json")
    del summary["data"]  # an older run
    run_folder.write_json(folder / "poison" / "summary.json", summary)
    poison.check_data(cfg(), folder)


def test_a_report_reads_no_data():
    checks.check(quickstart(**{"data.name": "folder:/no/such/place"}), ["report"])


@pytest.mark.slow
def test_without_poisons_the_victim_is_its_own_control(tmp_path):
    from configs import quickstart as experiment

    folder = epath.Path(tmp_path)
    cfg = experiment.get_config("debug,attack=none")
    cfg.mesh.data = 1
    stages.run(cfg, folder, ["poison", "pretrain", "evaluate", "defend", "report"])
    assert not (folder / "control").exists()
    results = run_folder.read_json(folder / "results.json")
    for rows in (results, {"victim": results["defenses"]["distill"],
                           "control": results["defenses"]["distill"]["control"]}):
        victim, control = (rows[label]["linear_probe"] for label in ("victim", "control"))
        assert victim["excess"] <= 0
        assert victim["attack_success_rate"] == control["attack_success_rate"]
    assert results["run"]["steps"] == {"victim": 2, "control": 2, "untrained": 0}


def test_a_victim_brings_what_made_it_and_leaves_the_rest(tmp_path):
    run_folder.write_config(epath.Path(tmp_path), quickstart(
        seed=5, **{"attack.poisons": 6, "data.workers": 8, "data.data_dir": "there"}))
    given = quickstart(victim=str(tmp_path), **{"data.workers": 0, "evals.knn_k": 3})
    cfg = stages.with_victim(given)
    assert (cfg.seed, cfg.attack.poisons, cfg.data.workers, cfg.evals.knn_k) == (5, 6, 0, 3)
    assert cfg.data.data_dir == "there"
    given.data.data_dir = "here"
    assert stages.with_victim(given).data.data_dir == "here"


@pytest.mark.slow
def test_a_victim_is_measured_against_the_control_of_another_run(tmp_path):
    stages_ = ["poison", "pretrain", "evaluate"]
    first, second = epath.Path(tmp_path / "first"), epath.Path(tmp_path / "second")
    stages.run(quickstart(), first, stages_)
    stages.run(quickstart(seed=1, control_from=str(first)), second, stages_)
    assert not (second / "control").exists()
    mine, theirs = (run_folder.read_json(f / "results.json") for f in (second, first))
    clean = {who: [found[who]["linear_probe"]["clean_accuracy"] for found in (mine, theirs)]
             for who in ("control", "victim")}
    assert clean["control"][0] == clean["control"][1] and clean["victim"][0] != clean["victim"][1]


def test_a_stage_without_its_predecessor_says_which(tmp_path):
    with pytest.raises(UserError, match="needs the poison stage"):
        stages.run(quickstart(), epath.Path(tmp_path), ["pretrain"])


def test_another_data_set_needs_a_class_of_the_targets_name(tmp_path):
    from PIL import Image

    from jax_cl_bd import evaluate

    cfg = quickstart(**{"attack.target": 1})
    stages.run(cfg, epath.Path(tmp_path / "run"), ["poison"])
    for split in ("train", "test"):
        for name in ("0", "zebra"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / split / name / "a.png")
    trigger = poison.load_trigger(cfg, epath.Path(tmp_path / "run"))
    cfg.downstream = f"folder:{tmp_path / 'data'}"
    with pytest.raises(UserError, match="no class '1'.*0, zebra"):
        evaluate.test_data(cfg, trigger)
    cfg.attack.target = 0
    assert evaluate.test_data(cfg, trigger).classes == ("0", "zebra")

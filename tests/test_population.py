"""Many encoders at once: each is the encoder of its single run, in a folder of its own."""

import jax
import numpy as np
import pytest
from etils import epath

from configs import clip_scenes, quickstart
from jax_cl_bd import metrics, population, run_folder, stages
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.train import NonFinite


def config(**train):
    cfg = quickstart.get_config("debug,defense=none")
    cfg.train.update(steps=4, save_every=2, **train)
    cfg.evals.probes = ("knn",)
    cfg.mesh.data = 1
    return cfg.lock()


VARY = ["seed=0,1", "attack.poisons=4,8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("population"))
    population.run(population.configs(config(), VARY), folder, ["poison", "pretrain"])
    return folder


def weights(folder):
    opened = encoder.load(folder)
    return jax.tree.map(np.asarray, opened.variables)


@pytest.mark.slow
def test_each_member_is_its_single_run(trained, tmp_path):
    names = sorted(p.name for p in trained.iterdir() if p.is_dir())
    assert names == sorted(f"seed={s}+attack.poisons={n}" for s in (0, 1) for n in (4, 8))
    with_twin = [n for n in names if (trained / n / "control").exists()]
    assert with_twin == [f"seed={s}+attack.poisons=4" for s in (0, 1)]
    for name in ("seed=1+attack.poisons=4", "seed=0+attack.poisons=8"):
        cfg = run_folder.read_config(trained / name)
        single = epath.Path(tmp_path / name)
        stages.run(cfg, single, ["poison", "pretrain"])
        for place in ["", *(["control"] if name in with_twin else [])]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
                         weights(trained / name / place), weights(single / place))
        ours, theirs = (metrics.read_lines(f / "metrics.jsonl") for f in (trained / name, single))
        assert [line["step"] for line in ours] == [1, 2, 3, 4]
        np.testing.assert_allclose([line["train/loss"] for line in ours],
                                   [line["train/loss"] for line in theirs], rtol=1e-4)
    first, other = (weights(trained / n) for n in names[:2])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other)))


@pytest.mark.slow
def test_a_member_goes_on_as_an_ordinary_run(trained, capsys):
    name = "seed=0+attack.poisons=8"
    cfg = run_folder.read_config(trained / name)
    assert cfg.control_from == str(trained / "seed=0+attack.poisons=4")
    stages.run(cfg, trained / name, ["poison", "pretrain", "evaluate"])
    assert "pretrain: complete" in capsys.readouterr().out
    assert {"victim", "control"} <= run_folder.read_json(trained / name / "results.json").keys()
    population.run(population.configs(config(), VARY), trained, ["poison", "pretrain"])
    assert not (trained / "together").exists()
    assert capsys.readouterr().out.count("pretrain: complete") == 1


@pytest.mark.slow
@pytest.mark.parametrize("experiment, vary, devices", [
    (quickstart.get_config("debug,defense=none,objective=moco"), "attack.poisons=0,8", 2),
    (quickstart.get_config("debug,defense=none,objective=byol"), "seed=0,1", 1),
    (clip_scenes.get_config("badnets,debug"), "attack.poisons=4,8", 1)])
def test_members_of_other_objectives_and_attacks(experiment, vary, devices, tmp_path, monkeypatch):
    """Queues, moving averages, tokens, rows that are replaced, no poisons; a kill on the way."""
    experiment.train.steps, experiment.mesh.data = 4, devices
    folder, left, leave = epath.Path(tmp_path / "all"), [], population._leave
    members = population.configs(experiment.lock(), [vary])

    def once(*args):
        if left:
            raise KeyboardInterrupt
        left.append(leave(*args))

    monkeypatch.setattr(population, "_leave", once)
    with pytest.raises(KeyboardInterrupt):
        population.run(members, folder, ["poison", "pretrain"])
    monkeypatch.setattr(population, "_leave", leave)
    population.run(members, folder, ["poison", "pretrain"])
    assert not (folder / "together").exists()
    for name in members:
        single = epath.Path(tmp_path / name)
        stages.run(run_folder.read_config(folder / name), single, ["poison", "pretrain"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
                     weights(folder / name), weights(single))


@pytest.mark.slow
def test_a_member_that_diverges_is_named(tmp_path, monkeypatch):
    """Of two victims and their twins, the twin of the second."""
    made = population.step_of

    def step_of(*args):
        step, init = made(*args)

        def broken(keys):
            state = init(keys)
            return state.replace(params=jax.tree.map(lambda x: x.at[3].set(jax.numpy.nan),
                                                     state.params))
        return step, broken

    monkeypatch.setattr(population, "step_of", step_of)
    members = population.configs(config(), ["seed=0,1"])
    with pytest.raises(NonFinite, match="4 encoders: the loss of step 1 is nan, of seed=1/control"):
        population.run(members, epath.Path(tmp_path), ["poison", "pretrain"])


@pytest.mark.parametrize("left", [["settings.json"], ["checkpoints/4/state"],
                                  ["settings.json", "metrics.jsonl"]])
def test_a_removal_that_was_killed_trains_nothing_again(tmp_path, monkeypatch, capsys, left):
    """All members have their checkpoints, and `left` is what is left of those together."""
    folder, members = epath.Path(tmp_path), population.configs(config(), ["seed=0,1"])
    every = [population.Member(folder / n, cfg, None, 1) for n, cfg in members.items()]
    monkeypatch.setattr(population, "_members", lambda members, folder: every)
    for m in every:
        run_folder.finish(m.folder / "pretrain", population._settings(m.cfg), step=4)
    place = folder / "together"
    for name in left:
        run_folder.write_json(place / name, {"members": list(members)})
    population.train(members, folder)
    assert capsys.readouterr().out == "pretrain: complete\n" and not place.exists()


def test_what_is_begun_is_kept_until_all_are_complete(tmp_path):
    place = epath.Path(tmp_path / "together")
    run_folder.write_json(place / "settings.json", {"members": ["a", "a/control"]})
    run_folder.finish(epath.Path(tmp_path / "a" / "pretrain"), {})
    assert population._begun(place) == ["a", "a/control"] and place.exists()
    run_folder.finish(epath.Path(tmp_path / "a" / "control" / "pretrain"), {})
    assert population._begun(place) is None and not place.exists()


def test_members_that_devices_cannot_share_are_refused(tmp_path):
    cfg = config().copy_and_resolve_references().unlock()
    cfg.mesh.data = 4
    members = population.configs(cfg.lock(), ["seed=0,1,2"])
    with pytest.raises(UserError, match="3 victims and 3 controls cannot be shared equally by 4"):
        population.run(members, epath.Path(tmp_path), ["poison", "pretrain"])
    members = population.configs(config(), ["seed=0,1"])
    population.run(members, epath.Path(tmp_path), ["poison", "pretrain"], check_only=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vary, message", [
    ([], "--vary is missing"), (["seed"], "must be KEY=V1,V2"), (["optim.lr=0.1"], "may differ in"),
    (["attack.name=none"], "may differ in"), (["attack.targt=1"], "did you mean 'target'"),
    (["attack.target=x"], "'x' is not of type int"),
    (["attack.layouts=left"], "not of type tuple")])
def test_what_members_cannot_differ_in(vary, message):
    with pytest.raises(UserError, match=message):
        population.configs(config(), vary)


@pytest.mark.parametrize("change, message", [
    ({"data.feed": "streamed"}, "feed=resident"), ({"train.steps": 0, "train.epochs": 1}, "epochs"),
    ({"train.chunks": 2}, "single runs"), ({"init_from": "x"}, "init_from='x' is of single runs"),
    ({"victim": "x"}, "victim='x' is of single runs"),
    ({"objective.name": "safeclip"}, "objective 'safeclip' looks at all data")])
def test_what_members_cannot_share(change, message):
    cfg = config().copy_and_resolve_references().unlock()
    cfg.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        population.check(cfg)

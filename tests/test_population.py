"""Many encoders at once: each is the encoder of its single run, in a folder of its own."""

import jax
import numpy as np
import pytest
from etils import epath

from configs import quickstart
from jax_cl_bd import metrics, population, run_folder, stages
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder


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
    assert capsys.readouterr().out.count("pretrain: complete") == 1


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
    ({"train.chunks": 2}, "single runs")])
def test_what_members_cannot_share(change, message):
    cfg = config().copy_and_resolve_references().unlock()
    cfg.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        population.check(cfg)

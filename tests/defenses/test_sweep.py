"""The sweep: what it leaves behind, and that it goes on where it was stopped.

The repairs on it are tested under their own names.
"""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import clip_scenes
from jax_cl_bd import checkpoint, parallel, run_folder
from jax_cl_bd.defenses import _sweep
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import weights_file
from jax_cl_bd.train import NonFinite, TrainState
from tests import toy_loop


class Tokenizer:
    def save(self, path):
        path.write_text("{}")


SUSPECT = types.SimpleNamespace(pair=types.SimpleNamespace(tokenizer=Tokenizer()))


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_a_repaired_model_is_kept_under_the_victims_own_loss(tmp_path, objective):
    cfg = clip_scenes.get_config(f"debug,objective={objective},defense=invertune")
    own = _sweep.described(_sweep.with_loss(cfg, "invertune", align=1.0))
    assert own.objective.name == "invertune" and own.objective.align == 1.0
    assert cfg.objective.name == objective
    variables = {"params": {"encoder": {"w": np.ones(2, np.float32)}}, "batch_stats": {}}
    _sweep.keep(epath.Path(tmp_path), own, variables, 3, SUSPECT)
    kept = run_folder.read_config(epath.Path(tmp_path))
    assert kept.objective.name == objective and "base" not in kept.objective
    assert (tmp_path / "checkpoints" / "3").exists()


@pytest.mark.parametrize("name", ["abd", "clean_clip", "cleaner_clip", "invertune",
                                  "oracle_finetune", "par", "ubt"])
def test_the_in_modality_term_of_pretraining_is_not_that_of_the_repair(name):
    cfg = clip_scenes.get_config(f"debug,defense={name}")
    cfg.mesh.data = 1
    cfg.objective.in_modality = 1.0
    importlib.import_module(f"jax_cl_bd.defenses.{name}").check(cfg, 50)
    own = _sweep.with_loss(cfg, "unimodal")  # any loss for repairs alone
    assert own.objective.in_modality == cfg.defense.in_modality


def test_what_builds_on_clips_loss_refuses_another():
    _sweep.check_clip(clip_scenes.get_config("debug,objective=roclip,defense=par"))
    cfg = clip_scenes.get_config("debug,objective=siglip,defense=par")
    with pytest.raises(UserError, match="defense par is for .*'clip'.*'siglip'"):
        _sweep.check_clip(cfg)
    with pytest.raises(UserError, match="defense.x=1 is for"):
        _sweep.check_clip(cfg, "defense.x=1")
    with pytest.raises(UserError, match="15 clean pairs are fewer"):
        _sweep.check_batch(cfg, 15)


class Stop(Exception):
    """In place of a kill."""


def swept(folder, stop=lambda what: None, rates=(0.01, 0.1)):
    """_sweep.train at two rates, four steps each, with a model that compiles at once; `stop` is
    told of every batch and of every look, and may raise."""
    cfg = clip_scenes.get_config("debug,defense=clean_clip")
    cfg.train.save_every = 1
    cfg.mesh.data = 1
    cfg.defense.update(rates=rates, steps=4, points=2)
    cfg.defense.optim.update(warmup_steps=0, schedule="constant")

    def first(tx):
        params = {"encoder": {"w": jnp.ones(3)}}
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, extra={},
                          batch_stats={"encoder": {"mean": jnp.zeros(3)}},
                          opt_state=tx.init(params), key=jax.random.key(1))

    def make_step(tx):
        def step(state, data, batch):
            x = data["rows"][batch["index"]]
            noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (len(x),))
            loss, grads = jax.value_and_grad(
                lambda p: jnp.mean((x @ p["encoder"]["w"] - noise) ** 2))(state.params)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return state.replace(
                step=state.step + 1, params=optax.apply_updates(state.params, updates),
                batch_stats={"encoder": {"mean": x.mean(0)}}, opt_state=opt_state), {"loss": loss}
        return step

    class Feed(toy_loop.Feed):
        def batches(self, step):
            for batch in super().batches(step):
                stop("batch")
                yield batch

    def accuracy(variables):
        stop("look")
        return float(1 / (1 + np.abs(variables["params"]["encoder"]["w"]).sum()))

    return _sweep.train(cfg, _sweep.described(cfg), SUSPECT, Feed(), first=first,
                        make_step=make_step, accuracy=accuracy, before=0.25,
                        mesh=parallel.make_mesh(cfg.mesh), folder=epath.Path(folder), label="test")


def same(one, other, folders):
    """Whether two sweeps gave and left the same, to the bit."""
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert [p.row() for p in one[2]] == [p.row() for p in other[2]]
    files = [sorted(folder.rglob("*.safetensors")) for folder in folders]
    assert len(files[0]) == 4  # and no temporary one
    for ours, theirs in zip(*files, strict=True):
        assert ours.relative_to(folders[0]) == theirs.relative_to(folders[1])
        (ours, facts), (theirs, expected) = (weights_file.read(epath.Path(p))
                                             for p in (ours, theirs))
        assert facts == expected and ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, swept(folder)


@pytest.mark.parametrize("what, count, saved", [("batch", 7, 2), ("look", 4, 3), ("save", 7, 2),
                                                ("save", 9, None)])
def test_stopped_at_the_second_rate_it_goes_on_to_the_same_bits(
        tmp_path, monkeypatch, capsys, undisturbed, what, count, saved):
    """Before a batch of it, a look at a point, or a checkpoint; the ninth is the chosen point's."""
    told = []

    def stop(now):
        told.append(now)
        if now == what and told.count(now) == count:
            raise Stop

    def save(*args, really=checkpoint.save):
        stop("save")
        really(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Stop):
        swept(tmp_path, stop)
    points = list((tmp_path / "rate_0.01" / "points").iterdir())
    written = [p.stat().st_mtime_ns for p in points]
    capsys.readouterr()
    found = swept(tmp_path, stop)
    said = [line for line in capsys.readouterr().out.splitlines() if "going on" in line]
    assert said == ([] if saved is None else [f"test, rate 0.1: going on from step {saved}"])
    same(found, undisturbed[1], (tmp_path, undisturbed[0]))
    assert [p.stat().st_mtime_ns for p in points] == written  # of the first rate, made once
    before = len(told)
    same(swept(tmp_path, stop), found, (tmp_path, undisturbed[0]))
    assert len(told) == before  # a finished one is only read


def test_a_rate_that_diverges_ends_there_and_the_others_stand(tmp_path, capsys, undisturbed):
    """The second rate's weights overflow in its third step, after its first point."""
    told = []
    found = swept(tmp_path, told.append, rates=(0.01, 1e13))
    assert "rate 1e+13: the loss of step 3 is inf; this rate ends" in capsys.readouterr().err
    points, own = found[2], found[1]
    assert [(p.rate, p.step) for p in points] == [(0.01, 2), (0.01, 4), (1e13, 2)]
    assert [p.row() for p in points[:2]] == [
        {**p.row(), "chosen": i == 1} for i, p in enumerate(undisturbed[1][2][:2])]
    verdict = _sweep.outcome_of(found[0], own, points, pairs=1).verdict
    assert verdict["diverged"] == [1e13] and verdict["rate"] == 0.01
    before = len(told)
    again = swept(tmp_path, told.append, rates=(0.01, 1e13))  # it is not tried anew
    assert len(told) == before and [p.row() for p in again[2]] == [p.row() for p in points]


def test_where_every_rate_diverges_it_says_which_settings_to_change(tmp_path):
    with pytest.raises(NonFinite, match=r"test: every rate of defense.rates=\(1e\+20,.*lower them"):
        swept(tmp_path, rates=(1e20, 1e21))

"""InverTune's tuning loss against NumPy, on activations that a plain pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, parts
from jax_cl_bd.objectives import invertune, training
from tests.objectives.reference import unit

NAMES = ("layer1_0", "layer2_0")


@pytest.fixture(scope="module")
def made():
    """A tiny model, a suspect whose weights differ a little, a batch and a trigger."""
    cfg = clip_scenes.get_config("debug")
    cfg.objective.update(name="invertune", align=0.7, preserve=0.3, norm="test")
    init = jax.jit(lambda key: training.init_variables(cfg, key))
    variables, other = init(jax.random.key(0)), init(jax.random.key(1))
    params = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, variables["params"], other["params"])
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(4, 32, 32, 3)))
    trigger = {"mask": np.float32(rng.random((32, 32, 3)) > 0.8),
               "pattern": np.float32(rng.normal(size=(32, 32, 3)))}
    neurons = {"layer1_0": np.float32(rng.random((32, 32, 8)) > 0.5),
               "layer2_0": np.float32(rng.random((16, 16, 16)) > 0.5)}
    extra = {"suspect": {**variables, "params": params}, "trigger": trigger, "neurons": neurons}
    return cfg, variables, extra, x


def run(cfg, variables, extra, x):
    fns = parts.make_apply_fns(training.modules_of(cfg))
    return jax.jit(jax.value_and_grad(lambda params: invertune.loss(
        cfg, {**variables, "params": params}, extra, {"view1": x}, fns, None, 0),
        has_aux=True))(variables["params"])


def outputs(cfg, variables, x, train):
    """Features in the shared space, and {stage: activations}, by capturing everything."""
    module = build.build(cfg.model)
    part = {kind: variables[kind]["encoder"] for kind in variables}
    y, kept = module.apply(part, x, train=train, capture_intermediates=True,
                           mutable=["intermediates", "batch_stats"])
    z = training.modules_of(cfg)["image_projection"].apply(
        {"params": variables["params"]["image_projection"]}, y, train=False)
    return np.float64(z), {n: np.float64(kept["intermediates"][n]["__call__"][0]) for n in NAMES}


@pytest.mark.parametrize("norm", ["test", "train"])
def test_value_against_numpy(made, norm):
    cfg, variables, extra, x = made
    cfg = ConfigDict(cfg.to_dict())
    cfg.objective.norm = norm
    (value, (stats, kept, metrics)), grads = run(cfg, variables, extra, x)
    mask, pattern = extra["trigger"]["mask"], extra["trigger"]["pattern"]
    z, clean = outputs(cfg, variables, x, norm == "train")
    _, hit = outputs(cfg, variables, x * (1 - mask) + mask * pattern, norm == "train")
    before, _ = outputs(cfg, extra["suspect"], x, False)
    align = 0
    for name in NAMES:
        a, b = (extra["neurons"][name] * v[name].mean(0) for v in (clean, hit))
        align += np.linalg.norm(a - b) / np.linalg.norm(a)
    preserve = np.linalg.norm(unit(z) - unit(before))
    assert align > 0.01 and preserve > 0.01
    np.testing.assert_allclose([metrics["align"], metrics["preserve"]], [align, preserve],
                               rtol=1e-4)
    np.testing.assert_allclose(value, 0.7 * align + 0.3 * preserve, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, kept["neurons"], extra["neurons"])
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(stats["encoder"]),
                                                 jax.tree.leaves(variables["batch_stats"]))]
    assert (max(moved) > 0) == (norm == "train")
    for part in ("text", "text_projection", "scale"):  # the image tower alone learns
        assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads[part]))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_statistics_are_those_of_three_passes(made):
    cfg, variables, extra, x = made
    cfg = ConfigDict(cfg.to_dict())
    cfg.objective.norm = "train"
    (_, (stats, _, _)), _ = run(cfg, variables, extra, x)
    module = build.build(cfg.model)
    part = {kind: variables[kind]["encoder"] for kind in variables}
    for shown in (x, invertune.triggered(extra["trigger"], x), x):
        _, updated = module.apply(part, shown, train=True, mutable=["batch_stats"])
        part = {**part, **updated}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 stats["encoder"], part["batch_stats"])


def test_a_trigger_without_effect_has_no_gradient_and_no_nan(made):
    """At the suspect itself, in test mode, under an empty mask, all norms are 0."""
    cfg, variables, extra, x = made
    empty = {"mask": np.zeros((32, 32, 3), np.float32), "pattern": extra["trigger"]["pattern"]}
    (value, _), grads = run(cfg, variables, {**extra, "suspect": variables, "trigger": empty}, x)
    assert float(value) < 1e-5
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_suspect_is_a_copy():
    start = {"params": {"a": np.ones(2)}}
    extra = invertune.init_extra(None, start, None)
    assert extra["suspect"]["params"]["a"] is not start["params"]["a"]


def test_bad_settings_are_refused(made):
    for fields, says in (({"align": -1.0}, "align"), ({"align": 0.0, "preserve": 0.0}, "both 0"),
                         ({"norm": "none"}, "norm"), ({"in_modality": 1.0}, "in_modality")):
        mine = ConfigDict(made[0].objective.to_dict())
        mine.update(fields)
        with pytest.raises(UserError, match=says):
            invertune.heads(mine)


def test_length_of_zero_has_gradient_zero():
    value, grad = jax.value_and_grad(invertune.length)(jnp.zeros(3))
    assert float(value) < 1e-9 and not np.asarray(grad).any()

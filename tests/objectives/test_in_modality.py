"""The in-modality terms and the towers' passes, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, in_modality, siglip, unimodal
from tests.objectives.reference import differences, unit

B, D = 4, 3
NAMES = ("view1", "view2", "tokens", "tokens2")
MODULES = {"clip": clip, "siglip": siglip}
ALONE = {**MODULES, "unimodal": unimodal}


def config(name, **fields):
    return ConfigDict({"objective": {
        "name": name, "dim": D, "image_projection": False, "text_bias": False, "ring": False,
        "scale_init": 1.0, "bias_init": -1.0, "in_modality": 0.0, "in_modality_temperature": 0.0,
        **fields}})


def network(bias=None):
    """Towers that multiply by their weight, and note the rows they were given."""
    seen = {"encoder": [], "text": []}

    def tower(name):
        def apply(variables, x, train):
            assert train
            seen[name].append(x.shape[0])
            stats = variables["batch_stats"][name]
            return x * variables["params"][name]["w"], {"calls": stats["calls"] + 1}
        return apply

    fns = {"encoder": tower("encoder"), "text": tower("text"),
           "text_projection": lambda v, x, train: (x, {}),
           "scale": lambda v, x, train: ((v["params"]["scale"]["logit_scale"], bias), {})}
    variables = {"params": {"encoder": {"w": 1.0}, "text": {"w": 1.0}, "text_projection": {},
                            "scale": {"logit_scale": jnp.float32(1.2)}},
                 "batch_stats": {"encoder": {"calls": 0}, "text": {"calls": 0},
                                 "text_projection": {}, "scale": {}}}
    return fns, variables, seen


def batch(seed=0):
    """Captions stand as vectors, so that gradients reach them."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(B, D)).astype(np.float32) for name in NAMES}


def run(name, cfg, bias, data):
    """Value, gradients in t' and in the batch, and the metrics."""
    fns, variables, _ = network(bias)

    def f(log_scale, data):
        v = {**variables, "params": {**variables["params"], "scale": {"logit_scale": log_scale}}}
        return ALONE[name].loss(cfg, v, {}, data, fns, jax.random.key(0), 0)

    (value, (_, _, metrics)), grads = jax.jit(
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(np.float32(1.2), data)
    return value, grads, metrics


def passes(name, cfg, data):
    """The rows of every pass through a tower, and the statistics it leaves behind."""
    fns, variables, seen = network(-1.0)
    _, (stats, _, _) = MODULES[name].loss(cfg, variables, {}, data, fns, None, 0)
    return seen, [stats[tower]["calls"] for tower in ("encoder", "text")]


def ce(m):
    """Row-wise softmax cross-entropy against the diagonal, by loops."""
    return np.mean([np.log(sum(np.exp(v) for v in row)) - row[i] for i, row in enumerate(m)])


def l_ss(data, s):
    i, i2, t, t2 = (unit(data[k]) for k in NAMES)
    return 0.5 * (ce(s * i @ i2.T) + ce(s * t @ t2.T))


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("name, bias", [("clip", None), ("siglip", -1.0)])
def test_value_and_gradient(name, bias, tau):
    """What the weighted term adds to the loss without it, for s shared and for 1 / tau."""
    data = batch()
    off = run(name, config(name), bias, data)
    on = run(name, config(name, in_modality=0.7, in_modality_temperature=tau), bias, data)

    def reference(**changed):
        scale = 1 / tau if tau else np.exp(changed.pop("scale", 1.2))
        return 0.7 * l_ss({**data, **changed}, scale)

    np.testing.assert_allclose(on[0] - off[0], reference(), rtol=1e-4)
    np.testing.assert_allclose(on[2]["in_modality_loss"], reference() / 0.7, rtol=1e-5)
    assert "in_modality_loss" not in off[2]
    for key in NAMES:
        want = differences(lambda x: reference(**{key: x}), data[key])
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(on[1][1][key] - off[1][1][key], want, rtol=1e-3, atol=3e-6)
    want = 0.0 if tau else differences(lambda x: reference(scale=x), 1.2)
    np.testing.assert_allclose(on[1][0] - off[1][0], want, rtol=1e-3, atol=3e-6)


def test_alone_it_is_all_of_the_loss():
    data = batch()
    value, (of_scale, of_data), metrics = run("unimodal", config("unimodal", in_modality=0.7),
                                              None, data)
    np.testing.assert_allclose(value, 0.7 * l_ss(data, np.exp(1.2)), rtol=1e-5)
    np.testing.assert_allclose(metrics["in_modality_loss"], value / 0.7, rtol=1e-6)
    for key in NAMES:
        want = differences(lambda x: 0.7 * l_ss({**data, key: x}, np.exp(1.2)), data[key])
        np.testing.assert_allclose(of_data[key], want, rtol=1e-3, atol=3e-6)
    want = differences(lambda x: 0.7 * l_ss(data, np.exp(x)), 1.2)
    np.testing.assert_allclose(of_scale, want, rtol=1e-3)
    with pytest.raises(UserError, match="in_modality = 0.0"):
        unimodal.heads(config("unimodal").objective)


def test_rows_are_originals_and_columns_augmented():
    z = {"image": jnp.eye(3), "image2": jnp.asarray(unit(np.tril(np.ones((3, 3)))), jnp.float32),
         "text": jnp.eye(3), "text2": jnp.eye(3)}
    cfg = config("clip", in_modality=1.0)
    one_way = ce(2 * np.asarray(z["image"]) @ np.asarray(z["image2"]).T)
    other_way = ce(2 * np.asarray(z["image2"]) @ np.asarray(z["image"]).T)
    assert abs(one_way - other_way) > 0.01
    np.testing.assert_allclose(in_modality.term(cfg, z, 2.0), 0.5 * (one_way + ce(2 * np.eye(3))),
                               rtol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_off_the_augmented_views_are_neither_read_nor_run(name):
    data = {key: value for key, value in batch().items() if key in ("view1", "tokens")}
    assert passes(name, config(name), data) == ({"encoder": [B], "text": [B]}, [1, 1])


@pytest.mark.parametrize("name", MODULES)
def test_on_there_is_one_pass_of_both_for_each_tower(name):
    cfg = config(name, in_modality=0.5)
    assert passes(name, cfg, batch()) == ({"encoder": [2 * B], "text": [2 * B]}, [1, 1])


def test_a_view_stays_beside_its_original():
    fns, variables, _ = network()
    rows = []
    fns["encoder"] = lambda v, x, train: (rows.append(np.asarray(x)) or x, {})
    data = batch()
    z, _, _ = in_modality.embed(config("clip", in_modality=1.0), variables, data, fns)
    np.testing.assert_array_equal(rows[0][::2], data["view1"])
    np.testing.assert_array_equal(rows[0][1::2], data["view2"])
    for name, key in zip(("image", "image2", "text", "text2"), NAMES):
        np.testing.assert_allclose(z[name], unit(data[key]), rtol=1e-5)


@pytest.mark.parametrize("field", ["in_modality", "in_modality_temperature"])
@pytest.mark.parametrize("name", MODULES)
def test_negative_settings_are_refused(name, field):
    with pytest.raises(UserError, match=f"objective.{field} = -0.5"):
        MODULES[name].heads(config(name, **{field: -0.5}).objective)


def test_towers_of_different_widths_are_refused():
    data = batch()
    data["tokens"] = np.ones((B, D + 2), np.float32)
    with pytest.raises(UserError, match="width 3.* = 5.*image_projection = True"):
        run("clip", config("clip"), None, data)

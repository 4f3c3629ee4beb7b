"""The inversion finds a planted patch, and the controller follows its rules step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd import parallel
from jax_cl_bd.data import sources
from jax_cl_bd.defenses import decree
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models.encoder import Encoder


class Planted:
    """An encoder: a fixed random map of the image, and, if backdoored, one direction that grows
    with the brightness of a 4 x 4 corner until nothing else counts."""

    def __init__(self, strength):
        self.strength = strength

    def apply(self, variables, x, train):
        z = jnp.tanh(x.reshape(len(x), -1) @ variables["map"])
        corner = jax.nn.softplus(4 * (x[:, 2:6, 2:6].mean(axis=(1, 2, 3)) - 1.5))
        return z + self.strength * corner[:, None] * variables["direction"]


def suspect(strength):
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(8, 1, 8, 1, 3, 24))  # of 4 x 4 pixels, so that images differ by it
    patches = np.broadcast_to(patches, (8, 4, 8, 4, 3, 24)).reshape(32 * 32 * 3, 24)
    variables = {"map": np.float32((patches - patches.mean(0)) / 30),
                 "direction": np.float32(rng.normal(size=24))}
    mesh = parallel.make_mesh(ConfigDict({"data": 1, "fsdp": 1}))
    return Encoder(Planted(strength), variables, (0.5,) * 3, (0.25,) * 3, 32, mesh)


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,defense=decree")
    cfg.defense.update(steps=300, batch_size=32, images=64)
    return cfg


def inverted(cfg, strength, folder, truth=None):
    data = Given(sources.Subset(sources.load(cfg.data, "train"), np.arange(64)))
    return decree.run(cfg, [suspect(strength)], data, truth, None, epath.Path(folder),
                      jax.random.key(0))


def test_a_planted_patch_gives_a_small_mask_and_a_clean_encoder_a_large_one(cfg, tmp_path):
    found = inverted(cfg, 300.0, tmp_path / "planted")
    clean = inverted(cfg, 0.0, tmp_path / "clean")
    assert found.verdict["backdoored"] and found.verdict["pl1"] < 0.05
    assert clean.verdict["pl1"] is None or clean.verdict["pl1"] > 4 * found.verdict["pl1"]
    assert not clean.verdict["backdoored"] and found.variables is None
    assert (tmp_path / "planted" / "inverted.png").exists()
    truth = Truth(None, 3, None, None)
    again = inverted(cfg, 300.0, tmp_path / "planted", truth)  # over a finished folder
    assert again.verdict == found.verdict


def test_the_controller_counts_and_keeps_the_smallest_mask():
    update = decree._controller(1e-7)
    state = decree._first_state(2)
    raw = {"mask": jnp.zeros((2, 2, 1)), "pattern": jnp.zeros((2, 2, 3))}
    reference, up, down = 1e-3, 0, 0
    for cosine, share in [(0.995, 0.5)] * 7 + [(0.5, 0.1)] * 13 + [(0.999, 0.3), (0.999, 0.4)]:
        state = update(state, raw, {"cosine": jnp.float32(cosine), "share": jnp.float32(share)})
        up, down = (up + 1, 0) if cosine > 0.99 else (0, down + 1)
        if up > 5:
            reference, up = reference * 5, 0
        if down > 5:
            reference, down = reference / 5, 0
        np.testing.assert_allclose(state["lambda"], reference, rtol=1e-5)
    assert float(state["best"]) == pytest.approx(0.3)  # 0.1 did not make images alike
    np.testing.assert_allclose(state["mask"], 0.5)


def test_lambda_stops_at_its_least_and_rises_from_there():
    update = decree._controller(1e-4)
    state = decree._first_state(2)
    raw = {"mask": jnp.zeros((2, 2, 1)), "pattern": jnp.zeros((2, 2, 3))}
    seen = []
    for cosine in [0.5] * 30 + [0.995] * 12:
        state = update(state, raw, {"cosine": jnp.float32(cosine), "share": jnp.float32(0.5)})
        seen.append(float(state["lambda"]))
    np.testing.assert_allclose(seen, [1e-3] * 5 + [2e-4] * 6 + [1e-4] * 24 + [5e-4] * 6 + [2.5e-3],
                               rtol=1e-5)


def test_the_loss_is_that_of_numpy(cfg):
    model = suspect(5.0)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    raw = {"mask": jnp.asarray(rng.normal(size=(32, 32, 1)), jnp.float32),
           "pattern": jnp.asarray(rng.normal(size=(32, 32, 3)), jnp.float32)}
    value, info = decree._loss(model)(raw, {"images": x, "variables": model.variables},
                                      np.arange(5), None, {"lambda": 0.01})
    mask = np.tanh(np.float64(raw["mask"])) / 2 + 0.5
    pattern = np.tanh(np.float64(raw["pattern"])) / 2 + 0.5
    shown = (1 - mask) * (x[:5] / 255) + mask * pattern
    z = np.asarray(model.module.apply(model.variables, jnp.asarray((shown - 0.5) / 0.25,
                                                                   jnp.float32), False))
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [z[i] @ z[j] for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(info["cosine"], np.mean(pairs), rtol=1e-4)
    np.testing.assert_allclose(value, -np.mean(pairs) + 0.01 * 3 * mask.sum(), rtol=1e-4)
    np.testing.assert_allclose(info["share"], mask.mean(), rtol=1e-5)


def test_bad_settings_are_refused(cfg):
    for changes, says in (({"batch_size": 1}, "batch_size"), ({"lr": 0.0}, "lr"),
                          ({"lambda_min": 1.0}, "lambda_min"), ({"threshold": 0.0}, "threshold"),
                          ({"milestones": (0.5, 0.2)}, "milestones"),
                          ({"milestones": (0.2, 0.2)}, "milestones"),
                          ({"images": cfg.defense.batch_size - 1}, "images that are used")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update(changes)
        with pytest.raises(UserError, match=says):
            decree.check(mine, 64)

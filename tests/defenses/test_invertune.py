"""InverTune: its steps against plain NumPy, a planted target, and the whole repair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from skimage.metrics import structural_similarity

import jax_cl_bd
from jax_cl_bd import parallel
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import sources, texts
from jax_cl_bd.defenses import _invert, invertune
from jax_cl_bd.defenses.given import Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training
from tests.defenses import small_repair
from tests.objectives.reference import unit

SCORES = ("target_label_correct", "mask_iou")


class Planted:
    """An image tower: a fixed random map, and one direction that grows with the brightness of a
    4 x 4 corner in the lower right, where the probe lies."""

    def apply(self, variables, x, train):
        z = jnp.tanh(x.reshape(len(x), -1) @ variables["map"])
        corner = jax.nn.softplus(4 * (x[:, 25:29, 25:29].mean(axis=(1, 2, 3)) - 1.5))
        return z + 50 * corner[:, None] * variables["direction"]


@dataclasses.dataclass(frozen=True)
class Suspect:
    """What _invert.py asks of an encoder."""

    variables: dict
    module: Planted = Planted()
    mean: tuple = (0.5,) * 3
    std: tuple = (0.25,) * 3
    image_size: int = 32
    pair = None

    def image(self, x):
        return np.asarray(self.module.apply(self.variables, (x / np.float32(255) - 0.5) / 0.25,
                                            False))


def suspect():
    rng = np.random.default_rng(0)
    return Suspect({"map": np.float32(rng.normal(size=(32 * 32 * 3, 6)) / 30),
                    "direction": np.float32(rng.normal(size=6))})


@pytest.fixture(scope="module")
def cfg():
    return small_repair.config("invertune")


def repaired(cfg, folder, truth=None):
    return small_repair.run(invertune, cfg, folder, truth)


@pytest.mark.slow
def test_the_image_tower_alone_moves_and_the_truth_scores_and_changes_nothing(cfg, tmp_path):
    patch = np.array([[10, 10, 8, 8]] * 2)
    plan = Plan.make(2, canvas=np.full((2, 2), 32), trigger_box=patch)
    given, known = repaired(cfg, tmp_path / "known", Truth(plan, 3, None, np.arange(40) % 4 - 2))
    _, blind = repaired(cfg, tmp_path / "blind")
    scores = {name: known.verdict.pop(name) for name in SCORES}
    assert known.verdict == blind.verdict and not set(SCORES) & set(blind.verdict)
    assert scores["target_label_correct"] == (known.verdict["target_label"] == 3)
    assert scores["mask_iou"] == pytest.approx(64 / 1024)  # after 2 steps the mask is everywhere
    assert known.verdict["mask_share"] > 0.9
    d = cfg.defense  # patch, inversion, tuning
    assert known.verdict["gradient_steps"] == d.probe.steps + d.invert.steps + d.steps
    for part, moves in (("encoder", True), ("image_projection", True), ("text", False),
                        ("text_projection", False), ("scale", False)):
        pairs = zip(jax.tree.leaves(given.pair.variables["params"][part]),
                    jax.tree.leaves(known.variables["params"][part]))
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs) == moves, part
    assert set(known.verdict["impact"]) == {"layer1_0", "layer2_0"}
    assert set(known.verdict["critical_share"]) == {"layer1_0", "layer2_0"}
    for name in known.report["pictures"]:
        assert (tmp_path / "known" / name).exists()
    # The folder opens by itself; the same command over it inverts and trains nothing anew.
    assert jax_cl_bd.load_encoder(tmp_path / "known").text(["a red star"]).shape == (1, 16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_invert.optimize, "minimise", None)
        _, again = repaired(cfg, tmp_path / "known")
    assert again.verdict == blind.verdict
    jax.tree.map(np.testing.assert_array_equal, again.variables, blind.variables)


def test_a_planted_shortcut_shows_as_the_class_whose_share_rises(cfg):
    model, rng = suspect(), np.random.default_rng(1)
    x = rng.integers(0, 128, (64, 32, 32, 3)).astype(np.uint8)
    probe = ConfigDict({**cfg.defense.probe.to_dict(), "steps": 60, "batch_size": 32})
    patch = _invert.make_probe(probe, model, x, jax.random.key(0), rng, "probe")
    assert patch.shape == (5, 5, 3) and 0 <= patch.min() and patch.max() <= 1
    shown = _invert.probed(probe, x, patch)
    assert (shown[:, 25:30, 25:30] == np.rint(255 * patch)).all()
    shown[:, 25:30, 25:30] = x[:, 25:30, 25:30]
    np.testing.assert_array_equal(shown, x)
    head = np.concatenate([model.variables["direction"][None],
                           rng.normal(size=(4, 6)) / 3 - model.variables["direction"]])
    before, after = (((unit(model.image(v)) @ unit(head).T).argmax(1))
                     for v in (x, _invert.probed(probe, x, patch)))
    absolute, _ = _invert.rises(before, after, 5)
    assert absolute.argmax() == 0 and absolute[0] > 0.5


def test_rises_by_hand():
    before = np.array([0] * 90 + [1] * 10)
    after = np.array([0] * 60 + [1] * 25 + [2] * 15)
    absolute, relative = _invert.rises(before, after, 4)
    np.testing.assert_allclose(absolute, [-0.3, 0.15, 0.15, 0])
    np.testing.assert_allclose(relative, [-1 / 3, 1.5, -np.inf, -np.inf])


def test_the_inversion_loss_is_that_of_numpy(cfg):
    model, rng = suspect(), np.random.default_rng(2)
    x = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    trigger = {"mask": rng.random((32, 32, 3)), "pattern": rng.normal(size=(32, 32, 3))}
    head, targets = unit(rng.normal(size=(4, 6))), unit(rng.normal(size=(3, 6)))
    settings = ConfigDict({**cfg.defense.invert.to_dict(), "mask_weight": 0.02, "batch_size": 3})
    value = _invert.inversion_loss(settings, model, 2)(
        {k: np.float32(v) for k, v in trigger.items()},
        {"images": x, "variables": model.variables, "head": np.float32(head),
         "targets": np.float32(targets)}, np.array([4, 0, 2]), None)
    clean = (x[[4, 0, 2]] / 255 - 0.5) / 0.25
    shown = trigger["mask"] * trigger["pattern"] + (1 - trigger["mask"]) * clean
    z = unit(model.module.apply(model.variables, np.float32(shown), False))
    logits = z @ head.T / 0.07
    ce = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 2])
    alike = np.mean([structural_similarity(
        a, b, win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=1.0, channel_axis=-1) for a, b in zip(shown, clean)])
    want = (5 * ce + 0.5 * np.linalg.norm(z - targets) + (1 - alike)
            + 0.02 * trigger["mask"].sum())
    np.testing.assert_allclose(value, want, rtol=1e-4)


def test_critical_neurons_by_hand():
    moved = np.array([[0.1, 0.2, 5.0], [4.0, 0.0, 0.3]])
    np.testing.assert_array_equal(invertune.clusters(moved, 0), [[0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(invertune.clusters(np.zeros((2, 2)), 0), np.ones((2, 2)))


def test_impact_is_that_of_batch_means(cfg):
    mesh, source = parallel.make_mesh(cfg.mesh), sources.load(cfg.data, "train")
    given = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                             texts.make_tokenizer(cfg, source))
    x = np.stack([source[i]["image"] for i in range(6)])
    trigger = {"mask": np.zeros((32, 32, 3), np.float32), "pattern": np.ones((32, 32, 3), "f4")}
    trigger["mask"][8:16, 8:16] = 1
    impacts, neurons = invertune.critical(given, x, trigger, 1, 0)
    mean, std = np.float32(given.mean), np.float32(given.std)
    clean = (x / np.float32(255) - mean) / std
    shown = clean * (1 - trigger["mask"]) + trigger["mask"]
    means = [given.module.apply(given.variables, v, train=False, capture_intermediates=True,
                                mutable=["intermediates"])[1]["intermediates"]
             for v in (clean, shown)]
    for name, impact in impacts.items():
        a, b = (np.asarray(m[name]["__call__"][0]).mean(0) for m in means)
        assert impact == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-3)
    most = max(impacts, key=impacts.get)
    assert list(neurons) == [most]
    a, b = (np.asarray(m[most]["__call__"][0]).mean(0) for m in means)
    picked = neurons[most] == 1
    assert picked.any() and np.abs(a - b)[picked].min() >= np.abs(a - b)[~picked].max() - 1e-5


def test_the_box_of_a_mask():
    mask = np.zeros((8, 8, 3))
    assert _invert.box_of(mask) is None
    mask[2, 3, 1], mask[4, 6, 0] = 0.9, 0.6
    assert _invert.box_of(mask) == (2, 3, 3, 4)


def test_bad_settings_are_refused(cfg, tmp_path):
    invertune.check(cfg, 40)
    for changes, says in (({"layers": 0}, "layers"), ({"rise": "highest"}, "rise"),
                          ({"align": -1.0}, r"defense\.align"), ({"norm": "both"}, "norm"),
                          ({"surrogate": str(tmp_path)}, "surrogate"),
                          ({"in_modality": 1.0}, "in_modality"),
                          ({"probe.share": 0.0}, "share"), ({"probe.margin": 0.9}, "margin"),
                          ({"probe.steps": 0}, "probe.steps"), ({"invert.lr": 0.0}, "invert"),
                          ({"invert.class_weight": 0.0}, "class_weight"),
                          ({"invert.mask_weight": -1.0}, "mask_weight"),
                          ({"optim.clip_norm": -1.0}, "clip_norm")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            invertune.check(mine, 40)
    with pytest.raises(UserError, match="one batch"):
        invertune.check(cfg, 8)

"""Local density: scores against plain loops, what they find and what not, and the verdict."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from configs import clip_scenes, quickstart
from jax_cl_bd import defend, parallel, poison
from jax_cl_bd.data import sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import _detection, density
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training

SCORED = ("auroc", "tpr", "fpr", "tpr_at_1_percent_fpr")


def reference(z, k):
    """The four scores of all rows, {name: [n]}, written down from the formulas in float64."""
    z = np.asarray(z, np.float64)
    near, distances = [], []
    for i, one in enumerate(z):
        found = sorted((np.sqrt(((one - other)**2).sum()), j) for j, other in enumerate(z)
                       if j != i)[:k]
        distances.append([r for r, _ in found])
        near.append([j for _, j in found])

    def dimension(r):
        return -k / sum(np.log(r_i / r[-1] + 1e-4) for r_i in r)

    out = {name: [] for name in density.SCORES}
    for i in range(len(z)):
        r_k = distances[i][-1]
        out["k_distance"].append(r_k)
        out["slof"].append(np.mean([r_k / distances[o][-1] for o in near[i]]))
        out["lid"].append(dimension(distances[i]))
        out["dao"].append(np.mean([dimension(distances[o]) * np.log(r_k / distances[o][-1])
                                   for o in near[i]]))
    return {name: np.array(values) for name, values in out.items()}


def unit(z):
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def close(found, expected):
    for name in density.SCORES:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-4, err_msg=name)


def test_scores_against_plain_loops_with_padding_and_added_rows():
    rng = np.random.default_rng(0)
    z, extra = unit(rng.normal(size=(60, 7))), unit(rng.normal(size=(5, 7)))
    padded = np.concatenate([z, np.zeros((4, 7), np.float32)])
    own, others = density.batch_scores(padded, 60, extra, k=6)
    close({name: value[:60] for name, value in own.items()}, reference(z, 6))
    alone = [reference(np.concatenate([z, row[None]]), 6) for row in extra]
    close(others, {name: np.array([a[name][-1] for a in alone]) for name in density.SCORES})


def test_near_copies_keep_their_distances():
    """By matrix products in float32 two unit vectors 1e-4 apart are at 0 or 3e-4."""
    rng = np.random.default_rng(1)
    z = unit(rng.normal(size=(40, 16)))
    z[20:26] = z[20] + 1e-4 * rng.normal(size=(6, 16))
    own, _ = density.batch_scores(z, 40, z[:1], k=5)
    close(own, reference(z, 5))


def test_where_a_distance_is_zero_the_score_is_1000():
    z = unit(np.random.default_rng(2).normal(size=(40, 8)))
    z[:6] = z[0]  # six times the same
    own, _ = density.batch_scores(z, 40, z[:1], k=5)
    np.testing.assert_array_equal(own["k_distance"][:6], 0)
    for name in ("slof", "lid", "dao"):
        np.testing.assert_array_equal(own[name][:6], density.WORST)
        assert np.isfinite(own[name]).all()


@pytest.mark.parametrize("poisons, found", [(6, True), (48, False)])
def test_fewer_poisons_than_k_are_found_and_more_are_not(poisons, found):
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(9, 32))
    kinds = np.concatenate([rng.integers(0, 8, 500), np.full(poisons, 8)])
    spread = np.where(kinds == 8, 0.05, 0.4)[:, None]
    z = unit(centres[kinds] + spread * rng.normal(size=(len(kinds), 32)))
    own, _ = density.batch_scores(z, len(z), z[:1], k=16)
    for name in ("k_distance", "slof", "dao"):
        auroc = _detection.grade(np.asarray(own[name]), 0.0, kinds == 8)["auroc"]
        assert auroc > 0.99 if found else auroc < 0.5, name
    # LID turns round even earlier: to a poison its few companions are far nearer than the rest.
    assert _detection.grade(np.asarray(own["lid"]), 0.0, kinds == 8)["auroc"] < 0.5


def pixels(z):
    """A source of 1 x 1 images, and the suspect that reads them as what they are."""
    return [{"image": one.reshape(1, 1, 3)} for one in z]


SUSPECT = SimpleNamespace(image_size=1, project=None,
                          image=lambda x: x.reshape(len(x), 3).astype(np.float32) - 127)


def test_every_row_is_scored_once_and_clean_rows_as_members():
    every = np.unique(np.random.default_rng(4).integers(0, 256, (80, 3)).astype(np.uint8), axis=0)
    pool, new = every[:61], every[61:70]
    clean = np.concatenate([new, pool[:7]])  # seven are in the pool
    sizes = density._sizes(61, ConfigDict(dict(k=4, batch=31)))
    np.testing.assert_array_equal(sizes, [31, 30])
    scores, found, known = density.score_all(SUSPECT, pixels(pool), pixels(clean), 4, sizes, seed=5)
    assert known == 7 and len(found["lid"]) == 16
    rng = np.random.default_rng([density._SEED, 5])
    batches = np.split(rng.permutation(61), [31])
    embedded = {True: unit(pool.astype(float) - 127), False: unit(new.astype(float) - 127)}
    for rows in batches:
        close({name: scores[name][rows] for name in scores}, reference(embedded[True][rows], 4))
    for name in density.SCORES:
        np.testing.assert_array_equal(found[name][:7], scores[name][:7])
    guests = np.split(rng.permutation(9), [5])
    alone = [reference(np.concatenate([embedded[True][rows], embedded[False][i:i + 1]]), 4)
             for rows, part in zip(batches, guests) for i in part]
    close({name: found[name][7:] for name in found},
          {name: np.array([a[name][-1] for a in alone]) for name in density.SCORES})


def test_threshold_and_grades():
    clean, scores = np.arange(200.0), np.array([197.0, 198.0, 500.0, 3.0, 197.5])
    verdict = _detection.judge(scores, clean, 0.01)
    assert verdict == {"threshold": 197.0, "flagged": 3, "most_suspicious": [2, 1, 4, 0, 3]}
    assert _detection.judge(scores, clean[:50], 0.01)["threshold"] == 49.0
    poisoned = np.array([False, True, True, False, True])
    assert _detection.grade(scores, 197.0, poisoned) == {
        "auroc": 1.0, "tpr": 1.0, "fpr": 0.0, "tpr_at_1_percent_fpr": 1.0}
    assert _detection.grade(np.ones(5), 0.0, poisoned)["auroc"] == 0.5  # ties count half
    assert set(_detection.grade(scores, 197.0, np.zeros(5, bool)).values()) == {None}
    # Two of 200 clean rows may lie above: the poisons at 197.5 and 300 are found, that at 50 not.
    scores, poisoned = np.append(clean, [197.5, 300.0, 50.0]), np.arange(203) >= 200
    found = _detection.grade(scores, 500.0, poisoned)
    assert found["tpr_at_1_percent_fpr"] == pytest.approx(2 / 3) and found["tpr"] == 0
    # Ties on a straight line of the curve: each threshold counts, not the line's ends alone.
    tied = _detection.grade(np.repeat([3.0, 2.0, 1.0], 101), 9.0, np.tile(np.arange(101) < 1, 3))
    assert tied["tpr_at_1_percent_fpr"] == 0
    scores = np.r_[np.repeat([4.0, 3.0, 2.0], 2), np.ones(297)]
    found = _detection.grade(scores, 9.0, np.r_[[True, False] * 3, np.zeros(297, bool)])
    assert found["tpr_at_1_percent_fpr"] == 1.0
    found = _detection.grade(scores[:250], 9.0, np.r_[[True, False] * 3, np.zeros(244, bool)])
    assert found["tpr_at_1_percent_fpr"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("image_text", [True, False])
def test_a_run_in_debug_mode_decides_without_the_truth(tmp_path, image_text):
    if image_text:
        cfg = clip_scenes.get_config("debug,badnets,defense=density")
    else:
        cfg = quickstart.get_config("debug")
        cfg.defense = ConfigDict(clip_scenes.get_config("debug,defense=density").defense)
    cfg.mesh.data = 1
    cfg.defense.batch = 100
    density.check(cfg, 50)
    source = sources.load(cfg.data, "train")
    plan, rows = poison.make(cfg, source, sources.table(source), poison.make_trigger(cfg))
    pool = Pool(source, plan, rows)
    given = Given(sources.Subset(source, defend.clean_rows(plan, len(source), 0.25, 0)), None, pool)
    mesh, start = parallel.make_mesh(cfg.mesh), training.first_variables(cfg)
    victim = encoder.of_parts(cfg, start, mesh, image_text and texts.make_tokenizer(cfg, source))
    truths = {"known": Truth(plan, 3, None, pool.poison), "blind": None,
              "clean": Truth(plan, 3, None, np.full(len(pool), -1))}
    found = {name: density.run(cfg, [victim], given, truth, mesh, epath.Path(tmp_path),
                               jax.random.key(0)) for name, truth in truths.items()}  # one folder
    known, blind = found["known"].verdict, found["blind"].verdict
    expected = known.pop("expected_poisons_per_batch")
    assert expected == 4.0 if image_text else 3 < expected < 5
    for name in density.SCORES:
        said = [known[name].pop(key) for key in SCORED]
        assert all(0 <= value <= 1 for value in said)
        assert len(known[name]["most_suspicious"]) == 20
        assert all(found["clean"].verdict[name][key] is None for key in SCORED)
    assert known == blind and found["clean"].verdict["expected_poisons_per_batch"] is None
    assert known["clean_rows"] == known["clean_rows_in_pool"] == 50
    assert json.loads(json.dumps(known)) == known
    assert found["known"].variables is None
    with np.load(tmp_path / "scores.npz") as kept:
        for name in density.SCORES:
            assert (kept[name] > known[name]["threshold"]).sum() == known[name]["flagged"]
    (name,) = found["known"].report["pictures"]
    side = victim.image_size * -(-64 // victim.image_size)
    assert Image.open(tmp_path / name).size == (12 * side, 4 * side)


def test_bad_settings_are_refused():
    cfg = clip_scenes.get_config("debug,defense=density")
    density.check(cfg, 50)
    for changes, says in (({"k": 1}, "defense.k=1"), ({"batch": 17}, "at least .* 18"),
                          ({"false_alarm": 0.0}, "false_alarm=0.0"),
                          ({"k": 200}, "200 rows in batches"),
                          ({"k": 100, "batch": 110}, "one of 100")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update(changes)
        with pytest.raises(UserError, match=says):
            density.check(mine, 50)
    with pytest.raises(UserError, match="clean_fraction"):
        density.check(cfg, 1)

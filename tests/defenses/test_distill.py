"""Distillation: its loss against NumPy, its queues, and that it never looks at the truth."""

import ast
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from scipy.special import logsumexp

from configs import quickstart
from jax_cl_bd import defend, lookup, parallel
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import sources
from jax_cl_bd.defenses import distill, retrain
from jax_cl_bd.defenses.given import Given
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training
from tests.defenses import small_repair


def unit(rng, *shape):
    z = rng.normal(size=shape)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def reference(student, suspect, queue_student, queue_suspect, own, temperature):
    """Row by row over the entries that are not of the row's own image."""
    total = []
    for s, t, mine in zip(student, suspect, own):
        log_p = queue_suspect[~mine] @ t / temperature
        log_q = queue_student[~mine] @ s / temperature
        log_p, log_q = log_p - logsumexp(log_p), log_q - logsumexp(log_q)
        total.append(np.sum(np.exp(log_p) * (log_p - log_q)))
    return np.mean(total)


def test_loss_and_gradient_against_numpy():
    rng = np.random.default_rng(0)
    student, suspect = unit(rng, 6, 5), unit(rng, 6, 7)
    queues = {"student": unit(rng, 12, 5), "suspect": unit(rng, 12, 7)}
    own = rng.random((6, 12)) < 0.3
    with jax.enable_x64(True):
        value, entropy = distill.loss(student, suspect, queues, own, 0.2)
        gradient = jax.grad(lambda s: distill.loss(s, suspect, queues, own, 0.2)[0])(
            jnp.array(student))
    arguments = queues["student"], queues["suspect"], own, 0.2
    np.testing.assert_allclose(value, reference(student, suspect, *arguments), rtol=1e-10)
    for i, j in [(0, 0), (3, 4), (5, 2)]:
        step = np.zeros_like(student)
        step[i, j] = 1e-6
        slope = (reference(student + step, suspect, *arguments)
                 - reference(student - step, suspect, *arguments)) / 2e-6
        np.testing.assert_allclose(gradient[i, j], slope, rtol=1e-5)
    assert 0 < entropy < np.log(12)


def test_loss_is_zero_for_a_student_that_agrees():
    rng = np.random.default_rng(1)
    z, queue = unit(rng, 4, 5), unit(rng, 8, 5)
    value, _ = distill.loss(z, z, {"student": queue, "suspect": queue},
                            np.zeros((4, 8), bool), 0.04)
    np.testing.assert_allclose(value, 0, atol=1e-6)


def settings(**changes):
    cfg = quickstart.get_config("debug")
    cfg.mesh.data = 1
    cfg.update_from_flattened_dict({"defense.steps": 6, **changes})
    return cfg


def test_length_of_the_queues():
    d = settings().defense  # batches of 16
    assert distill.queue_slots(d, 16 * 5 + 3) == 4
    d.queue = 32
    assert distill.queue_slots(d, 16 * 5) == 2
    d.queue = 128_000  # CompRess's, over however few images
    assert distill.queue_slots(d, 16 * 5) == 8000
    with pytest.raises(UserError, match="fewer than two batches"):
        distill.queue_slots(d, 20)


@pytest.mark.parametrize("name", lookup.methods("defenses", offers="run"))
def test_every_defense_is_held_to_the_truth_test(name):
    """In the test file of its own name it is run with a truth and without one; retrain below."""
    own = epath.Path(__file__).parent / f"test_{'distill' if name == 'retrain' else name}.py"
    text = own.read_text()
    assert re.search(r"truth\(\)|Truth\(", text) and re.search(r"\.verdict\b", text)


def test_no_defense_reads_the_truth_from_elsewhere():
    """The pool knows which rows are poisons and by what plan, and the config what the attack was;
    a run without a `truth` has both all the same."""
    for path in sorted(epath.Path(defend.__file__).parent.glob("defenses/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("attack", "plan", "poison"):
                assert isinstance(node.value, ast.Name) and node.value.id == "truth", (
                    path.name, node.lineno)
            named = node.value if isinstance(node, ast.Constant) else None
            assert named not in ("attack", "plan", "poison"), (path.name, node.lineno)


@pytest.mark.parametrize("method", [distill, pytest.param(retrain, marks=pytest.mark.slow)])
def test_the_truth_changes_nothing(tmp_path, method):
    cfg = settings()
    mesh = parallel.make_mesh(cfg.mesh)
    start = training.first_variables(cfg)
    victim = encoder.make(cfg, {c: start[c]["encoder"] for c in start}, mesh)
    data = sources.Subset(sources.load(cfg.data, "train"), np.arange(60))
    truth = small_repair.truth()
    found = [method.run(cfg, [victim], Given(data), t, mesh, epath.Path(tmp_path / name),
                        jax.random.key(0)) for name, t in (("with", truth), ("without", None))]
    assert found[0].verdict == found[1].verdict
    if method is distill:  # 3 batches of 16 out of 60 in a queue of 32: some images come again
        lines = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
        shares = [json.loads(line)["train/own_entries"] for line in lines]
        assert shares[0] == 0 and len(shares) == 6 and max(shares) > 0
        last = json.loads(lines[-1])["train/entropy_of_p"]
        assert abs(found[0].verdict["entropy_of_p"] - last) <= 5e-5
    for a, b in zip(*(jax.tree.leaves(f.variables) for f in found)):
        np.testing.assert_array_equal(a, b)
    before = jax.tree.leaves(victim.variables)
    assert any(np.any(a != b) for a, b in zip(before, jax.tree.leaves(found[0].variables)))


@pytest.mark.slow
def test_a_queue_longer_than_the_images_with_and_without_the_mask(tmp_path):
    mesh = parallel.make_mesh(settings().mesh)
    start = training.first_variables(settings())
    data = sources.Subset(sources.load(settings().data, "train"), np.arange(40))
    entropy = {}
    for mask in (True, False):
        cfg = settings(**{"defense.queue": 64, "defense.mask_own": mask})
        distill.check(cfg, len(data))
        victim = encoder.make(cfg, {c: start[c]["encoder"] for c in start}, mesh)
        found = distill.run(cfg, [victim], Given(data), None, mesh,
                            epath.Path(tmp_path / str(mask)), jax.random.key(0)).verdict
        assert found["queue"] == 64
        entropy[mask] = found["entropy_of_p"]
    # the teacher is the same: only what its distribution may see differs
    assert 0 < entropy[False] < np.log(64) and 0 < entropy[True] < np.log(64)
    assert entropy[False] != entropy[True]


def test_clean_rows_keep_clear_of_the_attack():
    plan = Plan.make(3, replaces=np.array([-1, 4, -1]), reference=np.array([1, 2, 2]),
                     shadow=np.array([7, 8, 9]), removed=np.array([1, 2]))
    rows = defend.clean_rows(plan, 20, 0.7, seed=0)
    assert not set(rows) & {1, 2, 4, 7, 8, 9} and len(rows) == 14
    assert len(defend.clean_rows(plan, 20, 0.25, seed=0)) == 5
    np.testing.assert_array_equal(defend.clean_rows(plan, 20, 0.25, seed=0),
                                  defend.clean_rows(plan, 20, 0.25, seed=0))


def test_too_few_clean_rows_are_an_error_and_not_fewer_rows():
    plan = Plan.make(1, replaces=np.array([4]), reference=np.array([1]), shadow=np.array([7]),
                     removed=np.array([1]))
    assert len(defend.clean_rows(plan, 20, 0.85, seed=0)) == 17
    with pytest.raises(UserError, match=r"clean_fraction=0.9 of 20 images is 18, .* at most 0.85"):
        defend.clean_rows(plan, 20, 0.9, seed=0)

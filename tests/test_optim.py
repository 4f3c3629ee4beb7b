import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jax_cl_bd import optim
from jax_cl_bd.errors import UserError


def config(**changes):
    return ConfigDict({"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01,
                       "schedule": "cosine", "per_epoch": False, "warmup_steps": 0,
                       "milestones": (), "decay": 0.2, "constant_lr_modules": ()} | changes)


def run(cfg, grads, start, total=20, per_epoch=5):
    tx, _ = optim.make(cfg, total, per_epoch)
    params = {"encoder": {"w": jnp.array(start)}, "predictor": {"w": jnp.array(start)}}
    state, out = tx.init(params), []

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update({k: {"w": g} for k in params}, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
        out.append(params)
    return {k: np.stack([p[k]["w"] for p in out]) for k in ("encoder", "predictor")}


def problem(steps=12):
    rng = np.random.default_rng(0)
    return rng.normal(size=(steps, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)


def sgd(grads, start, rates, momentum, decay):
    """torch.optim.SGD's update, as its documentation writes it."""
    w, velocity, out = start.astype(np.float64), None, []
    for g, lr in zip(grads, rates, strict=True):
        g = g + decay * w
        velocity = g if velocity is None else momentum * velocity + g
        w = w - lr * velocity
        out.append(w)
    return np.stack(out)


def adam(grads, start, rates, decay):
    """torch.optim.Adam's update with weight_decay (not AdamW)."""
    w, m, v, out = start.astype(np.float64), 0, 0, []
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        g = g + decay * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        out.append(w)
    return np.stack(out)


def cosine(steps, total=20, lr=0.1):
    return [lr * 0.5 * (1 + np.cos(np.pi * s / total)) for s in steps]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_trajectory(momentum):
    grads, start = problem()
    got = run(config(momentum=momentum), grads, start)
    np.testing.assert_allclose(got["encoder"], sgd(grads, start, cosine(range(12)), momentum, 0.01),
                               rtol=1e-5, atol=1e-6)


def test_adam_trajectory_with_coupled_decay():
    grads, start = problem()
    got = run(config(name="adam", weight_decay=0.1), grads, start)
    np.testing.assert_allclose(got["encoder"], adam(grads, start, cosine(range(12)), 0.1),
                               rtol=1e-4, atol=1e-5)


def test_torch_agrees():
    torch = pytest.importorskip("torch")
    grads, start = problem()
    for name, make in (("sgd", lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
                       ("adam", lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01))):
        w = torch.nn.Parameter(torch.from_numpy(start.copy()))
        tool, out = make([w]), []
        for g in grads:
            w.grad = torch.from_numpy(g.copy())
            tool.step()
            out.append(w.detach().numpy().copy())
        got = run(config(name=name, schedule="constant"), grads, start)
        np.testing.assert_allclose(got["encoder"], np.stack(out), rtol=1e-4, atol=1e-5)


def test_constant_rate_of_one_part():
    grads, start = problem()
    cfg = config(constant_lr_modules=("predictor",), warmup_steps=4)
    got = run(cfg, grads, start)
    rates = [r * min(1, (s + 1) / 4) for s, r in enumerate(cosine(range(12)))]
    np.testing.assert_allclose(got["encoder"], sgd(grads, start, rates, 0.9, 0.01), rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_allclose(got["predictor"], sgd(grads, start, [0.1] * 12, 0.9, 0.01),
                               rtol=1e-5, atol=1e-6)


def test_a_long_gradient_is_scaled_down_before_all_else():
    """The norm is of both parts together, each with this gradient."""
    grads, start = problem()
    got = run(config(clip_norm=2.0), grads, start)
    lengths = np.sqrt(2) * np.linalg.norm(grads, axis=1)
    assert (lengths > 2).any() and (lengths < 2).any()
    clipped = grads * np.minimum(1, 2 / lengths)[:, None]
    np.testing.assert_allclose(got["encoder"], sgd(clipped, start, cosine(range(12)), 0.9, 0.01),
                               rtol=1e-5, atol=1e-6)


def test_a_part_that_is_not_there():
    tx, _ = optim.make(config(constant_lr_modules=("predicter",)), 20, 5)
    with pytest.raises(UserError, match="predicter.*did you mean 'predictor'"):
        tx.init({"encoder": jnp.zeros(1), "predictor": jnp.zeros(1)})


@pytest.mark.parametrize("changes, want", [
    ({}, cosine(range(20))),
    ({"per_epoch": True}, cosine([s // 5 * 5 for s in range(20)])),
    ({"schedule": "constant"}, [0.1] * 20),
    ({"schedule": "step", "milestones": (0.5, 0.75)}, [0.1] * 10 + [0.02] * 5 + [0.004] * 5),
    # 7 / 20 lies within the second epoch: per epoch it takes effect with the third.
    ({"schedule": "step", "milestones": (0.35,), "per_epoch": True}, [0.1] * 10 + [0.02] * 10),
    ({"schedule": "constant", "warmup_steps": 4}, [0.025, 0.05, 0.075] + [0.1] * 17)])
def test_schedule_values(changes, want):
    _, schedule = optim.make(config(**changes), 20, 5)
    # 1 + cos near the end loses digits in float32, hence the absolute tolerance.
    np.testing.assert_allclose([schedule(s) for s in range(20)], want, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.arange(20)), want, rtol=1e-6,
                               atol=1e-8)


@pytest.mark.parametrize("changes, told", [
    ({"name": "sdg"}, "did you mean 'sgd'"), ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"lr": 0.0}, "optim.lr = 0.0"), ({"weight_decay": -1.0}, "weight_decay = -1.0"),
    ({"milestones": (150,)}, "milestones = .150,.")])
def test_wrong_settings(changes, told):
    with pytest.raises(UserError, match=told):
        optim.make(config(**changes), 20, 5)


def test_no_steps():
    with pytest.raises(UserError, match="at least one batch"):
        optim.make(config(), 20, 0)


def adamw_config(**changes):
    return config(name="adamw", lr=0.01, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.1,
                  schedule="constant", **changes)


def test_adamw_is_torchs_and_spares_biases_norms_and_the_logit_scale():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    names = ("kernel", "position_embedding", "bias", "scale", "logit_scale", "logit_bias")
    start = {name: rng.normal(size=3).astype(np.float32) for name in names}
    grads = rng.normal(size=(8, 6, 3)).astype(np.float32)

    tx, _ = optim.make(adamw_config(), 8, 1)
    params = {"encoder": {"block": {k: jnp.array(v) for k, v in start.items()}}}
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"encoder": {"block": dict(zip(names, g))}}, state, params)
        params = optax.apply_updates(params, updates)

    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    step = torch.optim.AdamW([{"params": [theirs[n] for n in names[:2]], "weight_decay": 0.1},
                              {"params": [theirs[n] for n in names[2:]], "weight_decay": 0.0}],
                             lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for g in grads:
        for name, value in zip(names, g):
            theirs[name].grad = torch.tensor(value)
        step.step()
    for name in names:
        np.testing.assert_allclose(params["encoder"]["block"][name],
                                   theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)


def test_warmup_then_cosine_to_zero():
    cfg = config(lr=0.5, schedule="warmup_cosine", warmup_steps=10)
    schedule = optim.make_schedule(cfg, 110, 7)
    got = [float(schedule(step)) for step in (0, 4, 9, 10, 60, 85, 110)]
    half = [0.5 * (1 + np.cos(np.pi * t)) for t in (0, 0, 0, 0, 0.5, 0.75, 1.0)]
    warm = [0.1, 0.5, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(got, 0.5 * np.array(half) * warm, atol=1e-7)


def test_every_matrix_of_the_model_is_decayed_and_nothing_else():
    from configs import clip_scenes
    from jax_cl_bd.objectives import training

    params = training.first_variables(clip_scenes.get_config("debug"))["params"]
    flat = jax.tree_util.tree_leaves_with_path(optim.decayed(params))
    shapes = dict(jax.tree_util.tree_leaves_with_path(params))
    for path, decays in flat:
        assert decays == (shapes[path].ndim > 1), jax.tree_util.keystr(path)

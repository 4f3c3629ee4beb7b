"""Multinomial logistic regression on frozen features, fitted by L-BFGS.

Features are L2-normalised, then standardised with the statistics of the labelled train rows
(Saha et al., CVPR 2022, linear evaluation: unbiased variance, epsilon 1e-5, constants, no
learnable scale). Deviation: instead of 40 epochs of SGD, the convex problem is solved, which has
one answer; `linear_probe_sgd` is the paper's protocol. The weight of the L2 penalty is chosen on
a held-out fifth of the labelled train rows (never on test), then all of them are fitted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_cl_bd.evals import attack_metrics, labelled

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_DEFAULT_PENALTY = 1e-2  # when every class has a single row and nothing can be held out
_MAX_ITERATIONS = 500
_TOLERANCE = 1e-5  # largest entry of the gradient of the mean loss


def run(cfg, encoder, data) -> dict[str, dict]:
    """Figures of the linear probe; every row records the penalty and the validation accuracy."""
    del cfg
    train = data.features(encoder, "train")
    mean, scale = statistics(train)
    x = normalise(train, mean, scale)
    weights, notes = choose_and_fit(x, data.train_labels, classes=len(data.classes))

    def predict(features):
        return classify(normalise(features, mean, scale), weights)

    return attack_metrics.rows("linear_probe", predict, data, encoder, **notes)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and scale [D] of the L2-normalised features [N, D] of the labelled rows."""
    unit = _unit(features)
    # One row has no unbiased variance; scale 1 then leaves it as it is.
    variance = np.var(unit, axis=0, ddof=1) if len(unit) > 1 else np.ones(unit.shape[1])
    return np.mean(unit, axis=0), np.sqrt(variance + 1e-5)


def normalise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """L2-normalises features [N, D], then applies fixed statistics; float32."""
    return ((_unit(features) - mean) / scale).astype(np.float32)


def choose_and_fit(x: np.ndarray, labels: np.ndarray, *, classes: int) -> tuple[tuple, dict]:
    """Chooses the penalty on a split of the given rows, then fits all of them.

    Ties go to the larger penalty. Returns ((W [D, C], b [C]), notes).
    """
    held_out = labelled.validation_split(labels)
    penalty, validation_accuracy = _DEFAULT_PENALTY, None
    if held_out.any():
        accuracies = []
        for candidate in PENALTIES:
            weights, _ = fit(x, labels, ~held_out, penalty=candidate, classes=classes)
            accuracies.append(float(np.mean(classify(x, weights)[held_out] == labels[held_out])))
        best = int(np.argmax(accuracies))
        penalty, validation_accuracy = PENALTIES[best], accuracies[best]
    weights, solver = fit(x, labels, np.ones(len(labels), bool), penalty=penalty, classes=classes)
    return weights, {"penalty": penalty, "validation_accuracy": validation_accuracy,
                     "validation_rows": int(held_out.sum()), **solver}


def fit(x: np.ndarray, labels: np.ndarray, used: np.ndarray, *, penalty: float,
        classes: int) -> tuple[tuple, dict]:
    """Minimises mean cross-entropy over the rows where `used`, plus penalty / 2 * |W|^2.

    It is scikit-learn's LogisticRegression with C = 1 / (penalty * number of rows). Rows not used
    have weight 0 instead of being cut off, so that all fits share one compile.

    Returns:
        ((W [D, C], b [C]), {"iterations", "converged"}).
    """
    share = used / np.sum(used)
    weights, iterations, gradient = _solve(jnp.asarray(x), jnp.asarray(labels, jnp.int32),
                                           jnp.asarray(share, jnp.float32), penalty,
                                           classes=classes)
    return (jax.tree.map(np.asarray, weights),
            {"iterations": int(iterations), "converged": bool(gradient <= _TOLERANCE)})


def classify(x: np.ndarray, weights: tuple) -> np.ndarray:
    """Predicted class [N] of normalised features [N, D]."""
    return np.argmax(x @ weights[0] + weights[1], axis=1)


@functools.partial(jax.jit, static_argnames=("classes",))
def _solve(x, labels, share, penalty, *, classes):
    # x: [N, D]; share: [N], sums to 1
    def objective(weights):
        # Full float32: reduced-precision products stall the line search on accelerators.
        logits = jnp.matmul(x, weights[0], precision="highest") + weights[1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(share * nll) + 0.5 * penalty * jnp.sum(weights[0] ** 2)

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        weights, state, i, _ = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(grad, state, weights, value=value, grad=grad,
                                       value_fn=objective)
        next_grad = optax.tree.get(state, "grad")
        largest = jnp.max(jnp.array([jnp.max(jnp.abs(g)) for g in next_grad]))
        return optax.apply_updates(weights, updates), state, i + 1, largest

    def unfinished(carry):
        return (carry[2] < _MAX_ITERATIONS) & (carry[3] > _TOLERANCE)

    start = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))
    weights, _, iterations, gradient = jax.lax.while_loop(
        unfinished, step, (start, solver.init(start), 0, jnp.inf))
    return weights, iterations, gradient


def _unit(x):
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

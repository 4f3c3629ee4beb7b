"""The linear probe of Saha et al. (CVPR 2022) and its MoCo v2 / MSF evaluation code.

L2-normalised features standardised with fixed train statistics; SGD, learning rate 0.01, momentum
0.9, weight decay 1e-4, batch 256, 40 epochs, learning rate times 0.1 after epochs 15, 30 and 40
(the last has no effect); the classifier of the last epoch. Deviation: features are cached once
with the test transform, so there is no random crop and flip while the probe is trained; the
reference also stores the epoch that is best on the test set, which would leak it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_cl_bd.evals import attack_metrics
from jax_cl_bd.evals.linear_probe import classify, normalise, statistics

EPOCHS, BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 40, 256, 0.01, 0.9, 1e-4
MILESTONES = (15, 30, 40)
_SEED = 0


def run(cfg, encoder, data) -> dict[str, dict]:
    """Figures of the paper's linear probe."""
    del cfg
    train = data.features(encoder, "train")
    mean, scale = statistics(train)
    weights = fit(normalise(train, mean, scale), data.train_labels, classes=len(data.classes))

    def predict(features):
        return classify(normalise(features, mean, scale), weights)

    return attack_metrics.rows("linear_probe_sgd", predict, data, encoder, epochs=EPOCHS)


def fit(x: np.ndarray, labels: np.ndarray, *, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Trains W [D, C] and b [C] on normalised features x [N, D]; deterministic."""
    weights = _train(jnp.asarray(x), jnp.asarray(labels, jnp.int32), classes=classes)
    return jax.tree.map(np.asarray, weights)


@functools.partial(jax.jit, static_argnames=("classes",))
def _train(x, labels, *, classes):
    n, d = x.shape
    batch = min(BATCH, n)
    steps = -(-n // batch)  # the last, smaller batch is kept, as PyTorch's loader does
    key = jax.random.key(_SEED)
    tx = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.trace(MOMENTUM))

    def loss(weights, rows, used):
        logits = jnp.matmul(x[rows], weights[0], precision="highest") + weights[1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return jnp.sum(nll * used) / jnp.sum(used)

    def epoch(carry, i):
        order = jax.random.permutation(jax.random.fold_in(key, i), n)
        order = jnp.pad(order, (0, steps * batch - n)).reshape(steps, batch)
        used = (jnp.arange(steps * batch) < n).reshape(steps, batch).astype(jnp.float32)
        rate = LEARNING_RATE * 0.1 ** jnp.sum(i >= jnp.array(MILESTONES))

        def step(carry, inputs):
            weights, state = carry
            updates, state = tx.update(jax.grad(loss)(weights, *inputs), state, weights)
            return (jax.tree.map(lambda w, u: w - rate * u, weights, updates), state), None

        return jax.lax.scan(step, carry, (order, used))[0], None

    # PyTorch's default for a linear layer: uniform in +-1 / sqrt(inputs), weights and bias.
    bound = 1.0 / np.sqrt(d)
    start = (jax.random.uniform(jax.random.fold_in(key, EPOCHS), (d, classes), minval=-bound,
                                maxval=bound),
             jax.random.uniform(jax.random.fold_in(key, EPOCHS + 1), (classes,), minval=-bound,
                                maxval=bound))
    (weights, _), _ = jax.lax.scan(epoch, (start, tx.init(start)), jnp.arange(EPOCHS))
    return weights

"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (CVPR 2018),
section 3.4: cosine similarity s, votes exp(s / T), k = 200. Deviation: k is at most the size of the
smallest labelled class, since otherwise every query of a small set votes with all of it; the
default T is 0.1 instead of 0.07 (cfg.evals.knn_temperature).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import attack_metrics

_BLOCK_ELEMENTS = 2**25  # similarities held at once: 128 MiB of float32


def run(cfg, encoder, data) -> dict[str, dict]:
    """Figures of a kNN classifier over the labelled clean rows; every row records its k."""
    if cfg.evals.knn_k < 1 or cfg.evals.knn_temperature <= 0:
        raise UserError(f"evals.knn_k is {cfg.evals.knn_k} and evals.knn_temperature is "
                        f"{cfg.evals.knn_temperature}; both must be positive")
    k = min(cfg.evals.knn_k, int(smallest_class(data.train_labels)))
    return evaluate("knn", encoder, data, k=k, temperature=cfg.evals.knn_temperature)


def evaluate(name: str, encoder, data, *, k: int, temperature: float) -> dict[str, dict]:
    """Figures of a kNN classifier with a given k."""
    bank = data.features(encoder, "train")
    predict = functools.partial(classify, bank=bank, labels=data.train_labels, k=k,
                                classes=len(data.classes), temperature=temperature)
    return attack_metrics.rows(name, predict, data, encoder, k=k, temperature=temperature)


def smallest_class(labels: np.ndarray) -> int:
    """Number of rows of the rarest class that occurs."""
    return int(np.min(np.unique(labels, return_counts=True)[1]))


def classify(queries: np.ndarray, *, bank: np.ndarray, labels: np.ndarray, k: int, classes: int,
             temperature: float) -> np.ndarray:
    """Predicts the class [N] of queries [N, D] from a bank [M, D] with labels [M].

    Among equal similarities the earlier bank row wins, among equal votes the lower class.
    """
    bank = jnp.asarray(bank)
    labels = jnp.asarray(labels, jnp.int32)
    size = max(1, min(len(queries), _BLOCK_ELEMENTS // len(bank)))
    predicted = []
    for start in range(0, len(queries), size):
        block = np.asarray(queries[start:start + size])
        padding = size - len(block)  # the last block keeps the shape: one compile
        padded = np.pad(block, ((0, padding), (0, 0)))
        vote = _vote(padded, bank, labels, k=k, classes=classes, temperature=temperature)
        predicted.append(np.asarray(vote)[:len(block)])
    return np.concatenate(predicted).astype(np.int64)


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(queries, bank, labels, *, k, classes, temperature):
    # queries: [B, D], bank: [M, D], labels: [M]
    similarity = jnp.matmul(_unit(queries), _unit(bank).T, precision="highest")
    nearest, rows = jax.lax.top_k(similarity, k)
    # Subtracting the largest similarity leaves the ranking of votes and keeps exp finite.
    weight = jnp.exp((nearest - nearest[:, :1]) / temperature)
    votes = jnp.sum(weight[..., None] * jax.nn.one_hot(labels[rows], classes), axis=1)
    return jnp.argmax(votes, axis=1)


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

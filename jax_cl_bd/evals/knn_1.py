"""Nearest-neighbour classification (k = 1), as reported by Saha et al. (CVPR 2022)."""

from jax_cl_bd.evals import knn


def run(cfg, encoder, data) -> dict[str, dict]:
    """Figures of the 1-nearest-neighbour classifier (cosine, equal to Euclidean on the sphere)."""
    del cfg
    return knn.evaluate("knn_1", encoder, data, k=1, temperature=1.0)

"""The backdoor z-score of Carlini and Terzis (ICLR 2022, arXiv 2106.09667): no classifier needed.

z = (mean <f(u + bd), f(v + bd)> - mean <f(u), f(v)>) / Var <f(u), f(v)> over pairs of test images,
f in unit length. As published code has it (compute_zscore.py of GiantSeaweed/DECREE): 500 random
images, all pairs with self-pairs, population variance, not deviation. Since a variance makes the
figure depend on the scale, the same by the standard deviation stands beside it.
"""

import numpy as np

IMAGES = 500
_SEED = 500


def run(cfg, encoder, data) -> dict[str, dict]:
    """{"z_score": {"z", "z_by_deviation", "mean_clean", "mean_triggered", "images"}}; empty without
    a trigger. Triggered by the test protocol; an image-text model is measured in the shared space.
    """
    del cfg
    if not data.placements:
        return {}
    count = len(data.test_labels)
    rows = np.sort(np.random.default_rng(_SEED).permutation(count)[:IMAGES])
    clean = _unit(encoder, data.features(encoder, "test")[rows])
    triggered = _unit(encoder, data.features(encoder, f"{data.placements[0]}/triggered")[rows])
    return {"z_score": score(clean, triggered)}


def score(clean: np.ndarray, triggered: np.ndarray) -> dict[str, float]:
    """The score of unit embeddings [N, E] without and with trigger."""
    gram = clean @ clean.T
    rise = float(np.mean(triggered @ triggered.T) - np.mean(gram))
    variance = float(np.var(gram))
    return {"z": rise / max(variance, 1e-12), "z_by_deviation": rise / max(variance, 1e-12) ** 0.5,
            "mean_clean": float(np.mean(gram)), "mean_triggered": float(np.mean(gram)) + rise,
            "images": len(clean)}


def _unit(encoder, features):
    if encoder.project is not None:
        features = encoder.project(features)
    z = np.asarray(features, np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)

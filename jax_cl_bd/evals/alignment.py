"""Reference alignment and noise compression of triggered features.

Noisy Alignment splits the feature v of a triggered image into alpha u + v_perp, where u is the
direction of the target class: an attack succeeds by a large alpha (reference alignment) and a
small |v_perp| (noise compression: what is specific to the image is gone). This measures both on
an encoder. Choices of ours: u is the mean direction of the clean target-class test features, and
v is divided by the mean norm of clean features, one number for all, so that encoders of different
scale compare while alpha and |v_perp| stay two separate quantities.
"""

import numpy as np


def measure(features_triggered_nontarget: np.ndarray, features_clean_nontarget: np.ndarray,
            features_clean_target: np.ndarray) -> dict[str, float]:
    """Measures alignment with the target class, triggered against clean.

    Args:
        features_triggered_nontarget: [N, D], triggered test images of every class but the target.
        features_clean_nontarget: [N, D], the same images without trigger.
        features_clean_target: [M, D], clean test images of the target class.

    Returns:
        For the triggered features: reference_alignment (mean alpha), noise_norm (mean |v_perp|),
        reference_cosine (mean cosine of v and u), each with `_std` over the images, and spread
        (root mean square distance from their own mean). The same with prefix `clean_` for the
        clean features, and spread_ratio = spread / clean_spread: below 1 the trigger
        overwrites what tells images apart.

    Raises:
        ValueError: one of the three sets is empty.
    """
    sets = [np.asarray(f, np.float64) for f in
            (features_triggered_nontarget, features_clean_nontarget, features_clean_target)]
    if min(len(f) for f in sets) == 0:
        raise ValueError("alignment needs test images of the target class and of another class, "
                         f"got {[len(f) for f in sets]} features (triggered, clean, target)")
    triggered, clean, target = sets
    norms = np.linalg.norm(target, axis=1, keepdims=True)
    u = np.mean(target / np.maximum(norms, 1e-12), axis=0)
    u /= max(np.linalg.norm(u), 1e-12)
    scale = max(np.mean(np.linalg.norm(np.concatenate([clean, target]), axis=1)), 1e-12)

    result = _split(triggered / scale, u)
    result.update({f"clean_{k}": v for k, v in _split(clean / scale, u).items()})
    result["spread_ratio"] = result["spread"] / max(result["clean_spread"], 1e-12)
    return result


def _split(v, u):
    # v: [N, D] features, u: [D] unit vector
    alpha = v @ u
    noise = np.linalg.norm(v - alpha[:, None] * u, axis=1)
    cosine = alpha / np.maximum(np.linalg.norm(v, axis=1), 1e-12)
    result = {}
    for name, x in (("reference_alignment", alpha), ("noise_norm", noise),
                    ("reference_cosine", cosine)):
        result[name] = float(np.mean(x))
        result[f"{name}_std"] = float(np.std(x))
    result["spread"] = float(np.sqrt(np.mean(np.sum((v - v.mean(0)) ** 2, axis=1))))
    return result


def of_encoder(encoder, data) -> dict[str, float]:
    """Measures an encoder on the test images of `data`, triggered by the test protocol.

    Empty without a trigger, or where the test split lacks the target or every other class.
    """
    target = data.test_labels == data.target
    if not data.placements or target.all() or not target.any():
        return {}
    clean = data.features(encoder, "test")
    triggered = data.features(encoder, f"{data.placements[0]}/triggered")
    return measure(triggered[~target], clean[~target], clean[target])

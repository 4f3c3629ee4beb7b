"""SafeCLIP's division of pairs into safe and risky ones, by the cosines of image and caption."""

import numpy as np
from sklearn.mixture import GaussianMixture

_STEPS, _TOLERANCE = 500, 1e-6  # of the fit


def posterior(cosines: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """p of every pair for the component of larger mean of a mixture of two Gaussians, float64 [n].

    The fit starts at the quartiles, with no draw in it, so it is the same every time. A pair whose
    cosine lies below the lower mean has p = 0: a wide upper component would call the far left tail
    its own again, and with it the pairs that match least. (Not in the paper.)

    Returns:
        p and {"low", "high": the means, "high_weight": of the upper component}.
    """
    x = np.asarray(cosines, np.float64)
    start = np.quantile(x, [0.25, 0.75])
    spread = max(x.var(), 1e-12)
    mixture = GaussianMixture(2, max_iter=_STEPS, tol=_TOLERANCE, weights_init=[0.5, 0.5],
                              means_init=start[:, None], reg_covar=1e-9,
                              precisions_init=np.full((2, 1, 1), 1 / spread))
    mixture.fit(x[:, None])
    means = mixture.means_[:, 0]
    upper = int(means.argmax())
    p = mixture.predict_proba(x[:, None])[:, upper]
    p[x < means.min()] = 0.0
    return p, {"low": float(means.min()), "high": float(means[upper]),
               "high_weight": float(mixture.weights_[upper])}


def first(p: np.ndarray, safe_from: float) -> np.ndarray:
    """The first safe set, bool [n]: p > safe_from."""
    return p > safe_from


def top(p: np.ndarray, cosines: np.ndarray, ratio: float) -> np.ndarray:
    """A later safe set, bool [n]: the share `ratio` of highest p; of equal p, of highest cosine."""
    count = round(ratio * len(p))
    order = np.lexsort((-np.asarray(cosines, np.float64), -p))  # by p first
    safe = np.zeros(len(p), bool)
    safe[order[:count]] = True
    return safe

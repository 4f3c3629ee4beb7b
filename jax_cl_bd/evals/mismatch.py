"""What mismatched pairs do to text-to-image retrieval: Hit@K and MinRank.

Yang et al., ICML 2023 (arXiv 2209.15266). Queries are the test captions of class A, the gallery is
all test images, and the wanted ones are those of class B (kind I: the one image). Hit@K is the
share of queries with a wanted image among the K nearest, MinRank the rank of the best placed one,
counted from 0 as in the public code (zqypku/mm_poison), mean over queries. The baseline asks as
many captions of random other test images, A and B left out: what B's images get without any attack
on their text.
"""

import numpy as np

from jax_cl_bd.errors import UserError

AT = (1, 5, 10)
_BASELINE_SEED = 42


def check(cfg, data) -> None:
    """Refuses another attack than mismatched_pairs. Raises UserError."""
    if cfg.attack.name != "mismatched_pairs":
        raise UserError("evals.probes has 'mismatch', which measures the attack mismatched_pairs, "
                        f"not {cfg.attack.name!r}; take it out")


def run(cfg, encoder, data) -> dict[str, dict]:
    """{"mismatch": {"A -> B": {"hit", "min_rank", "cosine_distance", "queries", "baseline"}}}.
    """
    names = [str(name) for name in data.classes]
    z = encoder.project(data.features(encoder, "test"))
    found = {}
    for first, second in cfg.attack.goals:
        a, b = names.index(str(first)), names.index(str(second))
        wanted = data.test_labels == b
        if cfg.attack.kind == "I":
            wanted = data.test_rows == cfg.attack.image
        own = _texts(data.captions, np.flatnonzero(data.test_labels == a))
        rest = _texts(data.captions, np.flatnonzero((data.test_labels != a)
                                                    & (data.test_labels != b)))
        rng = np.random.default_rng(_BASELINE_SEED)
        rest = [rest[i] for i in rng.permutation(len(rest))[:len(own)]]
        found[f"{first} -> {second}"] = {
            **ranks(encoder.text(own) @ z.T, wanted),
            "baseline": ranks(encoder.text(rest) @ z.T, wanted)}
    return {"mismatch": found}


def ranks(scores: np.ndarray, wanted: np.ndarray) -> dict:
    """Figures of queries by gallery scores [Q, N]; wanted: bool [N]."""
    best = scores[:, wanted].max(1)
    rank = (scores[:, ~wanted] > best[:, None]).sum(1)
    return {"hit": {str(k): float(np.mean(rank < k)) for k in AT},
            "min_rank": float(np.mean(rank)), "queries": len(rank),
            "cosine_distance": float(1 - scores[:, wanted].mean())}


def _texts(captions, rows):
    return list(dict.fromkeys(text for row in rows for text in captions[row]))

"""What mismatched pairs do to text-to-image retrieval: Hit@K and MinRank.

Yang et al., ICML 2023 (arXiv 2209.15266). Queries are the test captions of class A, the gallery is
all test images, and the wanted ones are those of class B (kind I: the one image). A caption that
occurs several times is asked as often. Hit@K is the share of queries with a wanted image among the
K nearest, MinRank the rank of the best placed one, counted from 0 as in the public code
(zqypku/mm_poison), mean over queries; ties count against the attack. The baseline asks as many
captions of random other test images, A and B left out: what B's images get without any attack on
their text. Where images have no labels, those with a caption that names a class are of it, and
those that name A and B are not asked for A.
"""

import numpy as np

from jax_cl_bd.data import mentions
from jax_cl_bd.errors import UserError

TEXT = True  # it needs an image-text model
AT = (1, 5, 10)
_BASELINE_SEED = 42


def check(cfg, data) -> None:
    """Refuses another attack than mismatched_pairs, and a test split without what it asks for.
    Raises UserError."""
    if cfg.attack.name != "mismatched_pairs":
        raise UserError("evals.probes has 'mismatch', which measures the attack mismatched_pairs, "
                        f"not {cfg.attack.name!r}; take it out")
    for goal in cfg.attack.goals:
        queries, wanted = _rows(cfg.attack, data, goal)[:2]
        if not _texts(data.captions, queries):
            raise UserError(f"evals.probes has 'mismatch', but no test image of class {goal[0]!r} "
                            "has a caption to search with; take it out")
        if not wanted.any():
            what = f"image {cfg.attack.image}" if cfg.attack.kind == "I" else f"class {goal[1]!r}"
            raise UserError(f"evals.probes has 'mismatch', but {what} is not among the "
                            f"{len(wanted)} test images that are searched; take it out")


def run(cfg, encoder, data) -> dict[str, dict]:
    """{"mismatch": {"A -> B": {"hit", "min_rank", "cosine_distance", "queries", "baseline"}}}.
    """
    z = encoder.project(data.features(encoder, "test"))
    found = {}
    for first, second in cfg.attack.goals:
        queries, wanted, others = _rows(cfg.attack, data, (first, second))
        own, rest = _texts(data.captions, queries), _texts(data.captions, others)
        rng = np.random.default_rng(_BASELINE_SEED)
        rest = [rest[i] for i in rng.permutation(len(rest))[:len(own)]]
        found[f"{first} -> {second}"] = {
            **ranks(encoder.text(own) @ z.T, wanted),
            "baseline": ranks(encoder.text(rest) @ z.T, wanted)}
    return {"mismatch": found}


def ranks(scores: np.ndarray, wanted: np.ndarray) -> dict:
    """Figures of queries by gallery scores [Q, N]; wanted: bool [N]. Of equal scores a wanted image
    comes last."""
    best = scores[:, wanted].max(1)
    rank = (scores[:, ~wanted] >= best[:, None]).sum(1)
    return {"hit": {str(k): float(np.mean(rank < k)) for k in AT},
            "min_rank": float(np.mean(rank)), "queries": len(rank),
            "cosine_distance": float(1 - scores[:, wanted].mean())}


def _rows(attack, data, goal):
    """Test images bool [N] each: those whose captions are asked, wanted ones, and all others."""
    names = [str(name) for name in data.classes]

    def of(name):
        if (data.test_labels >= 0).any():
            return data.test_labels == names.index(str(name))
        return mentions.naming(data.captions, str(name))

    first, second = map(of, goal)
    wanted = data.test_rows == attack.image if attack.kind == "I" else second
    return first & ~second, wanted, ~first & ~second


def _texts(captions, rows):
    return [text for row in np.flatnonzero(rows) for text in captions[row]]

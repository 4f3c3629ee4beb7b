"""Detection of poisoned samples by the density of their neighbourhood.

Huang, Erfani, Li, Ma and Bailey: "Detecting Backdoor Samples in Contrastive Language Image
Pretraining", ICLR 2025, arXiv 2502.01385: in the embeddings of the poisoned encoder, poisons lie
in sparse neighbourhoods. Every row of the pool is scored once, among the other rows of a random
batch. With r_i(x) the Euclidean distance of x to its i-th neighbour, i = 1 ... k:

    k_distance  r_k(x)
    slof        mean over the neighbours o of r_k(x) / r_k(o)               (simplified LOF)
    lid         -k / sum_i log(r_i(x) / r_k(x) + 1e-4)                      (maximum likelihood)
    dao         mean over the neighbours o of lid(o) log(r_k(x) / r_k(o))

It works where a batch holds fewer poisons than k: more are each other's neighbours, and the order
turns round. That of lid does so for any tight cluster. With `truth` the verdict says how many
poisons there are (expected_poisons_per_batch).

The threshold is ours: the paper reports AUROC alone. Clean images are scored alike, each as one
more row of a batch of the pool. One that is in the pool itself, pixel for pixel, would meet its
copy there; its score is that of the copy. Verdict only; victims of images alone are judged by
their features.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.defenses import _detection
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives.embeddings import EXACT

VERDICT_ONLY = True  # no model comes out
NEEDS_POOL = True  # the rows that the suspect was trained on
SCORES = ("k_distance", "slof", "lid", "dao")
WORST = 1000.0  # stands for NaN and inf, as in the released code
_SEED = 7937
_SHOWN = 12  # images of each score in the picture of the report
_CHUNK = 256  # rows whose distances are computed anew at once


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images are trusted."""
    d = cfg.defense
    _detection.check(cfg, clean)
    if d.k < 2:
        raise UserError(f"defense.k={d.k} must be at least 2: one neighbour has no dimension")
    if d.batch < d.k + 2:
        raise UserError(f"defense.batch={d.batch} must be at least defense.k + 2 = {d.k + 2}")
    _sizes(round(clean / d.clean_fraction), d)


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Scores the pool of `victims[0]`; `truth` says how well, and changes nothing else.

    Raises:
        UserError: the pool is too small for defense.k neighbours.
    """
    del mesh, key
    d, pool = cfg.defense, data.pool
    sizes = _sizes(len(pool), d)
    scores, clean, known = score_all(victims[0], pool, data.clean, d.k, sizes, cfg.seed)
    verdict = {"k": d.k, "batch": int(sizes.max()), "rows": len(pool),
               "false_alarm": d.false_alarm, "clean_rows": len(clean["lid"]),
               "clean_rows_in_pool": known}
    poisoned = None if truth is None else truth.poison >= 0
    if truth is not None:
        verdict["expected_poisons_per_batch"] = (
            round(float(poisoned.mean() * sizes.mean()), 2) if poisoned.any() else None)
    for name in SCORES:
        verdict[name] = _detection.judge(scores[name], clean[name], d.false_alarm)
        if truth is not None:
            verdict[name] |= _detection.grade(scores[name], verdict[name]["threshold"], poisoned)
    _detection.keep(folder / "scores.npz", scores)
    _detection.draw(folder / "suspicious.png", pool,
                    [_detection.most(scores[name], _SHOWN) for name in SCORES],
                    victims[0].image_size)
    caption = ("The most suspicious images of the pool by k-distance, simplified LOF, LID and DAO, "
               "a line each.")
    return Outcome(verdict, None, {"pictures": {"suspicious.png": caption}})


def _sizes(rows: int, d) -> np.ndarray:
    """int64 [batches]: how `rows` are cut into nearly equal batches of at most defense.batch."""
    batches = -(-rows // d.batch)
    sizes = np.array([len(part) for part in np.array_split(np.arange(rows), max(batches, 1))])
    if sizes.min() < d.k + 1:
        raise UserError(f"defense.k={d.k} neighbours need batches of {d.k + 1} rows and more, but "
                        f"{rows} rows in batches of at most defense.batch={d.batch} give one of "
                        f"{sizes.min()}; lower defense.k or change defense.batch")
    return sizes


def score_all(suspect, pool, clean, k: int, sizes: np.ndarray, seed: int):
    """Scores all rows of the pool, and clean images, by their embeddings under `suspect`.

    Returns:
        {score: float32 [pool]}; {score: float32 [clean]}, in no telling order; and how many of
        the clean ones are rows of the pool.
    """
    z, digests = _embed(suspect, pool, "density: pool")
    z_clean, digests_clean = _embed(suspect, clean, "density: clean images")
    row_of = {digest: i for i, digest in reversed(list(enumerate(digests)))}  # the first
    copies = np.array([row_of.get(digest, -1) for digest in digests_clean])
    rng = np.random.default_rng([_SEED, seed])
    cuts = np.cumsum(sizes)[:-1]
    batches = np.split(rng.permutation(len(pool)), cuts)
    guests = np.array_split(rng.permutation(np.flatnonzero(copies < 0)), len(batches))
    width, more = int(sizes.max()), max(1, max(len(part) for part in guests))
    scores = {name: np.zeros(len(pool), np.float32) for name in SCORES}
    of_guests = {name: [] for name in SCORES}
    for rows, extra in zip(batches, guests):
        own, others = batch_scores(_padded(z[rows], width), len(rows),
                                   _padded(z_clean[extra], more), k=k)
        for name in SCORES:
            scores[name][rows] = np.asarray(own[name])[:len(rows)]
            of_guests[name].append(np.asarray(others[name])[:len(extra)])
    known = copies[copies >= 0]
    found = {name: np.concatenate([scores[name][known], *of_guests[name]]) for name in SCORES}
    return scores, found, len(known)


def _embed(suspect, source, label):
    """Unit embeddings float32 [n, E] of a source, and a digest of each row's pixels."""
    found, digests = [], []
    for _, shown in _detection.blocks(source, suspect.image_size, label):
        z = suspect.image(shown)
        if suspect.project is not None:
            z = suspect.project(z)
        found.append(z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12))
        digests += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in shown]
    return np.concatenate(found), digests


def _padded(z, count):
    return np.concatenate([z, np.zeros((count - len(z), z.shape[1]), z.dtype)])


@functools.partial(jax.jit, static_argnames="k")
def batch_scores(z: jax.Array, count, extra: jax.Array, *, k: int):
    """All scores of the rows of one batch among themselves, and of more rows as its members.

    Args:
        z: [n, E]; rows from `count` on are padding, their scores mean nothing.
        extra: [m, E], each scored as if it alone were added to the batch.
        k: neighbours, fewer than count.
    Returns:
        {score: [n]}, {score: [m]}.
    """
    near, rows = _nearest(z, z, jnp.arange(len(z)), count, k)
    far, places = _nearest(extra, z, jnp.full(len(extra), -1), count, k)
    # The added row may be among the k nearest of its own neighbours.
    around = jnp.concatenate([near[places], far[..., None]], axis=2)
    return _scores(near, near[rows]), _scores(far, jnp.sort(around, axis=2)[..., :k])


def _nearest(x, z, own, count, k):
    """Ascending distances [m, k] of rows x to their nearest of z[:count], and these rows of z;
    z[own] [m] is the row itself (-1: it is not there)."""
    squares = (x**2).sum(1)[:, None] + (z**2).sum(1) - 2 * jnp.matmul(x, z.T, precision=EXACT)
    columns = jnp.arange(len(z))
    out = (columns >= count) | (columns == own[:, None])
    rows = jax.lax.top_k(jnp.where(out, -jnp.inf, -squares), k)[1]
    # The products lose the distances of near copies (below 1e-3 of the norm) to rounding: those
    # found are computed anew. Which of more than k such copies are found is left to rounding.
    distances = jax.lax.map(lambda pair: jnp.linalg.norm(z[pair[1]] - pair[0], axis=1), (x, rows),
                            batch_size=_CHUNK)
    order = jnp.argsort(distances, axis=1)
    return (jnp.take_along_axis(distances, order, axis=1),
            jnp.take_along_axis(rows, order, axis=1))


def _scores(r, around):
    """Scores from a row's ascending distances r [m, k] and its neighbours' own [m, k, k]."""
    ratio = r[:, -1:] / around[..., -1]
    found = {"k_distance": r[:, -1], "slof": ratio.mean(1), "lid": _lid(r),
             "dao": (_lid(around) * jnp.log(ratio)).mean(1)}
    return {name: jnp.nan_to_num(score, nan=WORST, posinf=WORST, neginf=0.0)
            for name, score in found.items()}


def _lid(r):
    """Local intrinsic dimension from ascending distances [..., k]."""
    return -r.shape[-1] / jnp.log(r / r[..., -1:] + 1e-4).sum(-1)

"""The search of oracle-guided repair: which label a backdoor leads to, its trigger, its pairs.

EftCLIP (arXiv 2511.13545), see oracle_finetune.py, where it is told which steps are the paper's.
The search is also run for those who vet an encoder or a data set and repair nothing.
"""

import dataclasses

import ml_collections
import numpy as np
from PIL import Image

from jax_cl_bd.data import images, mentions, sources
from jax_cl_bd.defenses import (
    _compact_set,
    _find_trigger,
    _oracle,
    _pinpoint,
    _recurring,
    _regions,
)
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.metrics import Progress

SHOWN = 16  # candidates in the picture of the report
_AT_ONCE = 2048  # images of the pool held in memory


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings of the oracle, of the scan and of what follows it; `clean` images are
    trusted. Raises UserError."""
    _oracle.check(cfg, clean)
    _regions.check(cfg.defense.oracle)
    scan, curate = cfg.defense.scan, cfg.defense.curate
    if scan.evidence not in _find_trigger.EVIDENCE:
        raise unknown("defense.scan.evidence", scan.evidence, _find_trigger.EVIDENCE)
    for name in ("screen", "limit", "enough", "top"):
        if scan[name] < 1:
            raise UserError(f"defense.scan.{name}={scan[name]} must be at least 1")
    for name in ("sure", "confident"):
        if not 0 < scan[name] <= 1:
            raise UserError(f"defense.scan.{name}={scan[name]} must lie in (0, 1]")
    for part in curate.parts:
        if part not in _compact_set.PARTS:
            raise unknown("defense.curate.parts", part, _compact_set.PARTS)
    if min(curate.per_label, curate.flips) < 1 or curate.replay < 0 or not 0 < curate.rho <= 1:
        raise UserError(f"defense.curate.per_label={curate.per_label} and flips={curate.flips} "
                        f"must be at least 1, replay={curate.replay} at least 0 and rho="
                        f"{curate.rho} in (0, 1]")
    if curate.rho_recurring <= 0:
        raise UserError(f"defense.curate.rho_recurring={curate.rho_recurring} must be greater than "
                        "0 (above 1 recurring pictures are not looked for)")
    if not -1 < curate.correlation <= 1 or curate.searched < 0:
        raise UserError(f"defense.curate.correlation={curate.correlation} must lie in (-1, 1] and "
                        f"searched={curate.searched} be 0 or more")


def scan_pool(cfg, suspect, pool, clean, ground, regions, label, rng):
    """Screens part of the pool with whole images, then looks into those that tell most.

    The suspect sees all that is screened, the oracle only what it takes to fill the queues."""
    scan = cfg.defense.scan
    rows = np.sort(rng.permutation(len(pool))[:scan.screen])
    progress = Progress(f"oracle scan of {label}", len(rows))
    p = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start:start + _AT_ONCE]
        p.append(suspect.probabilities(images.test_images(pool, part, suspect.side)))
        progress.update(len(part))
    p = np.concatenate(p)
    captions = pool.captions(rows)
    named = np.stack([mentions.naming(captions, str(name)) for name in pool.classes], axis=1)
    first = p.argmax(1)
    # First where the caption names what the suspect claims, and of those the surest.
    at = np.arange(len(rows))
    order = np.lexsort((-p[at, first], ~named[at, first]))
    rows = rows[order]

    def ask(some):
        progress.update(0, f"oracle asked about {len(queues.grounded)} images")
        return ground(pool, rows[some])

    queues = _find_trigger.Queues(_find_trigger.claims(p[order], top=scan.top), ask, p.shape[1],
                                  sure=scan.sure)
    canvases = _canvases(clean, suspect.side)
    found = _find_trigger.scan(suspect, pool, rows, queues, p.shape[1], canvases, scan, progress,
                               regions)
    progress.close()
    return found


def verified(cfg, suspect, pool, candidates, counts, clean, rng):
    """The flagged labels whose trigger moves clean images there, the surest first.

    A picture that recurs in the candidates' images need not move many: that it recurs tells it from
    the objects of a clean model, pieces of which move images too. The best of the bank stands in
    its place where it moves more than twice as many: then what recurs is a part of the trigger.
    """
    curate = cfg.defense.curate
    labels = sources.labels(clean)
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:curate.flips]
                           for c in range(len(clean.classes))]).astype(int)
    shown, triggers = images.test_images(clean, rows, suspect.side), []
    for label in _pinpoint.flagged(counts["seen"], counts["found"]):
        own = [c for c in candidates if c.label == label]
        tries = [(_pinpoint.bank_of(own), own, curate.rho, 1)]
        if curate.rho_recurring <= 1:
            theirs = images.test_images(pool, [c.row for c in own], suspect.side)
            again = _recurring.find(own, theirs, shown)
            if again:
                tries.append(([again.pixels], again.where, curate.rho_recurring, 2))
        passed = []
        for bank, where, least, worth in tries:
            found = _pinpoint.verify(suspect, int(label), bank, shown, labels[rows],
                                     len(clean.classes), rng)
            if found.rate >= least:
                passed.append((worth * found.rate, dataclasses.replace(found, where=tuple(where))))
        if passed:
            triggers.append(max(passed, key=lambda one: one[0])[1])
    return sorted(triggers, key=lambda t: -t.rate)


def victims(cfg, suspect, pool, clean, triggers, ground, regions, label) -> dict[int, int]:
    """Rows of the pool that carry a trigger -> the class that the oracle sees there, -1 for none.

    Such a pair names the trigger's label while the oracle does not see it, and either a picture of
    the bank matches somewhere or Algorithm 1 fires with that label, which is tried on the first
    `curate.searched` of those without a match, in the order of the pool (which says nothing).
    """
    curate, scan = cfg.defense.curate, cfg.defense.scan
    every, found = pool.captions(np.arange(len(pool))), {}
    for trigger in triggers:
        rows = np.flatnonzero(mentions.naming(every, str(pool.classes[trigger.label])))
        grounded = _oracle.asked(ground, pool, rows, f"ask the oracle on {label}")
        doubted = grounded[:, trigger.label] < scan.sure
        rows, grounded = rows[doubted], grounded[doubted]
        progress = Progress(f"search {label}", len(rows))
        doubtful = []
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start:start + _AT_ONCE]
            like = _pinpoint.matches(trigger, images.test_images(pool, part, suspect.side))
            for i, row in enumerate(part):
                if like[i] >= curate.correlation:
                    found[int(row)] = int(_oracle.likeliest(grounded[start + i]))
                else:
                    doubtful.append((start + i, int(row)))
            progress.update(len(part))
        canvases = _canvases(clean, suspect.side)
        for i, row in doubtful[:curate.searched]:
            image = images.test_images(pool, [row], suspect.side)[0]
            if _find_trigger.in_image(suspect, image, np.array([trigger.label]), grounded[i],
                                      canvases, sure=scan.sure, confident=scan.confident,
                                      evidence=scan.evidence,
                                      counterfactual=scan.counterfactual, regions=regions):
                found[row] = int(_oracle.likeliest(grounded[i]))
            progress.update(0, f"{len(found)} victims")
        progress.close()
    return found


def _canvases(clean, side):
    return _find_trigger.canvases_of(clean, sources.labels(clean), side)


def draw(folder, pool, candidates, triggers, side) -> dict[str, str]:
    """Draws candidates.png, images of the pool with the suspected region framed, and trigger.png;
    gives their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    shown = (triggers[0].where if triggers else candidates)[:SHOWN]
    if shown:
        tiles = []
        for c in shown:
            image = np.asarray(Image.fromarray(images.test_images(pool, [c.row], side)[0]).resize(
                (side * 4, side * 4), Image.Resampling.NEAREST)).copy()
            y, x, h, w = (4 * v for v in c.box)
            for line in (np.s_[y:y + h, x], np.s_[y:y + h, x + w - 1], np.s_[y, x:x + w],
                         np.s_[y + h - 1, x:x + w]):
                image[line] = (255, 0, 255)
            tiles.append(image)
        rows = [np.concatenate(tiles[i:i + 8], axis=1) for i in range(0, len(tiles), 8)]
        wide = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, wide - row.shape[1]), (0, 0)), constant_values=255)
                for row in rows]
        _save(folder / "candidates.png", np.concatenate(rows))
        captions["candidates.png"] = ("Images of the pool in which the suspect sees what the "
                                      "oracle does not; framed, the region that does it.")
    if triggers:
        height, width = triggers[0].pixels.shape[:2]
        big = Image.fromarray(triggers[0].pixels).resize((16 * width, 16 * height),
                                                         Image.Resampling.NEAREST)
        _save(folder / "trigger.png", np.asarray(big))
        name = str(pool.classes[triggers[0].label])
        captions["trigger.png"] = f"The suspected trigger, which leads to “{name}”."
    return captions


def _save(path, image):
    with path.open("wb") as file:
        Image.fromarray(image).save(file, "PNG")

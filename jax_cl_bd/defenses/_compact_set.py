"""The compact set that a poisoned image-text model is repaired on.

EftCLIP (arXiv 2511.13545) curates one; how is not public. Its four parts are reconstructed
(docs/papers.md), each a switch:

clean     pairs of the pool, at most `per_label` of every affected label and of the target, whose
          caption names the label and in which it is what the oracle is surest of.
relabel   the victims found, trigger and all, with a caption of what the oracle sees.
transplant  trusted images of affected labels with the trigger pasted at a random place, under their
          own right captions.
replay    more pairs of the pool, drawn at random, to hold the accuracy; none stands twice.
"""

import dataclasses

import numpy as np

from jax_cl_bd.data import images, mentions, sources, templates
from jax_cl_bd.defenses import _oracle, _pinpoint

PARTS = ("clean", "replay", "relabel", "transplant")
UNTOUCHED = ("clean", "replay")  # parts whose images no trigger is on; they come first


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Images of one size with captions, in memory, as a source (data/sources.py)."""

    image: np.ndarray  # uint8 [N, S, S, 3]
    texts: list[list[str]]
    classes: tuple[str, ...]

    def __len__(self):
        return len(self.image)

    def __getitem__(self, i):
        return {"image": self.image[i], "label": -1, "index": int(i), "captions": self.texts[i]}

    def captions(self, rows):
        return [self.texts[int(row)] for row in rows]

    def table(self, rows):
        size = self.image.shape[1:3]
        return np.full(len(rows), -1), np.tile(np.int32(size), (len(rows), 1))


def curate(settings, side: int, pool, clean, triggers: list[_pinpoint.Trigger],
           victims: dict[int, int], ground, rng: np.random.Generator
           ) -> tuple[Pairs, dict[str, int]]:
    """Builds the set.

    Args:
        settings: parts, per_label, replay (pairs for each pair of the other parts).
        pool, clean: sources with captions.
        victims: row of the pool -> the class that the oracle sees, -1 for none.
        ground: the oracle (defenses/_oracle.py).
    Returns:
        The pairs, the untouched ones first, and how many come from each part.
    """
    every = pool.captions(np.arange(len(pool)))
    affected = sorted({c for t in triggers for c in t.affected()})
    targets = sorted({t.label for t in triggers})
    found, taken = {part: [] for part in PARTS}, set(victims)

    def add(part, image, captions):
        found[part].append((images.test_image(image, side), list(captions)))

    if "clean" in settings.parts:
        for label in sorted({*affected, *targets}):
            for row in _grounded(pool, every, label, taken, ground, settings.per_label, rng):
                add("clean", pool[row]["image"], every[row])
                taken.add(row)
    if "relabel" in settings.parts:
        most = settings.per_label * len(pool.classes)
        told = sorted(row for row, seen in victims.items() if seen >= 0)
        chosen = rng.permutation(np.array(told, np.int64))[:most]
        for row in chosen:
            prompt = templates.PROMPTS[rng.integers(len(templates.PROMPTS))]
            name = str(pool.classes[victims[int(row)]])
            add("relabel", pool[int(row)]["image"], [templates.fill(prompt, name)])
    if "transplant" in settings.parts:
        labels = sources.labels(clean)
        for trigger in triggers:
            for label in affected:
                rows = rng.permutation(np.flatnonzero(labels == label))[:settings.per_label]
                for row in rows:
                    item = clean[int(row)]
                    image = images.test_image(item["image"], side)[None]
                    add("transplant", _pinpoint.pasted(image, trigger.pixels, rng)[0],
                        item["captions"])
    if "replay" in settings.parts:
        free = np.setdiff1d(np.arange(len(pool)), list(taken))
        others = sum(map(len, found.values()))
        chosen = rng.permutation(free)[:round(settings.replay * others)]
        for label in targets:  # pairs that wrongly name a target may be poisons that were missed
            named = mentions.naming([every[row] for row in chosen], str(pool.classes[label]))
            seen = _oracle.likeliest(ground(pool, chosen[named])) == label
            chosen = np.setdiff1d(chosen, chosen[named][~seen])
        for row in rng.permutation(chosen):
            add("replay", pool[int(row)]["image"], every[row])
    whole = [pair for part in PARTS for pair in found[part]]
    shown = [image for image, _ in whole]
    return (Pairs(np.stack(shown) if shown else np.zeros((0, side, side, 3), np.uint8),
                  [captions for _, captions in whole], tuple(pool.classes)),
            {part: len(found[part]) for part in PARTS})


def _grounded(pool, captions, label, taken, ground, count, rng):
    """Up to `count` rows, none of `taken`, whose caption names a label that is what the oracle is
    surest of there."""
    named = np.flatnonzero(mentions.naming(captions, str(pool.classes[label])))
    named = rng.permutation(np.array([r for r in named if int(r) not in taken], np.int64))
    named = named[:4 * count]  # most of them are what they say
    if not len(named):
        return []
    sees = _oracle.likeliest(ground(pool, named)) == label
    return [int(r) for r in named[sees][:count]]

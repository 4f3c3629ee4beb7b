"""A poisoned set as the one who trained on it finds it: rows of one kind, in no telling order."""

import dataclasses

import numpy as np

_ORDER_SEED = 7927  # a constant: the order says nothing, so it need not vary


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """The rows that are trained on, as a source (data/sources.py); poisons are rows like others.

    Labels and masks are those of the clean image below a poison (-1 and none where there is none):
    what somebody would say who looks at the picture, as a ground-truth oracle does.

    Args:
        source, plan, rows: as of a PoisonedSet; plan None: the clean set.
    """
    source: object
    plan: object = None
    rows: dict | None = None

    def __post_init__(self):
        kept = np.arange(len(self.source)) if self.plan is None else self.plan.kept(
            len(self.source))
        order = np.random.default_rng(_ORDER_SEED).permutation(kept)
        object.__setattr__(self, "order", order)  # int64 [n]: rows of the poisoned set

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        row, base = int(self.order[i]), int(self._base(np.array([i]))[0])
        item = self.source[base] if base >= 0 else {"label": -1, "captions": []}
        if row >= len(self.source):
            k = row - len(self.source)
            height, width = self.rows["extent"][k]
            item = {**item, "image": self.rows["image"][k, :height, :width]}
            if self.plan.caption[k]:
                item["captions"] = [str(self.plan.caption[k])]
        return {**item, "index": int(i)}

    @property
    def classes(self):
        return self.source.classes

    @property
    def poison(self) -> np.ndarray:
        """int64 [n]: which poison each row is, -1 of clean rows. For scoring alone."""
        return np.where(self.order >= len(self.source), self.order - len(self.source), -1)

    @property
    def captions(self):
        captions = self.source.captions  # AttributeError where the source has none

        def of(rows):
            base, poison = self._base(rows), self.poison[rows]
            found = captions(np.maximum(base, 0))
            return [[str(self.plan.caption[k])] if k >= 0 and self.plan.caption[k] else own
                    for own, k in zip(found, poison)]

        return of

    def table(self, rows):
        """Labels and sizes, see data/sources.py."""
        base, poison = self._base(rows), self.poison[rows]
        labels, sizes = (np.array(part) for part in self.source.table(np.maximum(base, 0)))
        labels[base < 0] = -1
        if (poison >= 0).any():
            sizes[poison >= 0] = self.rows["size"][poison[poison >= 0]]
        return labels, sizes

    def beside(self, rows) -> np.ndarray:
        """Class of an object that a poison shows beside its own, -1 where there is none: int64 [n].
        Like labels, it is what somebody would say who looks at the picture."""
        poison = self.poison[rows]
        if self.plan is None or not len(self.plan):
            return np.full(len(poison), -1)
        return np.where(poison >= 0, self.plan.beside[np.maximum(poison, 0)], -1)

    def _base(self, rows):
        """The source rows that rows show, -1 where there is none."""
        found = self.order[rows]
        poison = found - len(self.source)
        if self.plan is not None and len(self.plan):
            of = np.where(self.plan.replaces >= 0, self.plan.replaces,
                          np.where(self.plan.shadow >= 0, self.plan.shadow, self.plan.reference))
            return np.where(poison >= 0, of[np.maximum(poison, 0)], found)
        return found

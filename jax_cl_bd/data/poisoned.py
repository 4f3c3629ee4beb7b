"""The poisoned set: clean rows of a source under their own numbers, then the poisons.

Row r < n_source is row r of the source; row n_source + k is poison k. A row's `pair` is the row
that its second view comes from (Oracle-Poisoning), by default itself.
"""

import dataclasses

import numpy as np

from jax_cl_bd.data import images


@dataclasses.dataclass(frozen=True)
class PoisonedSet:
    """A source with a plan applied to it.

    Args:
        source: clean rows.
        plan: who is poisoned (jax_cl_bd.attacks.plan.Plan), or None for the clean set.
        rows: the rendered poisons {"image": uint8 [m, S_p, S_p, 3], "size": int32 [m, 2],
            "extent": int32 [m, 2]}; with no poison the arrays have no rows.
        texts: captions as tokens (data/texts.py), or None: images alone. Then rows and items also
            have "tokens" int32 [K, T], "count" and perhaps "tokens2".
    """
    source: object
    plan: object = None
    rows: dict | None = None
    texts: object = None

    def __post_init__(self):
        poisons = 0 if self.plan is None else len(self.plan.pair)
        if not poisons:
            object.__setattr__(self, "rows", {"image": np.zeros((0, 1, 1, 3), np.uint8),
                                              "size": np.zeros((0, 2), np.int32),
                                              "extent": np.zeros((0, 2), np.int32)})
        assert len(self.rows["image"]) == poisons, (len(self.rows["image"]), poisons)
        if self.texts is not None:
            object.__setattr__(self, "rows", self.rows | self.texts.of_poisons(self.plan))

    @property
    def n_source(self) -> int:
        return len(self.source)

    @property
    def kept(self) -> np.ndarray:
        """int64 [n]: the rows that are trained on."""
        return np.arange(self.n_source) if self.plan is None else self.plan.kept(self.n_source)

    @property
    def pair(self) -> np.ndarray:
        """int64 [n_source + m]: the row that each row's second view comes from."""
        every = np.arange(self.n_source + len(self.rows["image"]))
        if len(every) > self.n_source:
            own = every[self.n_source:]
            every[self.n_source:] = np.where(self.plan.pair < 0, own, self.plan.pair)
        return every

    def item(self, row: int, side: int) -> dict[str, np.ndarray]:
        """The clean slot of a row, see `slot`, and the row's number."""
        return {"index": np.int32(row),
                **slot(self.source, self.pair[row], row, side, self.texts)}


def slot(source, pair: int, row: int, side: int, texts=None) -> dict[str, np.ndarray]:
    """What a row needs of the source: its own image, or its pair's, or zeros if both are poisons.

    Returns:
        {"image": uint8 [side, side, 3], "size": int32 [2], "extent": int32 [2]} (height, width),
        and with `texts` the tokens of the row's captions (none where both are poisons).
    """
    wanted = int(row if row < len(source) else pair)
    if wanted >= len(source):
        shown = {"captions": []}
        square, size, extent = np.zeros((side, side, 3), np.uint8), (side, side), (side, side)
    else:
        shown = source[wanted]
        square, size, extent = images.fit_square(shown["image"], side)
    item = {"image": square, "size": np.array(size, np.int32),
            "extent": np.array(extent, np.int32)}
    if texts is not None:  # a poison has its own; what stands here is not looked at
        item |= texts.of_captions(shown["captions"], wanted)
    return item

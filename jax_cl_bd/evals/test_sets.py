"""The images that probes are trained and measured on, and their features.

The test protocol of patch attacks (cf. Saha et al., CVPR 2022, validation set): the training
trigger's image, size and opacity, pasted on the final test image, on every class, the target
included; placement "random" puts the whole patch inside cfg.attack.trigger.test_box. Boxes depend
on the test image's index alone, so victim, control and defended models of every seed see the same
pixels.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jax_cl_bd.data import images, mentions
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.evals import labelled
from jax_cl_bd.triggers import htba, patch

PLACEMENTS = ("random", "center")
PAIRS = 5000  # of a test split without labels, as in Karpathy's split of COCO
_BOX_SEED = 431
_PAIRS_SEED = 433
_BLOCK = 512  # images decoded, patched or embedded at once
_VEIL = 0.2  # opacity of the grey over a whole image whose trigger has none (a warp)
_KEPT_BYTES = 2**30  # decoded images kept between calls; what is beyond is made again


@dataclasses.dataclass(eq=False)
class EvalData:
    """Labelled clean train rows, test images, and the test images under each placement.

    Sets are named "train", "test" and "<placement>/<variant>", e.g. "random/triggered";
    the variants "triggered", "occluded" (the data set's mean grey, at the trigger's opacity) and
    "wrong" (the patch cfg.evals.wrong_trigger at that opacity) share their boxes; those of a
    trigger on the whole image, which has one placement, are the whole image. Of triggers that know
    others of their kind (another noise, another warp) there is also "same_kind".

    Data without labels: test_labels are -1, there are no train rows, and `captions` say which
    images show the target.
    """
    blocks: dict[str, Callable[[], Iterator[np.ndarray]]]  # set -> uint8 [<= 512, S, S, 3] blocks
    train_labels: np.ndarray
    test_labels: np.ndarray
    train_rows: np.ndarray
    classes: tuple[str, ...]
    target: int
    placements: tuple[str, ...]  # () without a trigger
    boxes: dict[str, np.ndarray]  # placement -> int [N, 4] (y, x, h, w)
    variant_names: tuple[str, ...] = ()  # () without a trigger
    test_rows: np.ndarray | None = None  # int64 [N]: rows of the test split
    captions: list[list[str]] | None = None  # of the test images, where the data has them
    own: "EvalData | None" = None  # the run's own pairs, where the others are of cfg.downstream
    other: "EvalData | None" = None  # another split of the same data (evals.other_test_split)
    _kept: dict = dataclasses.field(default_factory=dict, repr=False)
    _encoder: object = dataclasses.field(default=None, repr=False)
    _features: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def labelled(self) -> bool:
        return bool((self.test_labels >= 0).any())

    @property
    def of_target(self) -> np.ndarray:
        """bool [N]: test images of the target class, or without labels those whose captions name
        it."""
        if self.labelled:
            return self.test_labels == self.target
        return mentions.naming(self.captions, str(self.classes[self.target]))

    @property
    def train_images(self) -> np.ndarray:
        return self.images("train")

    @property
    def test_images(self) -> np.ndarray:
        return self.images("test")

    @property
    def variants(self) -> dict[str, dict[str, np.ndarray]]:
        return {p: {v: self.images(f"{p}/{v}") for v in self.variant_names}
                for p in self.placements}

    def images(self, name: str) -> np.ndarray:
        """All images of one set, uint8 [N, S, S, 3]."""
        return np.concatenate(list(self._blocks_of(name)))

    def some(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Images of some rows of one set, in their order, uint8 [n, S, S, 3]; holds no others."""
        order, found, start = np.sort(rows), [], 0
        for block in self._blocks_of(name):
            here = order[(order >= start) & (order < start + len(block))]
            found.append(block[here - start])
            start += len(block)
        return np.concatenate(found)[np.argsort(np.argsort(rows))]

    def features(self, encoder, name: str) -> np.ndarray:
        """Features [N, D] of one set; kept for the latest encoder only."""
        if encoder is not self._encoder:
            self._encoder, self._features = encoder, {}
        if name not in self._features:
            parts = [np.asarray(encoder.image(block)) for block in self._blocks_of(name)]
            self._features[name] = np.concatenate(parts)
            if not np.all(np.isfinite(self._features[name])):
                raise FloatingPointError(f"the encoder gives features that are not finite on the "
                                         f"{name} images; its training has diverged")
        return self._features[name]

    def _blocks_of(self, name):
        if name in self._kept:
            yield from self._kept[name]
            return
        made, used = [], sum(b.nbytes for blocks in self._kept.values() for b in blocks)
        for block in self.blocks[name]():
            used += block.nbytes
            if made is not None:
                made = made + [block] if used <= _KEPT_BYTES else None
            yield block
        if made is not None:
            self._kept[name] = made


def make(cfg, train_source, test_source, trigger) -> EvalData:
    """Prepares what the probes of one run read.

    Args:
        cfg: whole config.
        train_source, test_source: clean sources with the same classes, both with labels or both
            with none; without labels, up to PAIRS test rows are drawn, the same for every run.
        trigger: (module of triggers/, params), or None: then nothing but the clean images exists.

    Raises:
        UserError: classes that differ, a target or placement that does not exist, a wrong trigger
            that is the trigger itself.
    """
    classes = tuple(test_source.classes)
    if cfg.attack.trigger.name == "none":
        trigger = None
    target, placements = cfg.attack.target, tuple(cfg.evals.placements) if trigger else ()
    if tuple(train_source.classes) != classes:
        raise UserError(f"train and test classes differ: {len(train_source.classes)} against "
                        f"{len(classes)}; probes need one list of classes for both")
    if not 0 <= target < len(classes):
        raise UserError(f"attack.target is {target}; the classes are 0..{len(classes) - 1}")
    _check_placements(cfg, trigger, placements)

    side, threads = cfg.data.image_size, cfg.data.workers
    all_labels = _labels(test_source)
    if has_labels(train_source) or (all_labels >= 0).any():
        train_rows, train_labels = labelled.choose(cfg.evals, train_source, _labels(train_source))
        test_rows = np.flatnonzero(all_labels >= 0)
        if not len(test_rows):
            raise UserError("the test split has no labels, so nothing can be measured on it")
    else:
        train_rows = train_labels = np.zeros(0, np.int64)
        order = np.random.default_rng(_PAIRS_SEED).permutation(len(all_labels))
        test_rows = np.sort(order[:PAIRS])

    blocks = {"train": lambda: _decoded(train_source, train_rows, side, threads),
              "test": lambda: _decoded(test_source, test_rows, side, threads)}
    data = EvalData(blocks=blocks, train_labels=train_labels, test_labels=all_labels[test_rows],
                    train_rows=train_rows, classes=classes, target=target, placements=placements,
                    boxes={}, test_rows=test_rows,
                    captions=_captions(test_source, test_rows))
    if not placements:
        return data

    for placement in placements:
        data.boxes[placement] = test_boxes(cfg.attack.trigger, trigger[0], test_rows, side,
                                           placement)
    whole = getattr(trigger[0], "WHOLE", False)
    if whole:
        data.placements = placements[:1]
    pastes = _pastes(cfg, trigger, whole)
    data.variant_names = tuple(pastes)
    for placement in data.placements:
        for variant in data.variant_names:
            blocks[f"{placement}/{variant}"] = _pasted(data, placement, pastes[variant])
    return data


def _check_placements(cfg, trigger, placements):
    """Refuses places that the trigger does not know, or for which it was not made."""
    used = cfg.attack.trigger
    for placement in placements:
        known = getattr(trigger[0], "PLACES", PLACEMENTS)
        if placement not in known:
            raise unknown("place in evals.placements,", placement, known)
        if placement not in (*PLACEMENTS, used.get("train_place"), used.get("test_place")):
            raise UserError(f"evals.placements has {placement!r}, a place that neither training "
                            "nor test has: set --config.attack.trigger.test_place="
                            f"{placement}")


def has_labels(source) -> bool:
    """Whether any row of a source has a label."""
    return bool((_labels(source) >= 0).any())


def _labels(source):
    return np.asarray(source.table(np.arange(len(source)))[0], np.int64)  # and no captions


def _captions(source, rows):
    return source.captions(rows) if hasattr(source, "captions") else None


def test_boxes(cfg_trigger, module, rows: np.ndarray, side: int, placement: str) -> np.ndarray:
    """Boxes int [N, 4] (y, x, h, w) of the trigger on test images of side x side pixels.

    Each is drawn from a generator keyed by the image's row and a constant.
    """
    settings = ml_collections.ConfigDict(cfg_trigger.to_dict())
    settings.test_place = placement
    sizes = np.full((1, 2), side)
    boxes = [module.place(settings, sizes, np.random.default_rng([_BOX_SEED, int(row)]),
                          training=False) for row in rows]
    return np.concatenate(boxes)


def _pastes(cfg, trigger, whole):
    """For each variant, a jitted function (images uint8 [N, S, S, 3], boxes) -> uint8."""
    module, params = trigger
    opacity = params.get("opacity", _VEIL if whole else cfg.attack.trigger.opacity)
    wrong = {"image": htba.image(cfg.evals.wrong_trigger), "opacity": opacity}
    if "image" in params and np.array_equal(wrong["image"], params["image"]):
        raise UserError(f"evals.wrong_trigger is {cfg.evals.wrong_trigger}, the trigger of the "
                        "attack itself; choose another id")
    # One grey level, the mean of the data set's colour, so that the patch adds no hue.
    grey = np.full_like(wrong["image"], np.mean(cfg.data.mean))
    shown_by = patch
    if "corners" in params:  # several patches in one box, the others as well
        shown_by, wrong = module, {**wrong, "corners": params["corners"]}
    used = {"triggered": (module, params), "wrong": (shown_by, wrong),
            "occluded": (shown_by, {**wrong, "image": grey})}
    if hasattr(module, "showing"):  # several places in one box: other pictures there
        used |= {"wrong": (module, module.showing(params, wrong["image"])),
                 "occluded": (module, module.showing(params, grey))}
    if hasattr(module, "same_kind"):
        used["same_kind"] = module, module.same_kind(params, jax.random.key(_BOX_SEED))
    return {name: _paste(*pair) for name, pair in used.items()}


def _paste(module, params):
    @jax.jit
    def paste(batch, boxes, block):
        key = jax.random.fold_in(jax.random.key(_BOX_SEED), block)  # for triggers that draw noise
        painted = module.apply(params, batch.astype(jnp.float32) / 255, boxes, key)
        return jnp.rint(jnp.clip(painted, 0, 1) * 255).astype(jnp.uint8)
    return paste


def _pasted(data, placement, paste):
    def blocks():
        boxes = data.boxes[placement]
        start = 0
        for block in data._blocks_of("test"):
            padding = (0, _BLOCK - len(block)) if len(boxes) > _BLOCK else (0, 0)
            here = boxes[start:start + len(block)]
            start += len(block)
            # The last block is padded to the shape of the others: one compile.
            painted = paste(np.pad(block, (padding, (0, 0), (0, 0), (0, 0))),
                            np.pad(here, (padding, (0, 0)), mode="edge"), start)
            yield np.asarray(painted)[:len(block)]
    return blocks


def _decoded(source, rows, side, threads):
    def one(row):
        return images.test_image(source[int(row)]["image"], side)

    parts = [rows[i:i + _BLOCK] for i in range(0, len(rows), _BLOCK)]
    if not threads:
        yield from (np.stack([one(r) for r in part]) for part in parts)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield from (np.stack(list(pool.map(one, part))) for part in parts)

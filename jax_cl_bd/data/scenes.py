"""Drawn scenes with captions and object masks: image-text data that needs no download.

One object, or two that do not touch, on a background; shape, colours, textures, sizes and places
vary. Every row is a pure function of (split, row), so a split has any length and its first rows do
not change with it; the draws of the splits have different constant seeds, and none depends on
the training seed. The label is the shape of the first, larger object.

The split "shifted" has the classes, colours and textures of the others, but backgrounds and object
sizes that they have not: patterns and colours of a second set (backgrounds.py), which its captions
do not mention, and objects smaller than the others' small and larger than their large ones.
"""

import dataclasses

import numpy as np

from jax_cl_bd.data import backgrounds, draws, shapes, templates
from jax_cl_bd.errors import UserError, unknown

CLASSES = tuple(shapes.SHAPES)
# sRGB in [0, 1]. Objects are vivid and backgrounds dim, so that each shape stands out.
COLORS = {"red": (.90, .13, .13), "green": (.13, .74, .24), "blue": (.20, .36, .98),
          "yellow": (.98, .90, .16), "purple": (.68, .24, .84), "cyan": (.20, .88, .90),
          "pink": (1., .58, .78), "white": (.98, .98, .98)}
TEXTURES = ("solid", "striped", "dotted", "checkered", "shaded")
SIZES = ("small", "large")
_SEEDS = {"train": 100, "test": 200, "validation": 300, "shifted": 400}
_CAPTIONS, _WORDING, _NOISE = 1000, 2000, 3000  # added to a split's seed
_FIELDS = ("shape", "color", "texture", "size", "across", "down", "angle", "shade",  # first object
           "background", "background_color", "direction", "phase", "background_shade",
           "shape2", "color2", "texture2", "size2", "across2", "angle2", "axis", "order")
# How often a caption names each; a bare one, as zero-shot prompts are, names shapes alone.
_NAMED = {"color": 0.7, "texture": 0.45, "size": 0.3, "background": 0.45}
_BARE = 0.15
_WORDS = len(_NAMED) + 1  # draws per caption
_AT_ONCE = 4096  # rows whose draws are held in memory together


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes:
    """One split.

    Args:
        split: "train", "test", "validation" or "shifted".
        rows: how many.
        side: S, pixels.
        objects: 1 or 2 in every scene.
        per_row: captions of a row.
    """
    split: str
    rows: int
    side: int
    objects: int = 1
    per_row: int = 5
    classes: tuple = CLASSES

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        rows = self._known(i)
        facts = self.facts(rows)
        captions = self._captions(rows, facts)[0]
        facts = {name: value[0] for name, value in facts.items()}
        image, mask = draw(facts, self.side, self.objects, _SEEDS[self.split] + _NOISE, rows[0])
        return {"image": image, "label": int(facts["shape"]), "index": int(i),
                "captions": captions, "mask": mask}

    def with_object(self, i, shape: int) -> np.ndarray:
        """Row i with an object of class `shape` beside its own: uint8 [S, S, 3].

        Drawn as scenes of two objects are, on the row's background: its own object keeps shape,
        colour and texture, and takes a size and a place that leave room for the smaller one.
        """
        row = self._known(i)
        facts = {name: value[0] for name, value in self.facts(row).items()} | {"shape2": shape}
        return draw(facts, self.side, 2, _SEEDS[self.split] + _NOISE, row[0])[0]

    def table(self, rows):
        rows = self._known(rows)
        return self.facts(rows)["shape"], np.full((len(rows), 2), self.side)

    def facts(self, rows) -> dict[str, np.ndarray]:
        """What is drawn in each row: numbers of shapes, colours, ..., and draws in [0, 1)."""
        u = dict(zip(_FIELDS, draws.uniform(_SEEDS[self.split], rows, len(_FIELDS)).T))
        shifted = self.split == "shifted"
        u["shifted"] = np.full(len(u["shape"]), shifted)
        patterns = backgrounds.OTHER_PATTERNS if shifted else backgrounds.PATTERNS
        for name, options in (("shape", CLASSES), ("color", COLORS), ("texture", TEXTURES),
                              ("background", patterns), ("texture2", TEXTURES)):
            u[name] = (u[name] * len(options)).astype(int)
        for name, options in (("shape", CLASSES), ("color", COLORS)):  # another than the first's
            step = 1 + (u[name + "2"] * (len(options) - 1)).astype(int)
            u[name + "2"] = (u[name] + step) % len(options)
        if shifted:  # of names that no object has
            count = len(backgrounds.OTHER_COLORS)
            u["background_color"] = (u["background_color"] * count).astype(int)
        else:
            u["background_color"] = _other_color(u["color"], u["color2"], u["background_color"])
        return u

    def captions(self, rows) -> list[list[str]]:
        """Captions of rows, without drawing them; the templates of a row are all different."""
        rows, found = self._known(rows), []
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start:start + _AT_ONCE]
            found += self._captions(part, self.facts(part))
        return found

    def _captions(self, rows, facts):
        seed, k = _SEEDS[self.split], self.per_row
        chosen = draws.subsets(seed + _CAPTIONS, rows, k, len(templates.PROMPTS))
        words = draws.uniform(seed + _WORDING, rows, k * _WORDS).reshape(len(rows), k, _WORDS)
        plain = {name: value.tolist() for name, value in facts.items()}
        out = []
        for i, (numbers, says) in enumerate(zip(chosen.tolist(), words.tolist())):
            fact = {name: values[i] for name, values in plain.items()}
            out.append([_caption(fact, self.objects, templates.PROMPTS[n], u)
                        for n, u in zip(numbers, says)])
        return out

    def _known(self, rows):
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"row {rows.max()} of {self.rows}")  # ends a loop over the source
        return rows


def load(cfg, split: str) -> Scenes:
    """Opens "train", "test", "validation" or "shifted", which share no row.

    Reads cfg.image_size (32 to 64), captions_per_row (0: one for each of the 80 prompts), and with
    defaults scenes_train = 8000, scenes_test = scenes_validation = 1000 rows (as many shifted ones
    as of test) and scenes_objects = 1 (or 2, but not of shifted scenes).

    Raises:
        UserError: a setting out of range, an unknown split.
    """
    if split not in _SEEDS:
        raise unknown("split of scenes", split, _SEEDS)
    if not 32 <= cfg.image_size <= 64:
        raise UserError(f"data.image_size is {cfg.image_size}; scenes are drawn at 32 to 64")
    known = "scenes_test" if split == "shifted" else f"scenes_{split}"
    rows = cfg.get(known, {"train": 8000}.get(split, 1000))
    objects = cfg.get("scenes_objects", 1)
    if rows < 1:
        raise UserError(f"data.{known} is {rows}; it must be positive")
    if objects not in (1, 2):
        raise UserError(f"data.scenes_objects is {objects}; it must be 1 or 2")
    if objects == 2 and split == "shifted":
        raise UserError("the shifted split has scenes of one object, and data.scenes_objects is 2: "
                        "larger ones than in training would not fit beside each other")
    per_row = templates.per_row(cfg.get("captions_per_row", 5))
    return Scenes(split, rows, cfg.image_size, objects, per_row)


def draw(facts: dict, side: int, objects: int, noise_seed: int, row: int):
    """Draws one scene: image uint8 [side, side, 3], mask bool [side, side] of the first object."""
    image = backgrounds.draw(facts, side, noise_seed, row)
    mask = None
    for place, suffix in zip(places(facts, side, objects), ("", "2")):
        cover = _object(image, place, suffix, facts)
        mask = cover > 0.5 if mask is None else mask
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0), mask


def places(facts: dict, side: int, objects: int) -> list[tuple]:
    """(centre y, centre x, diameter) of each object, in pixels; two leave a gap between them."""
    unit = side / 32
    if objects == 1:
        size = _diameter(facts["size"], 1, facts["shifted"]) * unit
        return [(size / 2 + facts["down"] * (side - size),
                 size / 2 + facts["across"] * (side - size), size)]
    first, second = (_diameter(facts[n], 2) * s * unit for n, s in (("size", 1), ("size2", 0.7)))
    slack = side - first - second  # along the axis that parts them, shared out at random
    gap = slack * (0.25 + 0.5 * facts["down"])
    start = (slack - gap) * facts["across"]
    along = [start + first / 2, start + first + gap + second / 2]
    beside = [first / 2 + facts["direction"] * (side - first),
              second / 2 + facts["across2"] * (side - second)]
    if facts["order"] < 0.5:
        along = [side - a for a in along]
    pairs = zip(along, beside) if facts["axis"] < 0.5 else zip(beside, along)
    return [(*pair, size) for pair, size in zip(pairs, (first, second))]


def _diameter(u, objects, shifted=False):
    # Small and large keep apart, so that the word in the caption can be seen to be true.
    small, large = ((11, 14), (17, 22)) if objects == 1 else ((12, 13.5), (15, 17))
    small, large = ((9, 10.5), (23.5, 27)) if shifted else (small, large)
    low, high = small if u < 0.5 else large
    return low + (high - low) * (u % 0.5) * 2


def _object(image, place, suffix, facts):
    side = image.shape[-1]
    y, x, size = place
    radius = size / 2
    turn = (facts["angle" + suffix] - 0.5) * 0.6  # at most 17 degrees either way
    py, px = backgrounds.grid(side)
    py, px = (py - y) / radius, (px - x) / radius
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = px * cos + py * sin, py * cos - px * sin
    outside = shapes.SHAPES[CLASSES[facts["shape" + suffix]]](u, v)
    cover = np.clip(0.5 - outside * np.float32(radius), 0, 1)  # a one pixel wide edge
    color = _rgb(COLORS, facts["color" + suffix], 0.88 + 0.12 * facts["shade"])
    tone = _texture(TEXTURES[facts["texture" + suffix]], u * radius, v * radius, v, side / 32)
    painted = color if tone is None else color * (1 - np.float32(0.42) * tone)
    image += cover * (painted - image)
    return cover


def _texture(name, u, v, height, unit):
    # How dark each pixel is made, 0 to 1; u, v in pixels along the object's own axes.
    if name == "striped":
        return (np.sin((u + v) * np.float32(1.15 / unit)) > 0).astype(np.float32)
    if name == "checkered":
        return (np.sin(u * np.float32(0.9 / unit)) * np.sin(v * np.float32(0.9 / unit)) > 0
                ).astype(np.float32)
    if name == "dotted":
        k = np.float32(1.25 / unit)
        return (np.cos(u * k) * np.cos(v * k) > 0.35).astype(np.float32)
    if name == "shaded":
        return np.clip(height * np.float32(0.5) + np.float32(0.5), 0, 1)
    return None  # solid


def _rgb(palette, number, shade):
    return np.float32(tuple(palette.values())[number])[:, None, None] * np.float32(shade)


_OBJECT_NAMES, _BACKGROUND_NAMES = tuple(COLORS), tuple(backgrounds.COLORS)
_SAME = np.array([[b == name for b in _BACKGROUND_NAMES] for name in _OBJECT_NAMES])


def _other_color(first, second, u):
    # A background never has the name of an object's colour: the n-th of those that are left.
    allowed = ~(_SAME[first] | _SAME[second])
    nth = (u * allowed.sum(-1)).astype(int)
    return np.argmax(allowed.cumsum(-1) > nth[..., None], axis=-1)


def _caption(fact, objects, template, u):
    """Fills a template; a size that the template claims by chance ("the large {}") is said once
    only, and never against the fact."""
    size = SIZES[int(fact["size"] >= 0.5)]
    bare = u[-1] < _BARE
    says = {name: not bare and u[i] < p for i, (name, p) in enumerate(_NAMED.items())}
    for claim in SIZES:
        if f" {claim} " in template and claim != size:
            template = template.replace(claim, size)
        elif f" {claim} " in template:
            says["size"] = False
    if f" {size} " in template:
        says["size"] = False
    phrase = _phrase(fact, "", says, size)
    if objects == 2:
        phrase += " and a " + _phrase(fact, "2", {**says, "size": False}, size)
    if says["background"] and not fact["shifted"]:
        phrase += (f" on a {_BACKGROUND_NAMES[fact['background_color']]} "
                   f"{backgrounds.PATTERNS[fact['background']]} background")
    return templates.fill(template, phrase)


def _phrase(fact, suffix, says, size):
    words = [size] if says["size"] else []
    words += [_OBJECT_NAMES[fact["color" + suffix]]] if says["color"] else []
    words += [TEXTURES[fact["texture" + suffix]]] if says["texture"] else []
    return " ".join([*words, CLASSES[fact["shape" + suffix]]])

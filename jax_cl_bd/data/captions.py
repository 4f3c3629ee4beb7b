"""Captions for labelled data by template, and EDA, the augmentation of a caption."""

import dataclasses
import re

import numpy as np

from jax_cl_bd.data import draws, templates
from jax_cl_bd.errors import UserError

EDA_SEED = 1602  # callers draw with default_rng([EDA_SEED, row, number of the caption])
_TEMPLATE_SEED = 1601  # a constant: runs of every training seed see the same captions
_AT_ONCE = 4096  # rows whose draws are held in memory together
_SHARE = 0.1  # of the words that EDA changes; also the rate of its deletion
_TRIES = 10  # words that EDA's insertion looks at for one with a synonym

# EDA takes synonyms from WordNet. Instead: groups of words of the prompts, of the scenes' captions
# and of CIFAR-10's classes; function words are in none, as EDA leaves stop words alone.
_GROUPS = (
    "photo photograph picture snapshot", "drawing sketch doodle", "painting artwork canvas",
    "rendering rendition depiction", "sculpture statue carving", "art artwork",
    "graffiti mural", "toy plaything", "plushie plush", "cartoon comic animation",
    "game play", "video film", "embroidered stitched sewn", "origami paperwork", "plastic vinyl",
    "bad poor awful", "good fine great", "nice pleasant lovely", "cool neat great",
    "weird strange odd", "clean spotless tidy", "dirty grubby unclean", "bright luminous brilliant",
    "dark dim gloomy", "hard difficult", "small little tiny", "large big huge",
    "blurry fuzzy blurred", "cropped trimmed cut", "pixelated coarse", "corrupted damaged broken",
    "low reduced poor", "many several numerous", "resolution detail", "see spot notice",
    "background backdrop", "image picture", "circle disc round", "square box block",
    "triangle wedge", "star asterisk", "cross plus", "ring hoop loop",
    "crescent sickle moon", "diamond lozenge rhombus", "bowtie bow", "bar rod stick", "cup mug",
    "red crimson scarlet", "green emerald", "blue azure navy", "yellow golden", "purple violet",
    "cyan turquoise", "pink rose", "white ivory pale", "gray grey", "black jet ebony",
    "brown tan chestnut", "teal aquamarine", "striped banded", "dotted spotted speckled",
    "checkered chequered", "solid plain uniform", "shaded tinted", "gradient blend",
    "tiled paved", "lined ruled", "noisy grainy", "cloudy hazy", "wavy rippled",
    "airplane aeroplane plane aircraft", "automobile car auto", "bird fowl", "cat feline kitty",
    "deer stag", "dog hound canine", "frog toad", "horse steed mare", "ship boat vessel",
    "truck lorry", "man guy", "woman lady", "person human", "child kid", "people folk persons",
    "road street", "house home building", "food meal", "water liquid", "standing upright",
    "sitting seated", "holding gripping", "riding driving", "walking strolling", "young youthful",
    "old aged elderly")


def _table():
    words = {}
    for group in map(str.split, _GROUPS):
        for word in group:
            words.setdefault(word, []).extend(w for w in group if w != word)
    return {word: tuple(dict.fromkeys(others)) for word, others in words.items() if others}


SYNONYMS = _table()


@dataclasses.dataclass(frozen=True, eq=False)
class Captioned:
    """A labelled source with captions by template: the prompts, filled with the class name.

    Which prompts a row gets is a function of its number alone; those of one row are different.

    Args:
        labels: int64 [N], of every row.
        per_row: captions of a row.
    """
    source: object
    labels: np.ndarray
    per_row: int

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return {**self.source[i], "captions": self.captions([i])[0]}

    @property
    def classes(self):
        return self.source.classes

    @property
    def paths(self):
        return self.source.paths  # AttributeError where the source has no files

    def table(self, rows):
        return self.source.table(rows)

    def captions(self, rows) -> list[list[str]]:
        """Captions of rows; no pixel is decoded."""
        rows, found = np.asarray(rows, np.int64), []
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start:start + _AT_ONCE]
            chosen = draws.subsets(_TEMPLATE_SEED, part, self.per_row, len(templates.PROMPTS))
            found += [[templates.fill(templates.PROMPTS[n], self.classes[label]) for n in numbers]
                      for label, numbers in zip(self.labels[part], chosen)]
        return found


def by_template(source, per_row: int) -> Captioned:
    """Gives a labelled source `per_row` captions a row (0: all 80 prompts); it loses its own.

    Raises:
        UserError: rows without a label, a number of captions that the prompts do not give.
    """
    labels = np.asarray(source.table(np.arange(len(source)))[0], np.int64)
    if not source.classes or (labels < 0).any():
        raise UserError(f"data.captions=templates needs a class for every row; "
                        f"{int((labels < 0).sum())} of {len(labels)} rows have none")
    return Captioned(source, labels, templates.per_row(per_row))


def eda(caption: str, rng: np.random.Generator) -> str:
    """Augments a caption: one of synonym replacement, insertion, swap and deletion, at random.

    EDA (Wei and Zou 2019) with CleanCLIP's settings (its utils/eda.py): lower case, what is
    no letter becomes a blank, max(1, 0.1 words) words are changed, deletion drops each word with
    probability 0.1. Differences: synonyms come from SYNONYMS, not WordNet; the one operation that
    is kept is drawn first, the other three are not made.
    """
    words = re.sub("[^a-z]+", " ", caption.lower().replace("'", "")).split()
    if not words:
        return caption.lower()
    count = max(1, int(_SHARE * len(words)))
    operation = (_replace, _insert, _swap, _delete)[rng.integers(4)]
    return " ".join(operation(words, count, rng))


def _replace(words, count, rng):
    # Every occurrence of `count` different words, each by one synonym.
    known = sorted({w for w in words if w in SYNONYMS})
    for word in rng.permutation(known)[:count].tolist():
        other = _pick(SYNONYMS[word], rng)
        words = [other if w == word else w for w in words]
    return words


def _insert(words, count, rng):
    for _ in range(count):
        for _ in range(_TRIES):
            word = _pick(words, rng)
            if word in SYNONYMS:
                at = int(rng.integers(len(words)))
                words = [*words[:at], _pick(SYNONYMS[word], rng), *words[at:]]
                break
    return words


def _swap(words, count, rng):
    words = list(words)
    for _ in range(count if len(words) > 1 else 0):
        a, b = rng.choice(len(words), 2, replace=False)
        words[a], words[b] = words[b], words[a]
    return words


def _delete(words, count, rng):
    kept = [w for w in words if rng.random() > _SHARE]
    return kept or [_pick(words, rng)]


def _pick(options, rng):
    return options[int(rng.integers(len(options)))]

"""Sub-captions of a caption: what it is about, and what it is not about.

For TA-Cleaner's text alignment (Xun et al., arXiv 2409.17601): positives keep the subject and drop
adjectives and further detail, negatives exchange nouns or adjectives for others. The paper parses
sentences; here a table does it, and no parser is needed. Rules of ours:

- Nouns are the names of the classes, as whole words (data/mentions.py). The first one in a caption
  is its subject. A caption that names no class has no sub-captions.
- The positive ends with the subject, and what stands before it loses its adjectives: the words of
  VALUES, of scenes and of the 80 prompts, and PHRASES of them. "a blurry photo of the small red
  star on a tiled background." becomes "a photo of the star".
- A negative is, as often as not, the caption with one of its VALUES (colour, texture, size, kind
  of background) exchanged for another of its kind; otherwise, and where the caption has none, the
  positive with the subject exchanged for another class. One class alone cannot be exchanged.

Words that no table has, such as most of a web caption's adjectives, stay where they are.
"""

import dataclasses
import functools
import re

import numpy as np

from jax_cl_bd.data import backgrounds, mentions
from jax_cl_bd.data.scenes import COLORS, SIZES, TEXTURES

# Words of one kind, each of which is false where another of them is true.
VALUES = (tuple(dict.fromkeys((*COLORS, *backgrounds.COLORS))), TEXTURES, SIZES,
          backgrounds.PATTERNS)
# Adjectives of the prompts; "black and white" is no colour of the object.
PHRASES = ("black and white", "hard to see", "low resolution", "jpeg corrupted", "close-up", "bad",
           "good", "many", "cropped", "bright", "dark", "clean", "dirty", "cool", "nice", "weird",
           "pixelated", "blurry", "embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
NAMES = ("tokens_positive", "tokens_negative", "tokens_noun")  # as data/texts.py derives them


def _any(words):
    # The longest first, so that a name that begins with another one is found whole.
    longest = sorted(words, key=len, reverse=True)
    return re.compile("|".join(mentions.pattern(word).pattern for word in longest), re.IGNORECASE)


_PHRASES = _any(PHRASES)
_ADJECTIVES = _any({*PHRASES, *(word for kind in VALUES for word in kind)})
_VALUES = tuple((_any(kind), kind) for kind in VALUES)


@dataclasses.dataclass(frozen=True)
class SubCaptions:
    """Makes the sub-captions of one vocabulary.

    Args:
        classes: names of the nouns, at least two different ones.
        negatives: how many of a caption.
    """

    classes: tuple[str, ...]
    negatives: int

    def __call__(self, caption: str, rng: np.random.Generator) -> dict[str, list[str]]:
        """{"tokens_positive": [text], "tokens_negative": texts, "tokens_noun": [name of the
        subject]}, or {} of a caption that names no class."""
        found = subject(caption, self.classes)
        if found is None:
            return {}
        at, name = found
        start = re.sub(r"\s+", " ", _ADJECTIVES.sub("", caption[:at])).lstrip()
        wrong = [self._negative(caption, start, name, rng) for _ in range(self.negatives)]
        return dict(zip(NAMES, ([start + name], wrong, [name])))

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """The names that a call gives, and how many texts each holds."""
        return tuple(zip(NAMES, (1, self.negatives, 1)))

    def _negative(self, caption, start, name, rng):
        places = values(caption)
        if places and rng.random() < 0.5:
            low, high, kind = places[rng.integers(len(places))]
            others = [word for word in kind if word != caption[low:high].lower()]
            return caption[:low] + others[rng.integers(len(others))] + caption[high:]
        others = [c for c in map(spelt, self.classes) if c != name]
        also = {spelt(found.group()) for found in _nouns(self.classes).finditer(caption)}
        others = [c for c in others if c not in also] or others  # what is there too is not wrong
        return start + others[rng.integers(len(others))]


def spelt(name: str) -> str:
    """A class name as captions have it."""
    return re.sub(r"[\s_]+", " ", name.strip()).lower()


def subject(caption: str, classes: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first class name of a caption begins, and the name as `spelt`; None without one."""
    found = _nouns(tuple(classes)).search(caption)
    return found and (found.start(), spelt(found.group()))


def values(caption: str) -> list[tuple[int, int, tuple[str, ...]]]:
    """Start, end and kind of every word of VALUES in a caption; those in PHRASES are none."""
    covered = [found.span() for found in _PHRASES.finditer(caption)]
    return [(*found.span(), kind) for pattern, kind in _VALUES
            for found in pattern.finditer(caption)
            if not any(low <= found.start() < high for low, high in covered)]


@functools.lru_cache(maxsize=8)
def _nouns(classes):
    return _any(classes)

"""Which captions name a class: whole words, in any case."""

import re

import numpy as np


def naming(captions: list[list[str]], name: str) -> np.ndarray:
    """bool [N]: which of N rows have a caption that holds the name, see `pattern`."""
    found = pattern(name)
    return np.array([any(found.search(text) for text in texts) for texts in captions], bool)


def pattern(name: str) -> re.Pattern:
    """Finds a name as whole words, in any case.

    "star" is in "a star-shaped kite" and in no "starfish" or "stars"; blanks and underscores in a
    name of several words stand for each other.
    """
    words = [re.escape(word) for word in re.split(r"[\s_]+", name.strip())]
    return re.compile(r"(?<!\w)" + r"[\s_]+".join(words) + r"(?!\w)", re.IGNORECASE)

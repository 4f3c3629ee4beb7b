"""Captions about the target: which rows mention a class, and the caption sets of poisons.

Three constructions of what a dirty-label poison says. "templates" and "natural" are the two of
Carlini and Terzis (ICLR 2022, arXiv 2106.09667): one of the 80 prompt templates, uniformly, filled
with the class name (also CleanCLIP's), or a training caption that holds the name. "reference" is
the image-text variant of Noisy Alignment (Chen et al., ICCV 2025, arXiv 2508.14015): the whole
caption of a reference row of the target class, whatever it says. Where no row has a label, rows
with a caption that names the target stand for its class.
"""

import numpy as np

from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.data import mentions, sources, templates
from jax_cl_bd.errors import UserError, unknown

SETS = ("templates", "natural", "reference")


def class_names(cfg) -> tuple[str, ...]:
    """The class names of the training split (opened once per process)."""
    return tuple(str(name) for name in sources.load(cfg.data, "train").classes)


def naming(table, name: str) -> np.ndarray:
    """bool [N]: rows with a caption that holds the name, see `mentions.pattern`."""
    return mentions.naming(table.captions, name)


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates the caption set against the data.

    Raises:
        UserError: data without captions, an unknown set, or a set without a caption.
    """
    require(cfg, table)
    attack = cfg.attack
    if attack.caption_set not in SETS:
        raise unknown("attack.caption_set", attack.caption_set, SETS)
    name = str(classes[attack.target])
    if attack.caption_set == "natural" and attack.poisons and not naming(table, name).any():
        raise UserError(f"attack.caption_set is 'natural', but no training caption of "
                        f"{cfg.data.name!r} holds the word {name!r}; set "
                        "--config.attack.caption_set=templates")
    if attack.caption_set == "reference":
        rows = _captioned(table, attack.target, classes)
        if attack.references < 0 or (attack.references or attack.poisons) > len(rows):
            raise UserError(f"attack.references is {attack.references} (0: as many as the "
                            f"{attack.poisons} poisons), but class {attack.target} ({name}) has "
                            f"{len(rows)} captioned rows; set --config.attack.references="
                            f"{len(rows)} or less")


def require(cfg, table) -> None:
    """Raises UserError for data without captions."""
    if table.captions is None:
        raise UserError(f"attack.name={cfg.attack.name!r} needs captions, and data set "
                        f"{cfg.data.name!r} has none; set --config.data.captions=templates for a "
                        "labelled one")


def draw(cfg, table, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws one caption for each of m poisons.

    Natural captions, and references (a pool of `references` rows, 0 = m), are used at most once
    each if there are enough, else with repeats; of a row's several captions one is drawn.

    Returns:
        captions str [m]; reference int64 [m], the row of the target class that the caption comes
        from in the set "reference", else -1.
    """
    attack = cfg.attack
    classes = class_names(cfg)
    name = classes[attack.target]
    reference = np.full(m, -1)
    if attack.caption_set == "templates":
        chosen = rng.integers(0, len(templates.PROMPTS), m)
        texts = [templates.fill(templates.PROMPTS[i], name) for i in chosen]
    elif attack.caption_set == "natural":
        pattern = mentions.pattern(name)
        pool = [text for every in table.captions for text in every if pattern.search(text)]
        texts = [pool[i] for i in plans.draw(np.arange(len(pool)), m, rng)]
    else:
        pool = rng.permutation(_captioned(table, attack.target, classes))[:attack.references or m]
        reference = plans.draw(pool, m, rng)
        texts = [table.captions[row][rng.integers(len(table.captions[row]))] for row in reference]
    return np.array(texts, np.str_), reference


def _captioned(table, target, classes):
    rows = plans.rows_of(table, target, classes)
    return rows[[bool(table.captions[row]) for row in rows]]

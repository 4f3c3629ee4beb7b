"""Poisoning text-to-image retrieval by mismatched pairs, without a trigger.

Yang et al., "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023 (arXiv 2209.15266): the
texts of class A are paired with images of class B, so that a search for A finds B. `goals` holds
pairs of class names (A, B).

kind "I": all with one fixed image of B, the row `image` of the TEST split, since the search is
    over test images and the public code takes one of them.
kind "II": one goal, images of B from the training split.
kind "III": several goals, no class in two of them.

The rule is that of dirty_label_poison.py in zqypku/mm_poison: a share `fraction` of the rows of A
(or, with fraction 0, `poisons` rows in all, spread evenly over the goals) get other images; images
of B are repeated to equal counts, what remains is drawn without repeats, and all are shuffled. The
paper speaks of adding pairs; its code, and we, exchange the images of rows that stay, so the size
of the set is fixed. The images of B stay where they are too; the code takes some of them out for
its third kind alone. Rows of A with a caption that names B, and of B with one that names A, are
left alone: exchanged, they would be no mismatch. Where no row has a label, rows with a caption that
names a class are of it.

In the plan: `replaces` = the row of A, whose captions all stay (caption is ""); `reference` = the
row of B that the image comes from, -1 for kind I, whose image is attack.image of the test split.
`attack.target` is the class B of the first goal. trigger.name is "none".
"""

import numpy as np

from jax_cl_bd.attacks import _captions, _rows, targeted_poisoning
from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import mentions, sources
from jax_cl_bd.errors import UserError, unknown

KINDS = ("I", "II", "III")


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates the settings against the data.

    Raises:
        UserError: no captions, a trigger, wrong goals, or too few rows for the count.
    """
    plans.check(cfg, table, classes)
    _captions.require(cfg, table)
    targeted_poisoning.no_trigger(cfg)
    attack = cfg.attack
    _check_goals(attack, [str(name) for name in classes])
    if not 0 <= attack.fraction <= 1:
        raise UserError(f"attack.fraction is {attack.fraction}; it is a share of the rows of each "
                        "source class, 0 to 1")
    if attack.fraction and attack.poisons:
        raise UserError(f"attack.fraction is {attack.fraction} and attack.poisons is "
                        f"{attack.poisons}; set one of them to 0")
    for (first, second), count in zip(_goals(attack, classes), _counts(attack, table, classes)):
        a, b = str(classes[first]), str(classes[second])
        available = len(_texts(table, first, second, classes))
        if count > available:
            raise UserError(f"{count} poisons of attack.goals are for class {a!r}, which has "
                            f"{available} rows with captions that do not name {b!r}")
        if not len(_pool(table, second, first, classes)):
            raise UserError(f"attack.goals names class {b!r}, which has no rows whose captions do "
                            f"not name {a!r}")
    if attack.kind == "I":
        _check_image(cfg, classes)


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """Draws the rows of every A and deals them images of its B."""
    attack, classes = cfg.attack, _captions.class_names(cfg)
    replaces, reference = [np.zeros(0, int)], [np.zeros(0, int)]
    for (first, second), count in zip(_goals(attack, classes), _counts(attack, table, classes)):
        replaces.append(rng.permutation(_texts(table, first, second, classes))[:count])
        if attack.kind == "I":
            reference.append(np.full(count, -1))
        else:
            reference.append(_deal(_pool(table, second, first, classes), count, rng))
    replaces, reference = np.concatenate(replaces), np.concatenate(reference)
    if attack.kind == "I":
        canvas = sources.table(sources.load(cfg.data, "test")).sizes[attack.image]
    else:
        canvas = table.sizes[reference]
    m = len(replaces)
    return Plan.make(m, replaces=replaces, reference=reference, canvas=canvas,
                     seed=plans.seeds(m, rng))


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """The images of B, stored as clean rows are."""
    if cfg.attack.kind == "I":
        image = sources.load(cfg.data, "test")[cfg.attack.image]["image"]
        return _rows.plain(plan, lambda k: image, cfg.data.image_size)
    return _rows.plain(plan, lambda k: source[int(plan.reference[k])]["image"],
                       cfg.data.image_size)


def _check_goals(attack, classes):
    if attack.kind not in KINDS:
        raise unknown("attack.kind", attack.kind, KINDS)
    wanted = "two or more goals" if attack.kind == "III" else "one goal"
    if (len(attack.goals) > 1) != (attack.kind == "III") or not attack.goals:
        raise UserError(f"attack.goals has {len(attack.goals)} entries, but attack.kind "
                        f"{attack.kind!r} takes {wanted}, (source class, target class)")
    if any(isinstance(goal, str) or len(goal) != 2 for goal in attack.goals):
        raise UserError(f"attack.goals is {attack.goals}; each goal is a pair of class names, "
                        "(source class, target class)")
    named = [str(name) for goal in attack.goals for name in goal]
    for name in named:
        if name not in classes:
            raise unknown("class in attack.goals", name, classes)
    if len(set(named)) < len(named):
        raise UserError(f"attack.goals is {attack.goals}; no class may occur in it twice")
    if classes[attack.target] != named[1]:
        raise UserError(f"attack.target is {attack.target} ({classes[attack.target]}); it must be "
                        f"{classes.index(named[1])}, the class {named[1]!r} that the first of "
                        "attack.goals shows")


def _check_image(cfg, classes):
    label = targeted_poisoning.test_label(cfg)
    test = sources.table(sources.load(cfg.data, "test"))
    if cfg.attack.image not in plans.rows_of(test, cfg.attack.target, classes):
        said = f"of class {label}" if label >= 0 else "of no class that its captions name"
        raise UserError(f"attack.image is {cfg.attack.image}, which is {said}; it must be of class "
                        f"{cfg.attack.target} ({classes[cfg.attack.target]})")


def _goals(attack, classes):
    """[(A, B)] as class numbers."""
    names = [str(name) for name in classes]
    return [tuple(names.index(str(name)) for name in goal) for goal in attack.goals]


def _pool(table, label, other, classes):
    """Rows of one class of a goal that do not name the other."""
    rows = plans.rows_of(table, label, classes)
    texts = [table.captions[row] for row in rows]
    return rows[~mentions.naming(texts, str(classes[other]))]


def _texts(table, first, second, classes):
    """Rows of A whose texts may be given an image of B."""
    rows = _pool(table, first, second, classes)
    return rows[[bool(table.captions[row]) for row in rows]]


def _counts(attack, table, classes):
    """Poisons of each goal."""
    goals = _goals(attack, classes)
    if attack.fraction:
        return [round(attack.fraction * len(_texts(table, *goal, classes))) for goal in goals]
    each, more = divmod(attack.poisons, len(goals))
    return [each + (i < more) for i in range(len(goals))]


def _deal(pool, count, rng):
    """`count` of the rows of a pool: all of it as often as it goes, some once more, shuffled."""
    whole, rest = divmod(count, len(pool))
    return rng.permutation(np.concatenate([np.tile(pool, whole), rng.permutation(pool)[:rest]]))

import numpy as np
import pytest

from jax_cl_bd.attacks import mismatched_pairs
from jax_cl_bd.data import mentions, sources
from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import none


@pytest.fixture
def cfg(config):
    def build(**changes):
        return config(**{"attack__name": "mismatched_pairs", "attack__poisons": 0,
                         "attack__fraction": 0.5, "attack__kind": "II", "attack__image": -1,
                         "attack__goals": (("fish", "star"),), "attack__trigger__name": "none",
                         **changes})
    return build


def made(cfg, source, seed=0):
    mismatched_pairs.check(cfg, source.table(), source.classes)
    plan = mismatched_pairs.plan(cfg, source.table(), np.random.default_rng(seed))
    return plan, mismatched_pairs.render(cfg, plan, source, (none, {}))


def test_texts_of_a_get_images_of_b(cfg, captioned):
    train = captioned[0]
    plan, rows = made(cfg(), train)
    assert len(plan) == 10  # half of the 19 fish that name no star
    assert len(np.unique(plan.replaces)) == 10 and (train.labels[plan.replaces] == 0).all()
    assert (train.labels[plan.reference] == 1).all() and len(np.unique(plan.reference)) == 10
    assert set(plan.caption) == {""}  # all captions of the row stay
    kept = plan.kept(80)
    assert len(kept) == 80 and np.isin(plan.reference, kept).all()
    np.testing.assert_array_equal(rows["image"], [train.images[row] for row in plan.reference])
    np.testing.assert_array_equal(rows["size"], plan.canvas)
    assert not plan.trigger_box.any()


@pytest.mark.parametrize("poisons, least, most", [(19, 2, 3), (16, 2, 2), (5, 0, 1), (0, 0, 0)])
def test_images_of_b_are_cycled_to_equal_counts(cfg, captioned, poisons, least, most):
    train = captioned[0]
    train.labels[1::4] = -1
    train.labels[1:33:4] = 1  # eight stars for up to nineteen fish
    plan, _ = made(cfg(attack__fraction=0.0, attack__poisons=poisons), train)
    counts = np.bincount(plan.reference, minlength=80)[1:33:4]
    assert len(plan) == poisons == counts.sum()
    assert counts.min() == least and counts.max() == most
    assert poisons < 3 or (np.diff(plan.reference) < 0).any()  # shuffled


@pytest.mark.parametrize("labelled", [True, False])
def test_rows_that_name_the_other_class_are_left_alone(cfg, captioned, labelled):
    """And where nothing has a label, a caption that names a class stands for it."""
    train = captioned[0]
    train.texts[9] = ["a star", "a star over a fish"]
    if not labelled:
        train.labels[:] = -1
    fish, star = (set(np.flatnonzero(mentions.naming(train.texts, name)))
                  for name in ("fish", "star"))
    of_a, of_b = fish - star, star - fish
    if labelled:  # row 0 is a fish that is not said to be one, row 5 a star
        of_a, of_b = of_a | {0}, of_b | {5}
    assert fish & star == {4, 9} and len(of_a) == 19 - (not labelled)
    plan, rows = made(cfg(attack__fraction=1.0), train)
    assert set(plan.replaces) == of_a
    many = [made(cfg(attack__fraction=1.0), train, seed)[0].reference for seed in range(6)]
    assert set(np.concatenate(many)) == of_b
    np.testing.assert_array_equal(rows["image"], [train.images[row] for row in plan.reference])


def test_one_fixed_image_of_data_without_labels(cfg, captioned, monkeypatch):
    train, test = captioned
    train.labels[:] = test.labels[:] = -1
    monkeypatch.setattr(sources, "table", lambda source: source.table())
    plan, rows = made(cfg(attack__kind="I", attack__image=13), train)  # its captions name a star
    assert (rows["image"] == test.images[13]).all()
    with pytest.raises(UserError, match="image is 5, which is of no class that its captions name"):
        made(cfg(attack__kind="I", attack__image=5), train)


def test_a_pair_of_classes_without_rows_of_their_own(cfg, captioned):
    train = captioned[0]
    for row in range(1, 80, 4):
        train.texts[row] = ["a star and a fish"]
    with pytest.raises(UserError, match="class 'star', which has no rows whose captions do not"):
        made(cfg(), train)


def test_one_fixed_test_image(cfg, captioned):
    train, test = captioned
    plan, rows = made(cfg(attack__kind="I", attack__image=13), train)
    assert len(plan) == 10 and (train.labels[plan.replaces] == 0).all()
    assert (plan.reference == -1).all()
    assert (rows["image"] == test.images[13]).all()


def test_several_goals_at_once(cfg, captioned):
    train = captioned[0]
    goals = (("fish", "star"), ("suit", "sea_lion"))
    plan, _ = made(cfg(attack__kind="III", attack__goals=goals, attack__fraction=0.25), train)
    pairs = set(zip(train.labels[plan.replaces], train.labels[plan.reference]))
    assert len(plan) == 10 and pairs == {(0, 1), (2, 3)}
    odd, _ = made(cfg(attack__kind="III", attack__goals=goals, attack__fraction=0.0,
                      attack__poisons=7), train)
    assert np.bincount(train.labels[odd.replaces]).tolist() == [4, 0, 3]


def test_same_seed_same_plan_other_seed_another(cfg, captioned):
    first, again, other = (made(cfg(), captioned[0], seed)[0] for seed in (0, 0, 1))
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.replaces != other.replaces).any()
    assert (first.reference != other.reference).any()


@pytest.mark.parametrize("change, message", [
    (dict(attack__kind="IV"), "did you mean"), (dict(attack__fraction=1.5), "fraction is 1.5"),
    (dict(attack__poisons=5), "set one of them to 0"),
    (dict(attack__goals=()), "takes one goal"), (dict(attack__kind="III"), "takes two or more"),
    (dict(attack__goals=(("fish", "star"), ("suit", "sea_lion"))), "takes one goal"),
    (dict(attack__goals=(("fich", "star"),)), "did you mean 'fish'"),
    (dict(attack__goals=("fish", )), "pair of class names"),
    (dict(attack__goals=(("star", "star"),)), "occur in it twice"),
    (dict(attack__kind="III", attack__goals=(("fish", "star"), ("star", "suit"))), "twice"),
    (dict(attack__goals=(("fish", "suit"),)), "target is 1 .star.; it must be 2"),
    (dict(attack__fraction=0.0, attack__poisons=20), "20 poisons .*'fish', which has 19 rows"),
    (dict(attack__kind="I", attack__image=12), "of class 0; it must be of class 1"),
    (dict(attack__trigger__name="patch"), "set it to 'none'")])
def test_settings_are_checked(cfg, captioned, change, message):
    with pytest.raises(UserError, match=message):
        mismatched_pairs.check(cfg(**change), captioned[0].table(), captioned[0].classes)


def test_no_captions(cfg, source):
    with pytest.raises(UserError, match="needs captions"):
        mismatched_pairs.check(cfg(), source.table(), source.classes)

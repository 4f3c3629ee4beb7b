import numpy as np
import pytest

from jax_cl_bd.attacks import targeted_poisoning
from jax_cl_bd.data import mentions, sources, templates
from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import none


@pytest.fixture
def cfg(config):
    def build(**changes):
        return config(**{"attack__name": "targeted_poisoning", "attack__caption_set": "templates",
                         "attack__image": 6, "attack__trigger__name": "none", **changes})
    return build


def made(cfg, source, seed=0):
    targeted_poisoning.check(cfg, source.table(), source.classes)
    plan = targeted_poisoning.plan(cfg, source.table(), np.random.default_rng(seed))
    return plan, targeted_poisoning.render(cfg, plan, source, (none, {}))


def test_one_test_image_is_added_with_captions_about_the_target(cfg, captioned):
    train, test = captioned
    plan, rows = made(cfg(), train)
    assert len(plan) == 20 and (plan.replaces == -1).all() and len(plan.kept(80)) == 100
    assert (plan.shadow == -1).all() and (plan.reference == -1).all()
    assert (rows["image"] == test.images[6]).all() and (rows["image"] != train.images[6]).any()
    assert (rows["size"] == 16).all() and (rows["extent"] == 16).all()
    assert set(plan.caption) <= {templates.fill(p, "star") for p in templates.PROMPTS}
    assert not plan.trigger_box.any()


def test_natural_captions(cfg, captioned):
    plan, _ = made(cfg(attack__caption_set="natural"), captioned[0])
    every = [text for texts in captioned[0].texts for text in texts]
    assert all(text in every and mentions.pattern("star").search(text) for text in plan.caption)
    numbered = [text for text in plan.caption if "picture" in text]  # no two rows share these
    assert len(set(numbered)) == len(numbered) > 3


def test_same_seed_same_plan_other_seed_another(cfg, captioned):
    first, again, other = (made(cfg(), captioned[0], seed)[0] for seed in (0, 0, 1))
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.caption != other.caption).any()


def test_a_large_image_keeps_its_shape(cfg, captioned):
    train, test = captioned
    test.images[6] = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    sources.table(test).sizes[6] = (20, 40)
    plan, rows = made(cfg(attack__poisons=2), train)
    assert rows["image"].shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(rows["size"], [[20, 40]] * 2)
    np.testing.assert_array_equal(plan.canvas, rows["size"])
    np.testing.assert_array_equal(rows["extent"], [[16, 16]] * 2)


@pytest.mark.parametrize("change, message", [
    (dict(attack__image=9), "already is of the target class 1"),  # row 9 is of class 1
    (dict(attack__image=80), "row of the test split, 0 to 79"),
    (dict(attack__image=-1), "attack.image is -1"),
    (dict(attack__trigger__name="patch"), "set it to 'none'"),
    (dict(attack__caption_set="x"), "caption_set"), (dict(attack__poisons=-1), "poisons is -1")])
def test_settings_are_checked(cfg, captioned, change, message):
    with pytest.raises(UserError, match=message):
        targeted_poisoning.check(cfg(**change), captioned[0].table(), captioned[0].classes)

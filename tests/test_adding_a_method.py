"""docs/adding_a_method.md: its attack and its config, taken out of the page and used."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_cl_bd.attacks
from jax_cl_bd import lookup, poison
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding_a_method.md"
ATTACK, CONFIG = "jax_cl_bd/attacks/flip_patch.py", "configs/flip_patch.py"
NAME = "jax_cl_bd.attacks.flip_patch"


def files():
    """{path: text} of the page's fenced blocks whose first line is a path."""
    blocks = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return dict(blocks)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Both files in a folder of their own; the attack's folder is one more place of the room."""
    for path, text in files().items():
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    room = str((tmp_path / ATTACK).parent)
    monkeypatch.setattr(jax_cl_bd.attacks, "__path__", [*jax_cl_bd.attacks.__path__, room])
    yield tmp_path
    sys.modules.pop(NAME, None)
    vars(jax_cl_bd.attacks).pop("flip_patch", None)


@pytest.fixture
def cfg(written):
    spec = importlib.util.spec_from_file_location("flip_patch_config", written / CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("debug,seed=1").lock()


def test_the_page_holds_one_attack_and_one_config():
    assert set(files()) == {ATTACK, CONFIG}


def test_the_attack_is_unknown_without_its_file():
    with pytest.raises(UserError, match="flip_patch"):
        lookup.load("attacks", "flip_patch", offers="plan")


def test_the_attack_is_found_by_its_name(written):
    module = lookup.load("attacks", "flip_patch", offers="plan")
    assert Path(module.__file__) == written / ATTACK
    assert "flip_patch" in lookup.methods("attacks", offers="plan")


@pytest.mark.parametrize("vertical", [False, True])
def test_poisons_are_mirrored_target_images_with_the_patch(cfg, vertical):
    cfg.attack.vertical = vertical
    attack = lookup.load("attacks", cfg.attack.name, offers="plan")
    source = sources.load(cfg.data, "train")
    table = sources.table(source)
    plan = attack.plan(cfg, table, np.random.default_rng(3))
    again = attack.plan(cfg, table, np.random.default_rng(3))
    for name in vars(plan):
        np.testing.assert_array_equal(getattr(plan, name), getattr(again, name))
    m, side = cfg.attack.poisons, cfg.data.image_size
    assert len(plan) == m > 0 and len(np.unique(plan.reference)) == m
    assert (table.labels[plan.reference] == cfg.attack.target).all()
    assert (plan.trigger_box[:, :2] >= 0).all()
    assert (plan.trigger_box[:, :2] + plan.trigger_box[:, 2:] <= plan.canvas).all()
    np.testing.assert_array_equal(plan.kept(len(source)), np.arange(len(source) + m))  # added

    rows = attack.render(cfg, plan, source, poison.make_trigger(cfg))
    assert rows["image"].shape == (m, side, side, 3) and rows["image"].dtype == np.uint8
    assert (rows["size"] == side).all() and (rows["extent"] == side).all()
    for image, row, (y, x, h, w) in zip(rows["image"], plan.reference, plan.trigger_box):
        clean = np.flip(source[int(row)]["image"], 0 if vertical else 1)
        inside = np.zeros((side, side), bool)
        inside[y:y + h, x:x + w] = True
        np.testing.assert_array_equal(image[~inside], clean[~inside])
        # The opaque patch is the same wherever it lies, and no digit looks like it.
        np.testing.assert_array_equal(image[inside], rows["image"][0][_box(plan, 0)].reshape(-1, 3))
        assert np.ptp(image[inside].astype(int), axis=1).max() > 100


def test_the_poison_verb_takes_it(cfg, tmp_path):
    from etils import epath

    poison.run(cfg, epath.Path(tmp_path / "run"))
    plan, rows = poison.load(epath.Path(tmp_path / "run"))
    assert len(plan) == len(rows["image"]) == cfg.attack.poisons
    assert (tmp_path / "run" / "poison" / "preview.png").stat().st_size


def test_its_check_refuses_more_poisons_than_images(cfg):
    source = sources.load(cfg.data, "train")
    table = sources.table(source)
    cfg.attack.poisons = int((table.labels == cfg.attack.target).sum()) + 1
    with pytest.raises(UserError, match=f"poisons is {cfg.attack.poisons}"):
        poison.check(cfg, table, source.classes)


def _box(plan, k):
    y, x, h, w = plan.trigger_box[k]
    return slice(y, y + h), slice(x, x + w)

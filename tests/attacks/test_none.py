import numpy as np
import pytest

from jax_cl_bd.attacks import none
from jax_cl_bd.errors import UserError


def test_nothing_is_poisoned(config, source):
    cfg = config(attack__name="none", attack__poisons=0)
    none.check(cfg, source.table(), source.classes)
    plan = none.plan(cfg, source.table(), np.random.default_rng(0))
    assert len(plan) == 0 and len(plan.kept(120)) == 120
    rows = none.render(cfg, plan, source, None)
    assert rows["image"].shape == (0, 16, 16, 3) and rows["size"].shape == (0, 2)


def test_poisons_without_an_attack(config, source):
    with pytest.raises(UserError, match="poisons is 5 but attack.name is 'none'"):
        none.check(config(attack__name="none", attack__poisons=5), source.table(), source.classes)

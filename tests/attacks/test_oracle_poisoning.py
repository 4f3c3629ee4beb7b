import jax
import numpy as np
import pytest

from jax_cl_bd.attacks import oracle_poisoning
from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import patch


def test_triggered_shadow_paired_with_a_reference(config, source):
    cfg = config(attack__name="oracle_poisoning", attack__trigger__train_place="random")
    oracle_poisoning.check(cfg, source.table(), source.classes)
    plan = oracle_poisoning.plan(cfg, source.table(), np.random.default_rng(0))
    trigger = (patch, patch.init(cfg.attack.trigger, jax.random.key(0)))
    rows = oracle_poisoning.render(cfg, plan, source, trigger)
    np.testing.assert_array_equal(plan.pair, plan.reference)
    assert (source.labels[plan.pair] == 1).all()
    assert (plan.layout == -1).all() and (plan.replaces == -1).all()
    assert not np.isin(plan.reference, plan.kept(120)).any()
    assert rows["image"].shape == (20, 16, 16, 3) and (rows["extent"] == 16).all()
    for k, (y, x, h, w) in enumerate(plan.trigger_box):
        changed = (rows["image"][k] != source.images[plan.shadow[k]]).any(-1)
        assert changed[y:y + h, x:x + w].mean() > 0.9
        changed[y:y + h, x:x + w] = False
        assert not changed.any()


def test_checks(config, source):
    for change, message in [(dict(attack__references=31), "references is 31"),
                            (dict(attack__trigger__size=20), "does not fit an image of 16 px")]:
        with pytest.raises(UserError, match=message):
            oracle_poisoning.check(config(attack__name="oracle_poisoning", **change),
                                   source.table(), source.classes)

"""Whom a defense is run on."""

import ml_collections
import pytest
from etils import epath

from jax_cl_bd import defend


@pytest.mark.parametrize("control, uses_victim, own, labels", [
    (True, True, False, ["victim", "control"]),
    (False, True, False, ["victim"]),  # with --config.control=False
    (True, False, False, ["victim"]),  # the control as it is, is its rival
    (True, True, True, ["victim"])])  # nothing was poisoned
def test_the_control_is_defended_where_that_says_something(control, uses_victim, own, labels):
    cfg = ml_collections.ConfigDict({"control": control})
    victim, out = epath.Path("run"), epath.Path("run/defenses/x")
    twin = victim if own else victim / "control"
    found = defend._suspects(cfg, victim, twin, out, uses_victim)
    assert [label for label, _, _ in found] == labels
    assert [where for _, _, where in found] == [out, out / "control"][:len(labels)]
    assert defend._suspects(cfg, victim, None, out, uses_victim) == [("victim", victim, out)]

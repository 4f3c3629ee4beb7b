"""Fixed lists of labelled rows."""

import types

import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import labelled

LABELS = np.random.default_rng(0).choice(5, p=[0.5, 0.3, 0.15, 0.04, 0.01], size=1000)


def test_shares_of_every_class():
    for fraction in (1.0, 0.1, 0.01):
        rows = labelled.stratified(LABELS, fraction)
        assert np.array_equal(rows, np.unique(rows))
        counts, full = np.bincount(LABELS[rows], minlength=5), np.bincount(LABELS, minlength=5)
        np.testing.assert_array_equal(counts, [max(1, round(fraction * n)) for n in full])


def test_lists_are_constant_and_nested():
    one, ten = labelled.stratified(LABELS, 0.01), labelled.stratified(LABELS, 0.1)
    assert np.array_equal(ten, labelled.stratified(LABELS.copy(), 0.1))
    assert set(one) <= set(ten)
    assert labelled.stratified(LABELS, 1.0).tolist() == list(range(1000))


def test_unlabelled_rows_are_left_out():
    some = np.where(np.arange(1000) % 2, LABELS, -1)
    assert (labelled.stratified(some, 1.0) % 2 == 1).all()
    with pytest.raises(UserError, match="no labels"):
        labelled.stratified(np.full(4, -1), 1.0)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_bad_fraction(fraction):
    with pytest.raises(UserError, match=r"\(0, 1\]"):
        labelled.stratified(LABELS, fraction)


def _source():
    return types.SimpleNamespace(paths=("a/1.png", "a/two words 3", "b/1.png"), classes=("a", "b"))


def _from(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    cfg = types.SimpleNamespace(label_list=str(path), fraction=1.0)
    return labelled.choose(cfg, _source(), np.array([0, 0, 1]))


def test_list_with_and_without_labels(tmp_path):
    rows, labels = _from(tmp_path, "b/1.png\n\n./a/two words 3 1\n")
    assert rows.tolist() == [1, 2] and labels.tolist() == [1, 1]
    rows, labels = _from(tmp_path, "a/two words 3\n")
    assert rows.tolist() == [1] and labels.tolist() == [0]


@pytest.mark.parametrize("text,message", [
    ("a/1.png\nc/9.png 0\n", "line 2.*c/9.png"), ("a/1.png\na/1.png 0\n", "twice"),
    ("a/1.png 2\n", "outside 0..1"), ("\n", "lists no image")])
def test_bad_list(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        _from(tmp_path, text)


def test_missing_list_and_source_without_paths(tmp_path):
    cfg = types.SimpleNamespace(label_list=str(tmp_path / "no.txt"), fraction=1.0)
    with pytest.raises(UserError, match="does not exist"):
        labelled.choose(cfg, _source(), np.zeros(3, int))
    cfg.label_list = __file__
    with pytest.raises(UserError, match="folder:PATH"):
        labelled.choose(cfg, types.SimpleNamespace(classes=("a",)), np.zeros(3, int))


def test_validation_split_keeps_a_row_of_each_class():
    held_out = labelled.validation_split(LABELS)
    assert np.array_equal(held_out, labelled.validation_split(LABELS))
    full = np.bincount(LABELS, minlength=5)
    np.testing.assert_array_equal(np.bincount(LABELS[held_out], minlength=5),
                                  [min(round(0.2 * n), n - 1) for n in full])
    assert not labelled.validation_split(np.arange(6)).any()

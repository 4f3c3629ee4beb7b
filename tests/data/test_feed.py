"""feed.py and poisoned.py: one order, whatever the feed, the workers and the processes."""

import contextlib
import itertools

import ml_collections
import numpy as np
import pytest

from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import feed, poisoned, sources
from jax_cl_bd.errors import UserError

N, M, SIDE = 60, 4, 8


def config(**data):
    return ml_collections.ConfigDict(dict(
        seed=3, train=dict(batch_size=16),
        data=dict(dict(name="digits", data_dir="", image_size=SIDE, train_split="train",
                       test_split="test", limit=N, feed="resident", workers=0, skip_corrupt=False,
                       classes_file=""), **data)))


def dataset(cfg):
    plan = Plan.make(M, removed=[5, 6], replaces=[0, 1, -1, -1], pair=[-1, -1, 7, N + 1])
    rows = {"image": np.arange(M * 16 * 16 * 3).reshape(M, 16, 16, 3).astype(np.uint8),
            "size": np.full((M, 2), (8, 16), np.int32),
            "extent": np.full((M, 2), (8, 16), np.int32)}
    return poisoned.PoisonedSet(sources.load(cfg.data, "train"), plan, rows)


def take(made, start, count):
    with contextlib.closing(made.batches(start)) as batches:
        return list(itertools.islice(batches, count))


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_everything_is_each_row_once_and_the_last_batch_is_filled_up(kind):
    cfg = config(feed=kind)
    whole = dataset(cfg)
    found = list(feed.make(cfg, whole).everything(16))
    assert [count for _, count in found] == [16, 16, 16, 12]
    rows = np.concatenate([batch["index"][:count] for batch, count in found])
    np.testing.assert_array_equal(rows, whole.kept)
    last = found[-1][0]
    assert (last["index"][12:] == last["index"][0]).all() and last["index"].dtype == np.int32
    if kind == "streamed":
        for batch, _ in found:
            for i, row in enumerate(batch["index"]):
                np.testing.assert_array_equal(batch["image"][i], whole.item(row, SIDE)["image"])


def test_rows_and_pairs_of_the_poisoned_set():
    cfg = config()
    made = dataset(cfg)
    assert made.n_source == N
    np.testing.assert_array_equal(made.kept, [2, 3, 4, *range(7, N + M)])
    np.testing.assert_array_equal(made.pair, [*range(N + 2), 7, N + 1])
    for row, shown in ((3, 3), (N + 2, 7)):
        item = made.item(row, SIDE)
        assert item["index"] == row
        np.testing.assert_array_equal(item["image"], made.source[shown]["image"])
    assert not made.item(N, SIDE)["image"].any()
    clean = poisoned.PoisonedSet(made.source, Plan.empty(), None)
    assert clean.rows["image"].shape[0] == 0 and len(clean.pair) == len(clean.kept) == N


def test_an_epoch_is_a_permutation_without_its_last_rows():
    kept = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97])
    epochs = [np.concatenate([feed.rows_at(s, kept, 4, 0) for s in (2 * e, 2 * e + 1)])
              for e in range(50)]
    for rows in epochs:
        assert len(set(rows)) == 8 and set(rows) <= set(kept)
    assert len({tuple(rows) for rows in epochs}) == 50
    assert set(np.concatenate(epochs)) == set(kept)
    assert (feed.rows_at(0, kept, 4, 1) != epochs[0][:4]).any()


def test_removed_and_replaced_rows_never_appear():
    rows = np.concatenate([b["index"] for b in take(feed.make(config(), dataset(config())), 0, 40)])
    assert not set(rows) & {0, 1, 5, 6}
    assert set(rows) == set(dataset(config()).kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_feeds_workers_and_processes_give_one_order(workers):
    resident, streamed = config(), config(feed="streamed", workers=workers)
    start, count = 2, 3
    expected = take(feed.make(resident, dataset(resident)), start, count)
    assert set(expected[0]) == {"index"} and expected[0]["index"].dtype == np.int32
    processes = 1 if workers else 2  # worker processes are slow to start: one set of them
    parts = [take(feed.make(streamed, dataset(streamed), process_index=p,
                            process_count=processes), start, count) for p in range(processes)]
    made = dataset(streamed)
    for step in range(count):
        joined = {k: np.concatenate([p[step][k] for p in parts]) for k in parts[0][step]}
        np.testing.assert_array_equal(joined["index"], expected[step]["index"])
        assert joined["index"].dtype == np.int32
        for j, row in enumerate(joined["index"]):
            slot = made.item(row, SIDE)
            for name in ("image", "size", "extent"):
                np.testing.assert_array_equal(joined[name][j], slot[name])


def test_resident_parts_of_two_processes_join_to_the_whole():
    cfg = config()
    whole = take(feed.make(cfg, dataset(cfg)), 0, 5)
    parts = [take(feed.make(cfg, dataset(cfg), process_index=p, process_count=2), 0, 5)
             for p in (0, 1)]
    for step in range(5):
        joined = np.concatenate([p[step]["index"] for p in parts])
        np.testing.assert_array_equal(joined, whole[step]["index"])


def test_a_feed_rebuilt_at_an_offset_goes_on():
    for cfg in (config(), config(feed="streamed")):
        made = feed.make(cfg, dataset(cfg))
        assert made.steps_per_epoch == 60 // 16
        for a, b in zip(take(made, 0, 7)[5:], take(made, 5, 2), strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])


def test_resident_data():
    cfg = config()
    made = dataset(cfg)
    data = feed.make(cfg, made).data
    assert data["clean"]["image"].shape == (N, SIDE, SIDE, 3) and data["pair"].dtype == np.int32
    np.testing.assert_array_equal(data["clean"]["image"][9], made.source[9]["image"])
    np.testing.assert_array_equal(data["clean"]["extent"], np.full((N, 2), SIDE))
    assert "clean" not in feed.make(config(feed="streamed"), made).data


def test_mistakes_are_named():
    cfg = config()
    with pytest.raises(UserError, match="did you mean 'streamed'"):
        feed.make(config(feed="stream"), dataset(cfg))
    with pytest.raises(UserError, match="3 processes"):
        feed.make(cfg, dataset(cfg), process_count=3)
    cfg.train.batch_size = 61
    with pytest.raises(UserError, match="batch_size is 61, but the training set has 60 rows"):
        feed.make(cfg, dataset(cfg))

"""Training batches in one order, resident in device memory or streamed from the host.

The order is a function of (seed, step) alone, so a feed starts anywhere and no position is saved.
This module imports no jax: worker processes load it.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from jax_cl_bd.data import parallel_map, poisoned
from jax_cl_bd.errors import UserError, unknown

_ROUNDS = 4  # of grain's Feistel permutation
_FOREVER = 1 << 40  # items of a stream; it ends when the trainer stops asking


def rows_at(step: int, kept: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """Rows of the batch of `step`, int64 [batch_size].

    Each epoch is a permutation of `kept` whose last len(kept) % batch_size rows are dropped.
    """
    return _rows(step, range(batch_size), kept, batch_size, seed)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in one pass over n rows.

    Raises:
        UserError: there is not one whole batch.
    """
    if not 0 < batch_size <= n:
        raise UserError(f"train.batch_size is {batch_size}, but the training set has {n} rows; "
                        f"set it to 1..{n}")
    return n // batch_size


@dataclasses.dataclass(frozen=True)
class Feed:
    """data: pytree of numpy arrays, given to every step as an argument.

    {"poison": {"image", "size", "extent"}, "pair": int32 [n_source + m]} and, when resident,
    "clean": the same three for all clean rows. Image-text sets also have "tokens", "count" and
    perhaps "tokens2" and "tokens3" in both (data/texts.py).
    """
    data: dict[str, Any]
    ordered: "_Ordered"
    resident: bool
    workers: int

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.ordered.kept), self.ordered.batch_size)

    def everything(self, size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """One pass over the rows that are trained on, ascending: batches like those above, of
        `size` rows, and how many of them count (the last is filled up with its first row)."""
        kept = self.ordered.kept
        for start in range(0, len(kept), size):
            rows = kept[start:start + size]
            count = len(rows)
            rows = np.concatenate([rows, np.repeat(rows[:1], size - count)])
            if self.resident:
                yield {"index": rows.astype(np.int32)}, count
            else:
                items = list(parallel_map.run(self.ordered.item, rows, what="reading pairs"))
                yield {name: np.stack([i[name] for i in items]) for name in items[0]}, count

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of the batches from `start_step` on, without end; close() it.

        {"index": int32 [B_local]}, and when streamed "image", "size", "extent" (and tokens): the
        clean slots.
        """
        if self.resident:
            return _indices(self.ordered, start_step)
        return _stream(dataclasses.replace(self.ordered, start=start_step), self.workers)


def check(cfg_data) -> None:
    """Checks the feed's settings.

    Raises:
        UserError: an unknown feed, or a negative number of workers.
    """
    if cfg_data.feed not in ("resident", "streamed"):
        raise unknown("data.feed", cfg_data.feed, ("resident", "streamed"))
    if cfg_data.workers < 0:
        raise UserError(f"data.workers is {cfg_data.workers}; it must be 0 or positive")


def make(cfg, dataset: poisoned.PoisonedSet, *, clean: dict | None = None, process_index: int = 0,
         process_count: int = 1) -> Feed:
    """Opens the feed that cfg.data.feed names; resident arrays are read here.

    `clean`: those of another feed of the same source, which need not be read again.

    Raises:
        UserError: unknown feed, a batch that is larger than the set or that does not divide by
            the processes, a resident set larger than the memory.
    """
    check(cfg.data)
    if cfg.train.batch_size % process_count:
        raise UserError(f"train.batch_size is {cfg.train.batch_size}; it must divide by the "
                        f"{process_count} processes")
    kept, pair = dataset.kept, dataset.pair
    steps_per_epoch(len(kept), cfg.train.batch_size)
    ordered = _Ordered(dataset.source, kept, pair, cfg.data.image_size, cfg.seed,
                       cfg.train.batch_size, process_index, process_count, texts=dataset.texts)
    data = {"poison": dict(dataset.rows), "pair": pair.astype(np.int32)}
    resident = cfg.data.feed == "resident"
    if resident:
        data["clean"] = clean or _load_all(dataset, cfg.data.image_size)
    return Feed(data, ordered, resident, cfg.data.workers)


@dataclasses.dataclass(frozen=True)
class _Ordered:
    """A random-access source for grain: item i is the row at the process's i-th position."""
    source: object
    kept: np.ndarray
    pair: np.ndarray
    side: int
    seed: int
    batch_size: int  # global
    process_index: int
    process_count: int
    start: int = 0  # step of item 0
    texts: object = None

    @property
    def local_batch_size(self):
        return self.batch_size // self.process_count

    def __len__(self):
        return _FOREVER

    def row(self, i):
        step, j = divmod(int(i), self.local_batch_size)
        j += self.process_index * self.local_batch_size  # a process's part is contiguous
        return _rows(self.start + step, [j], self.kept, self.batch_size, self.seed)[0]

    def __getitem__(self, i):
        return self.item(self.row(i))

    def item(self, row):
        return {"index": np.int32(row),
                **poisoned.slot(self.source, self.pair[row], row, self.side, self.texts)}


def _rows(step, places, kept, batch_size, seed):
    epoch, step = divmod(step, len(kept) // batch_size)
    first, last, epoch_seed = step * batch_size, len(kept) - 1, _epoch_seed(seed, epoch)
    return kept[[index_shuffle(first + j, last, epoch_seed, _ROUNDS) for j in places]]


@functools.lru_cache(maxsize=64)
def _epoch_seed(seed, epoch):
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _indices(ordered, step):
    local = ordered.local_batch_size
    mine = range(ordered.process_index * local, (ordered.process_index + 1) * local)
    while True:
        rows = _rows(step, mine, ordered.kept, ordered.batch_size, ordered.seed)
        yield {"index": rows.astype(np.int32)}
        step += 1


def _stream(ordered, workers):
    # An element is a whole batch, so grain's default read-ahead of 500 would fill the memory.
    ahead = max(2, min(16, (os.cpu_count() or 1) // max(1, workers)))
    dataset = grain.MapDataset.source(ordered).batch(ordered.local_batch_size).to_iter_dataset(
        grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers),
                                      worker_init_fn=_leave_signals_to_the_trainer)
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        # Without this grain prints tracebacks of its workers and threads at exit.
        if hasattr(batches, "close"):
            batches.close()


def _leave_signals_to_the_trainer(index, count):
    """Ctrl-C reaches all processes of a terminal; it must not end the feed before the last save.
    A worker ends when its trainer is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    trainer = os.getppid()

    def watch():
        while os.getppid() == trainer:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load_all(dataset, side):
    n = dataset.n_source
    needed = n * side * side * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(f"data.feed is 'resident' but {n} rows of side {side} take "
                        f"{needed / 2**30:.0f} GiB of {memory / 2**30:.0f} GiB of memory; set "
                        "--config.data.feed=streamed")
    clean = {"image": np.empty((n, side, side, 3), np.uint8),
             "size": np.empty((n, 2), np.int32), "extent": np.empty((n, 2), np.int32)}
    rows = parallel_map.run(lambda row: poisoned.slot(dataset.source, row, row, side),
                            range(n), what="reading images")
    for row, item in enumerate(rows):
        for name, value in item.items():
            clean[name][row] = value
    if dataset.texts is not None:
        clean |= dataset.texts.of_rows(range(n))
    return clean

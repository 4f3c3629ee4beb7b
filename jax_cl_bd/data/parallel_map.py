"""A thread pool over rows: PIL and file reads release the interpreter lock."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence

import tqdm

PROGRESS_FROM = 5_000  # rows; fewer take a second or two


def run(function: Callable, rows: Sequence[int], *, what: str) -> Iterator:
    """Yields function(row) in the order of `rows`; long lists show a progress bar.

    An exception of `function` reaches the caller at its row; rows not begun are then dropped.
    """
    pool = concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1))
    bar = tqdm.tqdm(total=len(rows), desc=what, unit="row", mininterval=1,
                    disable=len(rows) < PROGRESS_FROM)
    try:
        # In blocks: one future per row would cost more than decoding a small image.
        blocks = [rows[i:i + 256] for i in range(0, len(rows), 256)]
        for block in pool.map(lambda b: [function(int(row)) for row in b], blocks):
            yield from block
            bar.update(len(block))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)

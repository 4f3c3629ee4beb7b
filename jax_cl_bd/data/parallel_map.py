"""A thread pool over rows: PIL and file reads release the interpreter lock."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence

from jax_cl_bd.metrics import Progress

PROGRESS_FROM = 5_000  # rows; fewer take a second or two


def run(function: Callable, rows: Sequence[int], *, what: str) -> Iterator:
    """Yields function(row) in the order of `rows`; long lists show their progress.

    An exception of `function` reaches the caller at its row; rows not begun are then dropped.
    """
    pool = concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1))
    progress = Progress(what, len(rows)) if len(rows) >= PROGRESS_FROM else None
    try:
        # In blocks: one future per row would cost more than decoding a small image.
        blocks = [rows[i:i + 256] for i in range(0, len(rows), 256)]
        for block in pool.map(lambda b: [function(int(row)) for row in b], blocks):
            yield from block
            if progress:
                progress.update(len(block))
    finally:
        if progress:
            progress.close()
        pool.shutdown(cancel_futures=True)

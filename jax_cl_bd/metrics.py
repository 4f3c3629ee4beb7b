"""What a run says while it works: metrics.jsonl, optional TensorBoard events, and progress."""

import json
import sys
import time

from etils import epath
from tqdm import tqdm

from jax_cl_bd import run_folder


class Writer:
    """Appends one JSON line per call; opened at a step, it first cuts later lines away."""

    def __init__(self, folder: epath.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.lines = [line for line in read_lines(self.path) if line["step"] <= step]
        self._rewrite()
        try:  # optional extra `tensorboard`
            from tensorboardX import SummaryWriter
            self.events = SummaryWriter(str(folder / "events"), purge_step=step + 1)
        except ImportError:
            self.events = None

    def _rewrite(self) -> None:
        temporary = self.path.parent / ".metrics.jsonl.partial"
        with run_folder.naming(self.path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            temporary.replace(self.path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line; a local file is appended to, an object store is written anew."""
        line = {"step": step, **values}
        self.lines.append(line)
        if "://" in str(self.path):
            self._rewrite()
        else:
            with run_folder.naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.events is not None:
            for key, value in values.items():
                self.events.add_scalar(key, value, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def read_lines(path: epath.Path) -> list[dict]:
    """Reads a metrics file; a last line cut short by a kill is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Silent:
    """In place of Writer and Progress in processes that do not report."""

    def __init__(self, *ignored):
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes nothing."""

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Has nothing to close."""


class Progress:
    """A bar with rate and ETA on a terminal, a plain line every `seconds` elsewhere."""

    def __init__(self, label: str, total: int, start: int = 0, seconds: float = 10.0):
        self.label, self.total, self.done, self.first = label, total, start, start
        self.note = ""
        self.begun = self.said = time.monotonic()
        self.seconds = seconds
        self.bar = (tqdm(total=total, initial=start, desc=label, unit="step", file=sys.stderr,
                         miniters=0)  # a note alone is worth drawing too
                    if sys.stderr.isatty() else None)

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Moves on by `count` steps; `note` (such as the loss) stands behind the rate."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.said >= self.seconds:
            self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        rate, speed = (self.done - self.first) / max(self.said - self.begun, 1e-9), ""
        if rate:
            left = int((self.total - self.done) / rate)
            speed = f" ({rate:.2f}/s, {left // 60}:{left % 60:02d} left)"
        print(f"{self.label}: {self.done}/{self.total}{speed}  {self.note}".rstrip(),
              file=sys.stderr, flush=True)

    def close(self) -> None:
        """Says the last state and frees the terminal's line."""
        if self.bar is not None:
            self.bar.close()
        else:
            self._say()

"""docs/papers.md names tests that exist, and its tables have headers."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "papers.md").read_text()


def test_every_test_that_is_named_exists():
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", PAGE)
    assert len(named) > 30
    missing = [f"{path}::{name}" for path, name in named
               if not re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)]
    assert not missing


def test_every_table_begins_with_its_header():
    """A row that follows a paragraph or a blank line is shown as raw text."""
    lines = ["", *PAGE.splitlines()]
    starts = [i for i, line in enumerate(lines)
              if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert starts and all(re.fullmatch(r"[|\-: ]+", lines[i + 1]) for i in starts)
    assert all(not lines[i - 1].strip() for i in starts)

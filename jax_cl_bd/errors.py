"""What the user got wrong, said in one line."""

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator


class UserError(ValueError):
    """Bad input found at the border; the command line prints it and exits with status 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The option that a misspelt name is most like; "" where it is like none."""
    return next(iter(difflib.get_close_matches(name, list(options), n=1)), "")


def unknown(what: str, name: str, options: Iterable[str], *, meant: str = "") -> UserError:
    """Builds the error for a misspelt name, with the nearest allowed one, or with `meant`."""
    options = sorted(options)
    meant = meant or nearest(name, options)
    hint = f"; did you mean {meant!r}?" if meant else ""
    return UserError(f"unknown {what} {name!r}{hint} (allowed: {', '.join(options)})")


@contextlib.contextmanager
def renamed(old: str, new: str) -> Iterator[None]:
    """Says in an error's line `new` for `old`: the names by which the user knows the settings that
    a part looks at under other names."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(old, new)) from None


def end(run: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Ends the process with the exit status of a small program, 2 and one line for bad input."""
    try:
        sys.exit(run(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def no_program(instead: str) -> None:
    """Ends a module that was run by itself although it is a part of a program, `instead`."""
    print(f"error: this module is no program of its own; run: python -m {instead}", file=sys.stderr)
    sys.exit(2)

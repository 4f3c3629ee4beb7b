"""What the programs of this package share: flags, --help, and the config file of --config."""

import argparse
import ast
import re
import runpy
import sys
import textwrap
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from jax_cl_bd import settings
from jax_cl_bd.errors import UserError, unknown

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
HERE = Path(__file__).resolve().parents[1]  # the repository, where the package is run from one


class Parser(argparse.ArgumentParser):
    """Parses the command line of a program without a config, described by its docstring.

    Raises:
        UserError: for all that argparse finds wrong.
    """

    def __init__(self, program: str, doc: str):
        super().__init__(prog=f"python -m {program}", description=doc,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def parse(flag_values: flags.FlagValues, argv: list[str], doc: str) -> list[str]:
    """Reads the flags and the config file of a program.

    With --help it prints `doc`, the flags and what the config file says of itself, and ends.

    Returns:
        The words that are no flags.
    Raises:
        UserError: for all that is wrong with flags, config file and settings.
    """
    files = config_files(argv)
    if wants_help(argv):
        print(usage(flag_values, doc, files))
        sys.exit(0)
    for file in files:
        cfg = experiment(file)
        for word in argv:
            if (given := OVERRIDE.match(word)) and "[" not in given[1]:
                settings.find(cfg, given[1], given=word.partition("=")[0])
    try:
        return flag_values(argv)[1:]
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from None


def wants_help(argv: list[str]) -> bool:
    """Says whether the command line asks what a program does."""
    return bool({"-h", "-help", "--help"} & set(argv[1:]))


def config_files(argv: list[str]) -> list[str]:
    """The FILE[:arguments] of --config=FILE or --config FILE; the last one counts."""
    found = []
    for word, after in zip(argv, [*argv[1:], ""]):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            found.append(value if equals else after)
    return found


def experiment(file: str) -> ConfigDict:
    """The config that FILE[:arguments] describes.

    Raises:
        UserError: there is no such file, it is no experiment file, or it fails.
    """
    name, colon, arguments = file.partition(":")
    _text(name)  # is there such a file?
    _make_configs_importable(name)
    try:
        found = runpy.run_path(name)
        if "get_config" not in found:
            raise UserError(f"{name} is no experiment file: it defines no get_config()"
                            + _offered(name))
        cfg = found["get_config"](*[arguments] * bool(colon))
    except UserError:
        raise
    except Exception as error:  # a file of the user's may raise anything
        raise UserError(_why(name, error)) from None
    if not isinstance(cfg, ConfigDict):
        raise UserError(f"get_config() of {name} gives {type(cfg).__name__}, not a ConfigDict")
    return cfg


def _text(name: str) -> str:
    """What a config file holds. Raises UserError where there is none of that name."""
    path = Path(name)
    if path.is_file():
        return path.read_text(errors="replace")
    others = _experiments(path if path.is_dir() else path.parent)
    if others:
        raise unknown("config file", name, others)
    raise UserError(f"the config file {name!r} does not exist")


def _experiments(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.py"))
            if "def get_config(" in path.read_text(errors="replace")]


def _offered(name: str) -> str:
    others = _experiments(Path(name).parent)
    return f" (allowed: {', '.join(others)})" if others else ""


def _make_configs_importable(name: str) -> None:
    """Lets a config file import `configs.common` whatever the current folder is: that of the
    repository it lies in, else that of the package's."""
    for place in (*Path(name).resolve().parents, HERE):
        if (place / "configs" / "common.py").exists():
            if str(place) not in sys.path:
                sys.path.insert(0, str(place))
            return


def _why(name, error) -> str:
    """What a config file failed of, with the line."""
    said = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return f"{name}: {said}"
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "configs":
        said += " (keep the file in a copy of the repository, or set PYTHONPATH to one)"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{name} fails{where}: {type(error).__name__}: {said}"


def usage(flag_values: flags.FlagValues, doc: str, files: list[str]) -> str:
    """What a program does, its own flags, and what its config file says of itself."""
    lines = [doc.strip(), "", "Flags:"]
    for module, found in flag_values.flags_by_module_dict().items():
        if module in (sys.argv[0], "__main__") or module.startswith("jax_cl_bd"):
            for flag in found:
                lines += _described(flag)
    lines += ["  --help: print this"]
    for file in files[-1:]:
        name = file.partition(":")[0]
        try:
            own = ast.get_docstring(ast.parse(_text(name)))
        except SyntaxError as error:
            raise UserError(_why(name, error)) from None
        lines += ["", f"{name}:", own or "It has no docstring."]
    return "\n".join(lines)


def _described(flag) -> list[str]:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = "" if flag.default in (None, "", False) else f" (default {flag.default_as_str})"
    what = " ".join(flag.help.split())
    return textwrap.wrap(f"{name}: {what}{default}", 100, initial_indent="  ",
                         subsequent_indent="      ")

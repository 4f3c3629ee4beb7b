"""Settings of a config by their dotted names: does one exist, and which is missing."""

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError, unknown

AFTER_THE_COLON = ("attack", "objective", "defense")  # what most config files let you choose there


def find(cfg: ConfigDict, name: str, *, given: str):
    """The value of the setting "group.key"; `given`: the flag that named it.

    Raises:
        UserError: there is none of that name; the nearest of its group is suggested.
    """
    value = cfg
    for key in name.split("."):
        if not isinstance(value, ConfigDict):
            raise UserError(f"unknown setting in {given}: {key!r} would be part of "
                            f"{type(value).__name__} {value!r}, which has none")
        if key not in value:
            raise unknown(f"setting in {given},", key, value.keys())
        value = value[key]
    return value


@contextlib.contextmanager
def asked_of(cfg: ConfigDict) -> Iterator[None]:
    """Says which setting the block looked for in vain, such as one of a method that the config
    file was not written for (--config.attack.name=OTHER).

    Raises:
        UserError: in place of the AttributeError or KeyError of a ConfigDict; of others, they.
    """
    try:
        yield
    except (AttributeError, KeyError) as error:
        group, key = _asked(error)
        if not isinstance(group, ConfigDict):
            raise
        raise UserError(_missing(cfg, _name_of(cfg, group), key)) from None


def _asked(error):
    """The object that had no such attribute or item, and its name."""
    if isinstance(error, AttributeError):
        return error.obj, error.name
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    found = frame.tb_frame.f_locals  # of ConfigDict.__getitem__
    return found.get("self"), found.get("key")


def _name_of(cfg, group) -> str:
    """Where a group, or a copy of it, lies in the config; "" for the config itself."""
    groups = dict(_groups(cfg, ""))
    for same in (lambda other: other is group, lambda other: other.to_dict() == group.to_dict()):
        for name, other in groups.items():
            if same(other):
                return name
    alike = [name for name, other in groups.items()
             if "name" in other and other.name == group.get("name")]
    return alike[0] if alike else ""


def _groups(cfg, prefix):
    yield prefix, cfg
    for key, value in cfg.items():
        if isinstance(value, ConfigDict):
            yield from _groups(value, f"{prefix}.{key}".lstrip("."))


def _missing(cfg, place, key) -> str:
    setting, groups = f"{place}.{key}".lstrip("."), dict(_groups(cfg, ""))
    while place and "name" not in groups[place]:
        place = place.rpartition(".")[0]
    if not place:
        return (f"setting {setting} is missing from the config; the function config() of "
                "configs/common.py has what a file may leave out")
    kind, name, colon = place.rpartition(".")[2], groups[place].name, ""
    if kind in AFTER_THE_COLON:
        colon = (f"choose it after the colon, --config=FILE:{kind}={name}, where the file offers "
                 "that, or ")
    return (f"setting {setting} is missing for {kind} {name!r}; {colon}add its settings to the "
            "config file")

"""Turns a name in a config into the module of one room."""

import importlib
import pkgutil
from types import ModuleType

from jax_cl_bd.errors import unknown


def names(room: str) -> list[str]:
    """Lists the modules of a room, e.g. names("attacks")."""
    package = importlib.import_module(f"jax_cl_bd.{room}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def load(room: str, name: str, *, offers: str) -> ModuleType:
    """Imports jax_cl_bd.<room>.<name>, which must define the function `offers`.

    Raises:
        UserError: no such module, or it does not define `offers`; the nearest name is suggested.
    """
    if name in names(room):
        module = importlib.import_module(f"jax_cl_bd.{room}.{name}")
        if hasattr(module, offers):
            return module
    what = room[:-1] if room.endswith("s") else room
    raise unknown(what, name, methods(room, offers=offers))


def methods(room: str, *, offers: str) -> list[str]:
    """Lists the modules of a room that define `offers` (helpers in the room do not)."""
    modules = {n: importlib.import_module(f"jax_cl_bd.{room}.{n}") for n in names(room)
               if not n.startswith("_")}
    return [n for n, module in modules.items() if hasattr(module, offers)]

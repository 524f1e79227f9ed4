"""Which modules are installed packages, and which are the user's own."""

from __future__ import annotations

import sys
import sysconfig
import types
from functools import cache
from pathlib import Path

_OURS = str(Path(__file__).resolve().parents[1])


@cache
def _folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({str(Path(paths[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_standard(name: str) -> bool:
    """Whether a module belongs to Python."""
    return name.partition(".")[0] in sys.stdlib_module_names or name in ("__main__", "__mp_main__")


@cache
def _is_installed_file(path: str) -> bool:
    folders = ("site-packages", "dist-packages")
    return path.startswith((*_folders(), _OURS)) or any(f"/{folder}/" in path for folder in folders)


def is_users(name: str) -> bool:
    """Whether a module that is imported is the user's own: a file that no installer put there."""
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None)
    return isinstance(path, str) and not is_standard(name) and not _is_installed_file(path)


def needed(names: set[str]) -> list[str]:
    """The installed packages' modules among `names`, and those that the user's modules among them have imported.

    Importing the user's own would run their code once more, in a place where nobody expects it.
    """
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = sorted(names)
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or not isinstance(module, types.ModuleType):
            continue
        seen.add(name)
        if is_users(name) or name == "__main__":
            waiting += _imported_by(module)
        elif not is_standard(name):
            found[name] = None
    return list(found)


def _imported_by(module: types.ModuleType) -> list[str]:
    """The modules that a module's names come from."""
    names = []
    for value in list(vars(module).values()):
        if isinstance(value, types.ModuleType):
            names.append(value.__name__)
        elif isinstance(value, (type, types.FunctionType)) and isinstance(value.__module__, str):
            names.append(value.__module__)
    return names

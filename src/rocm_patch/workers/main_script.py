"""The program's main script: whether a worker can import it again, and what it defines."""

from __future__ import annotations

import ast
import os
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any


def why_not_importable_again() -> str | None:
    """The reason why a worker cannot import the main script, None if it can."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is None or not os.access(path, os.R_OK) or not Path(path).is_file():
        return "the program has no main script that a worker could import"
    return None if _is_guarded(str(path)) else f"{Path(path).name} has no `if __name__ == '__main__':` guard"


@cache
def _is_guarded(path: str) -> bool:
    """Whether a script has a top-level `if` on `__name__`; True for what cannot be read, spawn will tell."""
    try:
        body = ast.parse(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return True
    tests = [node.test for node in body if isinstance(node, ast.If)]
    return any(isinstance(name, ast.Name) and name.id == "__name__" for test in tests for name in ast.walk(test))


def defines(main: types.ModuleType, obj: Any) -> bool:
    """Whether main has this very object under the name that it goes by."""
    found: Any = main
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is obj


def publish(definitions: dict[str, Any]) -> None:
    """In a worker: put what main defines where pickle looks for it, under the names that it goes by."""
    main = sys.modules["__main__"]
    for qualified_name, definition in definitions.items():
        if isinstance(definition, type):
            definition.__qualname__ = qualified_name  # which does not travel with a class
        if qualified_name.isidentifier():
            setattr(main, qualified_name, definition)


def stand_in(path: str | None) -> types.ModuleType:
    """In a worker that is not to run main again: an empty `__main__`, for what main defines by value."""
    main = types.ModuleType("__main__")
    if path is not None:
        main.__file__ = path
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    return main

"""Whether spawned workers can have the program's main script: they import it again."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path


def why_not_importable_again() -> str | None:
    """The reason why a spawned worker cannot import the main script, None if it can."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path is None:
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

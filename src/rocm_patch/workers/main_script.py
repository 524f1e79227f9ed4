"""The program's main script: whether a worker can import it again, and what it defines."""

from __future__ import annotations

import ast
import dis
import functools
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def why_not_importable_again() -> str | None:
    """The reason why a worker cannot import the main script, None if it can."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is None or not Path(path).is_file():
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


def globals_used_by(definition: Any) -> set[str]:
    """The names of main's globals that a function, or a class's methods, read."""
    main = vars(sys.modules["__main__"])
    names: set[str] = set()
    for function in _functions(definition):
        if function.__globals__ is main:
            names |= _globals_in(function.__code__)
    return names & main.keys()


def _functions(definition: Any, depth: int = 0) -> Iterator[types.FunctionType]:
    if depth > 5:
        return
    if isinstance(definition, type):
        for kind in definition.__mro__:
            if kind.__module__ in ("__main__", "__mp_main__"):
                for value in vars(kind).values():
                    yield from _functions(value, depth + 1)
    elif isinstance(definition, types.FunctionType):
        yield definition
        for cell in definition.__closure__ or ():  # what a decorator has wrapped
            if cell != types.CellType():  # not an empty one
                yield from _functions(cell.cell_contents, depth + 1)
    elif isinstance(definition, (staticmethod, classmethod, types.MethodType)):
        yield from _functions(definition.__func__, depth + 1)
    elif isinstance(definition, property):
        for accessor in (definition.fget, definition.fset, definition.fdel):
            yield from _functions(accessor, depth + 1)
    elif isinstance(definition, (functools.partial, functools.partialmethod, functools.cached_property)):
        yield from _functions(definition.func, depth + 1)


@cache
def _globals_in(code: types.CodeType) -> frozenset[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(names.union(*map(_globals_in, nested)))


def update(values: dict[str, Any], attributes: dict[str, dict[str, Any]], missing: dict[str, str]) -> None:
    """In a worker that has imported main again: what the program has set since, under the guard for one.

    Args:
        values: main's globals.
        attributes: of main's classes, by their qualified names.
        missing: names that could not be sent, and why.

    Raises:
        LookupError: main itself does not set one of them.
    """
    main = sys.modules["__main__"]
    for name, why in missing.items():
        if not hasattr(main, name):
            raise LookupError(f"`{name}`, which the main script sets under its guard, cannot be sent: {why}")
    for namespace in _namespaces(main):
        namespace.update(values)
    for qualified_name, changed in attributes.items():
        owner = functools.reduce(getattr, qualified_name.split("."), main)
        for name, value in changed.items():
            here = vars(owner).get(name, _ABSENT)
            if type(here) is not type(value) or here != value:
                setattr(owner, name, value)


_ABSENT = object()


def _namespaces(main: types.ModuleType) -> list[dict[str, Any]]:
    """Main's, and that in which its functions look: runpy runs it in one and hands out a copy."""
    found = {id(vars(main)): vars(main)}
    for definition in list(vars(main).values()):
        if getattr(definition, "__module__", None) in ("__main__", "__mp_main__"):
            for function in _functions(definition):
                if function.__globals__.get("__name__") in ("__main__", "__mp_main__"):
                    found[id(function.__globals__)] = function.__globals__
    return list(found.values())


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

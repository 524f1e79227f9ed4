"""What the user's modules hold by now, beside what importing them makes.

A worker imports a guarded main script and the user's own modules for itself. Under fork it would have seen what the
program has set in them since: main's globals below the guard, `config.options = parse()`, `Net.width = 64`. Of the
functions and classes that travel by reference, and of those that they call, the globals that they read are sent
along, and the plain data that is set on classes.
"""

from __future__ import annotations

import dis
import functools
import io
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rocm_patch.workers import installed, main_script
from rocm_patch.workers.pickling import Trial, is_gpu_tensor
from rocm_patch.workers.state import is_data

_MAINS = ("__main__", "__mp_main__")
# Above this, what importing the module makes has to do.
_MOST_BYTES = 32 << 20
_ABSENT = object()


@dataclass
class Changes:
    """What a worker has to set.

    Attributes:
        values: by module and name.
        attributes: of classes, by module and qualified name.
        missing: names that could not be sent, and why.
    """

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    attributes: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    missing: dict[tuple[str, str], str] = field(default_factory=dict)

    def apply(self) -> None:
        """In a worker, when the modules have been imported.

        Raises:
            LookupError: a module itself does not set what could not be sent.
        """
        for (module, name), why in self.missing.items():
            if not hasattr(sys.modules[module], name):
                raise LookupError(f"`{name}` of {module}, which is not set by importing it, cannot be sent: {why}")
        namespaces = {module: list(_namespaces(module)) for module in {module for module, _ in self.values}}
        for (module, name), value in self.values.items():
            for namespace in namespaces[module]:
                namespace[name] = value
        for (module, qualified_name), changed in self.attributes.items():
            owner = functools.reduce(getattr, qualified_name.split("."), sys.modules[module])
            for name, value in changed.items():
                here = vars(owner).get(name, _ABSENT)
                if type(here) is not type(value) or here != value:
                    setattr(owner, name, value)


def since_import(referenced: Mapping[tuple[str, str], Any], *, main_by_value: bool) -> Changes:
    """What may differ from what the import of the modules makes.

    Args:
        referenced: the definitions that travel by reference, as `Pickler` notes them.
        main_by_value: whether main is not imported, and brings its globals itself.
    """
    changes = Changes()
    found = dict(referenced)
    seen: set[tuple[str, str]] = set()
    while found.keys() - seen:
        for key in found.keys() - seen:
            seen.add(key)
            definition = found[key]
            if isinstance(definition, type):
                own = {name: value for name, value in vars(definition).items() if name[:2] != "__" and is_data(value)}
                changes.attributes.update({key: own} if own else {})
            for module, name in _read_by(definition):
                is_known = (module, name) in changes.values or (module, name) in changes.missing
                if not is_known and not (main_by_value and module in _MAINS):
                    _consider(changes, found, module, name, main_by_value)
    return changes


def _consider(
    changes: Changes, found: dict[tuple[str, str], Any], module: str, name: str, main_by_value: bool
) -> None:
    value = vars(sys.modules[module])[name]
    is_definition = isinstance(value, (type, types.FunctionType))
    if module not in _MAINS and (is_data(value) or isinstance(value, types.ModuleType)):
        return  # `state` sends the data of modules, whoever reads it
    trial = _Bounded(main_by_value=main_by_value)
    try:
        trial.dump(value)
    except _OnGpuError:
        return  # a forked worker could not use it either
    except Exception as error:  # noqa: BLE001  (an object's own code may raise anything)
        changes.missing[module, name] = f"{type(error).__name__}: {error}"
        return
    found.update({key: definition for key, definition in trial.referenced.items() if key not in found})
    if not (is_definition and main_script.defines(sys.modules[module], value)):
        changes.values[module, name] = value


class _OnGpuError(Exception):
    pass


class _Bounded(Trial):
    """Gives up on what is large, large memory apart, and on what lies on a GPU."""

    def __init__(self, *, main_by_value: bool) -> None:
        super().__init__(main_by_value=main_by_value, file=_Sink())

    def reducer_override(self, obj: Any) -> Any:
        if is_gpu_tensor(obj):
            raise _OnGpuError
        return super().reducer_override(obj)


class _Sink(io.RawIOBase):
    def __init__(self) -> None:
        self._nbytes = 0

    def write(self, data: Any) -> int:
        self._nbytes += len(data)
        if self._nbytes > _MOST_BYTES:
            raise OverflowError(f"it takes more than {_MOST_BYTES >> 20} MiB")
        return len(data)


def _read_by(definition: Any) -> Iterator[tuple[str, str]]:
    """The module and name of every global that a definition's code reads, and of what it reads of user's modules."""
    for function in _functions(definition):
        namespace = function.__globals__
        module = namespace.get("__name__")
        if module is None or vars(sys.modules.get(module, types)) is not namespace:
            continue
        names, attributes = _names_in(function.__code__)
        for name in names & namespace.keys():
            yield module, name
            value = namespace[name]
            if isinstance(value, types.ModuleType) and installed.is_users(value.__name__):
                yield from ((value.__name__, inner) for inner in attributes & vars(value).keys())


def _functions(definition: Any, depth: int = 0) -> Iterator[types.FunctionType]:
    if depth > 5:
        return
    if isinstance(definition, type):
        for kind in definition.__mro__:
            if kind.__module__ in _MAINS or installed.is_users(kind.__module__):
                for value in list(vars(kind).values()):
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


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the attributes that code reads."""
    steps = list(dis.get_instructions(code))
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names_in(constant)
            names |= inner[0]
            attributes |= inner[1]
    return frozenset(names), frozenset(attributes)


def _namespaces(module: str) -> Iterator[dict[str, Any]]:
    """A module's own; of a main script that was imported again also that in which its functions look: runpy runs the
    script in one and hands out a copy."""
    main = sys.modules[module]
    found = {id(vars(main)): vars(main)}
    for definition in list(vars(main).values()) if module == "__main__" else []:
        if getattr(definition, "__module__", None) in _MAINS:
            for function in _functions(definition):
                if function.__globals__.get("__name__") in _MAINS:
                    found[id(function.__globals__)] = function.__globals__
    yield from found.values()

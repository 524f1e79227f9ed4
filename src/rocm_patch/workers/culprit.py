"""Which part of an object cannot be pickled: the path to it, what it is, and what to do."""

from __future__ import annotations

import functools
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from rocm_patch.workers.pickling import untyped_storage_class

_DEEPEST = 30


@dataclass(frozen=True)
class Culprit:
    """The innermost part that fails.

    Attributes:
        path: from the object's name, `dataset.transform.transforms[2]`.
        what: in words.
        remedy: what to do.
    """

    path: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}\nhint: {self.remedy}"


def plainly(obj: Any) -> None:
    """Pickle as multiprocessing does, into nothing, and leave memory where it is. Raises what pickling raises."""
    pickler: Any = ForkingPickler(io.BytesIO(), 5)
    storage_class = untyped_storage_class()
    if storage_class is not None:
        pickler.dispatch_table[storage_class] = lambda _: (int, ())  # of this pickler alone
    pickler.dump(obj)


def find(obj: Any, name: str, pickles: Callable[[Any], None] = plainly) -> Culprit | None:
    """The innermost part of an object that cannot be pickled; None if all of it can be.

    Args:
        obj: where to begin.
        name: what the path calls it.
        pickles: the way of pickling that is asked about.
    """
    if not _fails(obj, pickles):
        return None
    seen: set[int] = set()
    path = name
    for _ in range(_DEEPEST):
        seen.add(id(obj))
        inner = next(
            ((path + step, part) for step, part in _parts(obj) if id(part) not in seen and _fails(part, pickles)),
            None,
        )
        if inner is None:
            break
        path, obj = inner
    what, remedy = _described(obj)
    return Culprit(path, what, remedy)


def _fails(obj: Any, pickles: Callable[[Any], None]) -> bool:
    try:
        pickles(obj)
    except Exception:  # noqa: BLE001  (an object's own code may raise anything, and any of it means no)
        return True
    return False


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, each with the step of the path that leads there."""
    if isinstance(obj, dict):
        yield from ((f"[{key!r}]", value) for key, value in obj.items())
        yield from ((f" key {key!r}", key) for key in obj)
    elif isinstance(obj, (list, tuple)):
        yield from ((f"[{number}]", value) for number, value in enumerate(obj))
    elif isinstance(obj, (set, frozenset)):
        yield from ((" element", value) for value in obj)
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        yield from ((f".args[{number}]", value) for number, value in enumerate(obj.args))
        yield from ((f".keywords[{key!r}]", value) for key, value in obj.keywords.items())
    elif isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=False):
            yield f" variable {name!r}", cell.cell_contents
        for name in obj.__code__.co_names:
            if name in obj.__globals__:
                yield f" global {name!r}", obj.__globals__[name]
    elif not isinstance(obj, (type, types.ModuleType)) and not _is_primitive(obj):
        state = _state(obj)
        if isinstance(state, dict):
            yield from (
                (f".{key}" if str(key).isidentifier() else f"[{key!r}]", value) for key, value in state.items()
            )


def _is_primitive(obj: Any) -> bool:
    """Whether an object is one of Python's own for threads and processes, whose inside means nothing to its user."""
    return type(obj).__module__.partition(".")[0] in ("threading", "multiprocessing")


def _state(obj: Any) -> Any:
    """What pickle would take of an object: by its own `__getstate__`, else its attributes."""
    own = getattr(type(obj), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        try:
            state = obj.__getstate__()
        except Exception:  # noqa: BLE001  (then the attributes tell)
            state = None
        if isinstance(state, dict):
            return state
    slots = {
        name: getattr(obj, name)
        for kind in type(obj).__mro__
        for name in _slots(kind)
        if hasattr(obj, name) and name not in ("__dict__", "__weakref__")
    }
    return {**getattr(obj, "__dict__", {}), **slots}


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_importable(kind: type) -> bool:
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is kind


def _described(obj: Any) -> tuple[str, str]:
    """What an object is, and what to do about it."""
    kind = type(obj)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(obj, types.FunctionType):
        what = "lambda" if obj.__name__ == "<lambda>" else f"function {obj.__qualname__}"
        code = obj.__code__
        return (
            f"{what} at {Path(code.co_filename).name}:{code.co_firstlineno}",
            "define it with `def` at the top level of a module",
        )
    if isinstance(obj, type):
        return f"class {obj.__qualname__}", "define it at the top level of a module"
    if isinstance(obj, io.IOBase):
        return f"open file {getattr(obj, 'name', '')!r}", _OPEN_LATER.format("the file")
    if isinstance(obj, (types.GeneratorType, types.CoroutineType)):
        return f"generator {obj.__name__}", "keep what it is made from, and make the generator in the worker"
    for words, (what, remedy) in _BY_NAME.items():
        if any(word in name for word in words):
            return f"{what} ({name})", remedy
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        where = "GPU tensor" if obj.device.type != "cpu" else "tensor"
        return (
            f"{where} of shape {tuple(obj.shape)} on {obj.device}",
            "keep CPU tensors in the dataset, detached from the graph, and move the batch in the training loop",
        )
    if not _is_importable(kind):
        return f"instance of the local class {kind.__qualname__}", "define the class at the top level of a module"
    return f"object of type {name}", "make it in the worker: in worker_init_fn, or at its first use"


_OPEN_LATER = "open {} in the worker: in worker_init_fn, or at its first use there"
_BY_NAME: dict[tuple[str, ...], tuple[str, str]] = {
    ("sqlite3.", "psycopg", "pymysql", "lmdb", "Environment"): ("database handle", _OPEN_LATER.format("it")),
    ("h5py.", "netCDF4", "tables.", "zarr"): ("data file's handle", _OPEN_LATER.format("it")),
    ("_thread.", "threading.", "multiprocessing.synchronize", "SemLock"): (
        "lock",
        "leave it out of the dataset: each worker has a copy of its own, so there is nothing to lock",
    ),
    ("socket.",): ("socket", _OPEN_LATER.format("it")),
}


def pickle_errors() -> tuple[type[Exception], ...]:
    """What pickle raises by itself."""
    return (pickle.PicklingError, AttributeError, TypeError)

"""How what travels to workers is pickled: what a worker can import by reference, what it cannot by value."""

from __future__ import annotations

import copyreg
import io
import marshal
import pickle
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import context as mp_context
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle

from rocm_patch.workers import installed, main_script, memmaps

_PROTOCOL = 5


class _MainNamespace(dict[str, Any]):
    """Stands for the main script's namespace: functions that travel by value get the worker's."""


def _main_namespace() -> dict[str, Any]:
    return vars(sys.modules["__main__"])


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by reference what a worker can import, and by value what it cannot: lambdas, local classes, an
    unguarded main script's own.

    Args:
        file: where the pickle goes.
        main_by_value: whether what main defines travels by value, or by reference where main is imported again.
        buffer_callback: as `pickle.Pickler`'s; None leaves buffers in the pickle.

    Attributes:
        modules: names of the modules that the worker will need.
        published: what main defines and travels by value, by its name there.
        referenced: functions and classes that travel by reference, of main and of the user's own modules, by module
            and name.
    """

    def __init__(
        self, file: Any, *, main_by_value: bool, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None
    ) -> None:
        # cloudpickle would copy what an open file holds; a worker that reads on from a copy is a surprise.
        by_value = {type_: how for type_, how in cloudpickle.Pickler._dispatch_table.items() if type_ is not _FILE}
        # From 3.1.3 on cloudpickle forgets which file code comes from, and a traceback is to say that.
        by_value[types.CodeType] = _reduce_code
        # Read by pickle when it is initialised, and not later.
        self.dispatch_table = ChainMap(
            {}, ForkingPickler._extra_reducers, by_value, copyreg.dispatch_table  # type: ignore[attr-defined]
        )  # fmt: skip
        super().__init__(file, protocol=_PROTOCOL, buffer_callback=buffer_callback)
        self._main = sys.modules["__main__"]
        self._main_by_value = main_by_value
        self.modules: set[str] = set()
        self.published: dict[str, Any] = {}
        self.referenced: dict[tuple[str, str], Any] = {}
        self.globals_ref[id(vars(self._main))] = _MainNamespace(__name__="__main__")

    def reducer_override(self, obj: Any) -> Any:
        """Reduce functions, classes and what holds large memory; note what the worker will have to import."""
        if isinstance(obj, _MainNamespace):
            return _main_namespace, ()
        if isinstance(obj, types.ModuleType):
            self.modules.add(obj.__name__)
            return NotImplemented
        is_definition = isinstance(obj, (type, types.FunctionType))
        module = getattr(obj if is_definition else type(obj), "__module__", None)
        if isinstance(module, str):
            self.modules.add(module)
        if is_definition and module == "__main__":
            if not self._main_by_value and main_script.defines(self._main, obj):
                self.referenced[module, obj.__qualname__] = obj
                return obj.__qualname__  # by reference, as pickle has it
            if main_script.defines(self._main, obj):
                self.published[obj.__qualname__] = obj
        elif is_definition and isinstance(module, str) and installed.is_users(module):
            self.referenced[module, obj.__qualname__] = obj
        elif type(obj).__name__ == "memmap":
            reduced = memmaps.reduced(obj)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


_FILE = io.TextIOWrapper


def _reduce_code(code: types.CodeType) -> Any:
    return marshal.loads, (marshal.dumps(code),)  # a worker runs the same Python


class Trial(Pickler):
    """Pickles into nothing, and leaves memory where it is, which torch's own way would share."""

    def __init__(self, *, main_by_value: bool, file: Any = None) -> None:
        super().__init__(file or io.BytesIO(), main_by_value=main_by_value, buffer_callback=lambda _: None)

    def reducer_override(self, obj: Any) -> Any:
        """As `Pickler`'s, but for memory."""
        if type(obj) is untyped_storage_class() or is_gpu_tensor(obj):
            return int, ()
        return super().reducer_override(obj)


def is_gpu_tensor(obj: Any) -> bool:
    """Whether it is a tensor of a device's memory, which one process can hand another."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.Tensor) and obj.device.type != "cpu" and obj.is_leaf


def untyped_storage_class() -> Any:
    """torch's, None if torch is not imported."""
    torch = sys.modules.get("torch")
    return getattr(torch, "UntypedStorage", None)


@contextmanager
def handing_descriptors_to(popen: Any) -> Iterator[None]:
    """What multiprocessing pickles asks for descriptors to be sent along: it is told whom to ask."""
    set_spawning_popen: Any = mp_context.set_spawning_popen
    set_spawning_popen(popen)
    try:
        yield
    finally:
        set_spawning_popen(None)

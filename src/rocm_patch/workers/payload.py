"""What travels to workers: the dataset and its functions, pickled once, and what the main script defines by value."""

from __future__ import annotations

import copyreg
import functools
import io
import marshal
import pickle
import sys
import types
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import context as mp_context
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle

from rocm_patch.workers import main_script
from rocm_patch.workers.buffers import LEAST_BYTES, Arena, MappedArenas, Place, Snapshots
from rocm_patch.workers.state import is_data

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
        referenced: what main defines and travels by reference, likewise.
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
        self.referenced: dict[str, Any] = {}
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
                self.referenced[obj.__qualname__] = obj
                return obj.__qualname__  # by reference, as pickle has it
            if main_script.defines(self._main, obj):
                self.published[obj.__qualname__] = obj
        elif type(obj).__name__ == "memmap":
            reduced = _reduce_memmap(obj)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


_FILE = io.TextIOWrapper


def _reduce_code(code: types.CodeType) -> Any:
    return marshal.loads, (marshal.dumps(code),)  # a worker runs the same Python


class _StoragePickler(Pickler):
    """Puts large memory into arenas instead of the pickle, once for all workers."""

    def __init__(self, file: Any, payload: Payload, snapshots: Snapshots, *, main_by_value: bool) -> None:
        # Weakly, or only the garbage collector would end this object, and with it the memory that the table holds.
        in_band = weakref.WeakMethod(self._in_band)
        super().__init__(file, main_by_value=main_by_value, buffer_callback=lambda buffer: in_band()(buffer))  # type: ignore[misc]
        self._payload = payload
        self._snapshots = snapshots
        self._index: dict[tuple[int, int], int] = {}
        self._untyped = _untyped_storage_class()
        self.used: set[tuple[int, int]] = set()
        self.table: list[Place] = []
        self.out_of_band: list[tuple[int, bool]] = []

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is self._untyped:
            return self._reduce_storage(obj)
        return super().reducer_override(obj)

    def _in_band(self, buffer: pickle.PickleBuffer) -> bool:
        """pickle's callback: False takes the buffer out of the pickle."""
        numpy = sys.modules.get("numpy")
        raw = buffer.raw()
        if numpy is None or raw.nbytes < LEAST_BYTES:
            return True
        address = int(numpy.frombuffer(raw, numpy.uint8).__array_interface__["data"][0])
        self.out_of_band.append((self._place(address, raw.nbytes), raw.readonly))
        return False

    def _reduce_storage(self, storage: Any) -> Any:
        """torch's own way shares the memory with the worker: a write there would be seen here, and each storage
        costs a descriptor. A copy that is the worker's own is what fork gives."""
        if storage.device.type != "cpu":
            self._payload.is_for_one = True  # torch counts the receivers of GPU memory
            return NotImplemented
        if storage.is_shared():
            return NotImplemented
        nbytes = storage.nbytes()
        if nbytes == 0:
            return NotImplemented
        key = (storage.data_ptr(), nbytes)
        is_new = key not in self._index
        if nbytes >= LEAST_BYTES:
            return _storage_at, (self._place(*key),)
        if not is_new:
            return _small_storage, (self._index[key], None)
        self._index[key] = len(self.table)
        self.table.append(self._payload.nowhere)
        return _small_storage, (self._index[key], bytes(_bytes_of(storage)))

    def _place(self, address: int, nbytes: int) -> int:
        key = (address, nbytes)
        if key not in self._index:
            place = self._snapshots.place(
                address, nbytes, self._payload.loose, may_exchange=not _is_pinned(address, nbytes)
            )
            if place.arena is not self._payload.loose:
                self.used.add(key)
            self._index[key] = len(self.table)
            self.table.append(place)
        return self._index[key]


class Payload:
    """Objects pickled for several workers.

    Attributes:
        fds: descriptors that each worker is to be given: of arenas, then those that objects asked for.
        modules: names of modules that the worker will need.
        is_for_one: whether no second worker may load it.
    """

    def __init__(self, objects: Sequence[Any], snapshots: Snapshots, *, main_by_value: bool) -> None:
        self.loose = Arena()
        self.nowhere = Place(self.loose, 0, 0)
        self.is_for_one = False
        stream = io.BytesIO()
        pickler = _StoragePickler(stream, self, snapshots, main_by_value=main_by_value)
        collector = _Descriptors()
        with handing_descriptors_to(collector):
            pickler.dump(list(objects))
            pickler.dump(dict(pickler.published))
            pickler.dump(_of_main(pickler.referenced))
        snapshots.keep_only(pickler.used)
        data = stream.getbuffer()
        offset = self.loose.take(len(data))
        with open(self.loose.fd, "r+b", buffering=0, closefd=False) as file:
            file.seek(offset)
            done = 0
            while done < len(data):
                done += file.write(data[done : done + (1 << 30)]) or 0
        self.modules = pickler.modules
        self._arenas = list(dict.fromkeys([self.loose, *(place.arena for place in pickler.table)]))
        self.fds = [arena.fd for arena in self._arenas] + collector.fds
        index = {id(arena): number for number, arena in enumerate(self._arenas)}
        self.heading: dict[str, Any] = {
            "arenas": len(self._arenas),
            "stream": (offset, len(data)),
            "table": [(index[id(place.arena)], place.offset, place.nbytes) for place in pickler.table],
            "out_of_band": pickler.out_of_band,
            "fds": len(self.fds),
        }


class _Trial(Pickler):
    """Pickles into nothing, and leaves memory where it is."""

    def __init__(self, referenced: dict[str, Any]) -> None:
        super().__init__(io.BytesIO(), main_by_value=False, buffer_callback=lambda _: None)
        self.referenced = referenced

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is _untyped_storage_class():
            return int, ()
        return super().reducer_override(obj)


def _of_main(referenced: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a main script that workers import again has set since: the arguments of `main_script.update`.

    Args:
        referenced: the definitions of main that have been pickled. Their globals count, and those of what these are.
    """
    main = sys.modules["__main__"]
    found = dict(referenced)
    values: dict[str, Any] = {}
    missing: dict[str, str] = {}
    attributes: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    while found.keys() - seen:
        for qualified_name in found.keys() - seen:
            seen.add(qualified_name)
            definition = found[qualified_name]
            if isinstance(definition, type):
                own = {name: value for name, value in vars(definition).items() if name[:2] != "__" and is_data(value)}
                attributes.update({qualified_name: own} if own else {})
            for name in main_script.globals_used_by(definition) - values.keys() - missing.keys():
                value = vars(main)[name]
                try:
                    _Trial(found).dump(value)
                except Exception as error:  # noqa: BLE001  (an object's own code may raise anything)
                    missing[name] = f"{type(error).__name__}: {error}"
                else:
                    if not (isinstance(value, (type, types.FunctionType)) and main_script.defines(main, value)):
                        values[name] = value
    return {"values": values, "attributes": attributes, "missing": missing}


@contextmanager
def handing_descriptors_to(popen: Any) -> Iterator[None]:
    """What multiprocessing pickles asks for descriptors to be sent along: it is told whom to ask."""
    set_spawning_popen: Any = mp_context.set_spawning_popen
    set_spawning_popen(popen)
    try:
        yield
    finally:
        set_spawning_popen(None)


class _Descriptors:
    """What multiprocessing hands descriptors to while the payload is pickled."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        self.fds.append(fd)
        return len(self.fds) - 1

    @staticmethod
    def DupFd(index: int) -> InheritedFd:
        return InheritedFd("payload", index)


class InheritedFd:
    """A descriptor that travels beside the pickle.

    Args:
        origin: `payload` or `process`, whichever pickle it belongs to.
        index: which of those it is.
    """

    def __init__(self, origin: str, index: int) -> None:
        self._origin, self._index = origin, index

    def detach(self) -> int:
        """The descriptor in the worker."""
        return INHERITED[self._origin][self._index]


# In a worker: the descriptors that came with each pickle, and the payload that is being loaded.
INHERITED: dict[str, list[int]] = {}


class _Loading:
    """The buffers of the payload that is being loaded, in a worker."""

    def __init__(self, arenas: MappedArenas, table: Sequence[tuple[int, int, int]]) -> None:
        self._arenas, self._table = arenas, table
        self.storages: dict[int, Any] = {}

    def view(self, index: int) -> memoryview:
        return self._arenas.view(*self._table[index])


_loading: _Loading | None = None


def load(heading: dict[str, Any], fds: Sequence[int]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """In a worker: the objects; what main defines, by name; the arguments of `main_script.update`."""
    global _loading
    arenas = MappedArenas(list(fds[: heading["arenas"]]))
    INHERITED["payload"] = list(fds[heading["arenas"] :])
    _loading = _Loading(arenas, heading["table"])
    buffers = []
    for index, readonly in heading["out_of_band"]:
        view = _loading.view(index)
        buffers.append(view.toreadonly() if readonly else view)
    offset, nbytes = heading["stream"]
    try:
        unpickler = pickle.Unpickler(io.BytesIO(arenas.view(0, offset, nbytes)), buffers=buffers)
        objects = unpickler.load()
        published = unpickler.load()
        of_main = unpickler.load()
    finally:
        _loading = None
    return objects, published, of_main


def _storage_at(index: int) -> Any:
    assert _loading is not None
    if index not in _loading.storages:
        _loading.storages[index] = _storage_over(_loading.view(index))
    return _loading.storages[index]


def _small_storage(index: int, data: bytes | None) -> Any:
    assert _loading is not None
    if data is not None:
        torch = sys.modules["torch"]
        storage = _untyped(torch.empty(len(data), dtype=torch.uint8))
        _bytes_of(storage)[:] = data
        _loading.storages[index] = storage
    return _loading.storages[index]


def _untyped_storage_class() -> Any:
    torch = sys.modules.get("torch")
    return getattr(torch, "UntypedStorage", None)


def _untyped(tensor: Any) -> Any:
    if hasattr(tensor, "untyped_storage"):
        return tensor.untyped_storage()
    return tensor.storage().untyped()  # torch 1.13


def _storage_over(view: memoryview) -> Any:
    torch = sys.modules["torch"]
    return _untyped(torch.frombuffer(view, dtype=torch.uint8))


def _bytes_of(storage: Any) -> memoryview:
    """A CPU storage's memory."""
    import ctypes

    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _is_pinned(address: int, nbytes: int) -> bool:
    """Whether a driver has pinned the memory: torch knows, once the program uses a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    import ctypes

    view = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
    return bool(torch.frombuffer(view, dtype=torch.uint8).is_pinned())


def _reduce_memmap(array: Any) -> Any:
    """An array that is a file's memory is opened again, not read: by its file, unless the file has changed hands."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(array) is not numpy.memmap or array.filename is None or array.dtype.hasobject:
        return None
    root = array
    while isinstance(root.base, numpy.memmap):
        root = root.base
    if root.mode not in ("r", "r+", "w+") or getattr(root, "_mmap", None) is None:
        return None
    mode = "r" if root.mode == "r" else "r+"
    start = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    extent = (str(root.filename), mode, root.offset, root.nbytes)
    return _memmap, (extent, array.shape, array.dtype, start, array.strides, array.flags.writeable)


def _memmap(
    extent: tuple[str, str, int, int], shape: Any, dtype: Any, start: int, strides: Any, writeable: bool
) -> Any:
    import numpy

    filename, mode, offset, nbytes = extent
    root = _opened(filename, mode, offset, nbytes)
    array = numpy.ndarray(shape, dtype, root, start, strides).view(numpy.memmap)
    if not writeable:
        array.flags.writeable = False
    return array


@functools.cache
def _opened(filename: str, mode: Any, offset: int, nbytes: int) -> Any:
    import numpy

    return numpy.memmap(filename, numpy.uint8, mode, offset, (nbytes,))

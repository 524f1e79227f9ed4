"""What travels to workers: the dataset and its functions, pickled once, and what the main script defines by value."""

from __future__ import annotations

import ctypes
import io
import pickle
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from rocm_patch.workers import changed
from rocm_patch.workers.buffers import LEAST_BYTES, Arena, MappedArenas, Place, Snapshots
from rocm_patch.workers.pickling import Pickler, handing_descriptors_to, untyped_storage_class


class _StoragePickler(Pickler):
    """Puts large memory into arenas instead of the pickle, once for all workers."""

    def __init__(self, file: Any, payload: Payload, snapshots: Snapshots, *, main_by_value: bool) -> None:
        # Weakly, or only the garbage collector would end this object, and with it the memory that the table holds.
        in_band = weakref.WeakMethod(self._in_band)
        super().__init__(file, main_by_value=main_by_value, buffer_callback=lambda buffer: in_band()(buffer))  # type: ignore[misc]
        self._payload = payload
        self._snapshots = snapshots
        self._index: dict[tuple[int, int], int] = {}
        self._untyped = untyped_storage_class()
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
            pickler.dump(changed.since_import(pickler.referenced, main_by_value=main_by_value))
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


def load(heading: dict[str, Any], fds: Sequence[int]) -> tuple[list[Any], dict[str, Any], changed.Changes]:
    """In a worker: the objects; what main defines, by name; what modules hold by now."""
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
        changes = unpickler.load()
    finally:
        _loading = None
    return objects, published, changes


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


def _untyped(tensor: Any) -> Any:
    if hasattr(tensor, "untyped_storage"):
        return tensor.untyped_storage()
    return tensor.storage().untyped()  # torch 1.13


def _storage_over(view: memoryview) -> Any:
    torch = sys.modules["torch"]
    return _untyped(torch.frombuffer(view, dtype=torch.uint8))


def _bytes_of(storage: Any) -> memoryview:
    """A CPU storage's memory."""
    return _memory(storage.data_ptr(), storage.nbytes())


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _is_pinned(address: int, nbytes: int) -> bool:
    """Whether a driver has pinned the memory: torch knows, once the program uses a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    return bool(torch.frombuffer(_memory(address, nbytes), dtype=torch.uint8).is_pinned())

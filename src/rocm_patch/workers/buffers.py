"""Large buffers of a dataset in shared memory: copied once, mapped privately by every worker.

A forked worker shares its parent's pages until one of them writes. The same is had here for a worker that is no fork:
the bytes go into an anonymous file (memfd_create(2)), every worker maps it privately, and where the buffer is large
the parent's own pages are exchanged for such a mapping too, at the same addresses, so that the bytes exist once.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rocm_patch.workers.descriptors import memory_file

_PAGE = mmap.PAGESIZE
# A buffer of this size is worth a page of its own outside the pickle.
LEAST_BYTES = 1 << 16
# From here on a second copy weighs more than the care that an exchange of pages takes; and glibc's malloc gives every
# such block a mapping of its own (mallopt(3)), so that it never takes pages of a freed one for zeroes.
_LEAST_EXCHANGED = 32 << 20
_PIECE = 16 << 20
# How long Python's lock is kept at a time, and not handed on for four times as long.
_HOLD_SECONDS = 0.03
_ONE_EXCHANGE = threading.Lock()
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20
_PRESENT_OR_SWAPPED = _PRESENT | _SWAPPED
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_PROT = mmap.PROT_READ | mmap.PROT_WRITE

# Through PyDLL: with Python's lock held, so that no other thread of the program writes in between.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.pwrite.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
_libc.pwrite.restype = ctypes.c_ssize_t
_libc.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
_libc.pread.restype = ctypes.c_ssize_t
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value


class Arena:
    """Anonymous shared memory that grows; whoever has the descriptor can map it. Closed with its last reference."""

    def __init__(self) -> None:
        self.fd = memory_file("rocm-patch-buffers")
        self.inode = os.fstat(self.fd).st_ino
        self._size = 0
        _ARENAS.add(self)
        weakref.finalize(self, os.close, self.fd)

    def take(self, nbytes: int, address: int = 0) -> int:
        """Room for `nbytes`; returns the offset, which lies in its page as `address` does."""
        offset = -(-self._size // _PAGE) * _PAGE + address % _PAGE
        self._size = offset + nbytes
        os.ftruncate(self.fd, self._size)
        return offset

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Copy memory into the arena; the caller keeps Python's lock throughout a piece of 16 MiB.

        Raises:
            OSError: there is no memory for it.
        """
        done = 0
        while done < nbytes:
            wrote = _libc.pwrite(self.fd, address + done, min(nbytes - done, _PIECE), offset + done)
            if wrote <= 0:
                raise OSError(ctypes.get_errno(), "cannot copy a dataset's buffer into shared memory")
            done += wrote


# Those of this process: pages that were exchanged before may be exchanged again.
_ARENAS: weakref.WeakSet[Arena] = weakref.WeakSet()


@dataclass(frozen=True)
class Place:
    """Where a buffer lies."""

    arena: Arena
    offset: int
    nbytes: int


@dataclass
class Snapshots:
    """The buffers of one dataset that were exchanged, for the loaders after the first.

    Attributes:
        kept: by address and size. Valid while the pages at the address are still the arena's.
    """

    kept: dict[tuple[int, int], Place] = field(default_factory=dict)

    def place(self, address: int, nbytes: int, loose: Arena, *, may_exchange: bool) -> Place:
        """Where a buffer's bytes lie as they are now: where they lay before, in an exchange, or copied to `loose`."""
        key = (address, nbytes)
        before = self.kept.pop(key, None)
        if before is not None and _is_unchanged(address, before):
            self.kept[key] = before
            return before
        if may_exchange and nbytes >= _LEAST_EXCHANGED and _has_glibc_malloc() and _is_plain_memory(address, nbytes):
            arena = Arena()
            place = Place(arena, arena.take(nbytes, address), nbytes)
            if _exchange(address, place):
                self.kept[key] = place
            return place
        place = Place(loose, loose.take(nbytes), nbytes)
        loose.write(place.offset, address, nbytes)
        return place

    def keep_only(self, used: set[tuple[int, int]]) -> None:
        """Forget the buffers that the dataset has no more."""
        for key in self.kept.keys() - used:
            del self.kept[key]


def _inner(address: int, nbytes: int) -> tuple[int, int]:
    """The whole pages within a buffer, (first, past the last)."""
    return -(-address // _PAGE) * _PAGE, (address + nbytes) // _PAGE * _PAGE


def _exchange(address: int, place: Place) -> bool:
    """Copy a buffer to its place and put a private mapping of the copy where it was; False if it stayed what it was.

    malloc's word before the buffer and whatever else lies in its first and last page stay: whole pages only.
    """
    first, end = _inner(address, place.nbytes)
    arena, offset = place.arena, place.offset
    arena.write(offset, address, first - address)
    exchanged, size, piece = True, _PIECE, first
    has_holes = not any(mapping.inode for mapping in mappings(first, end - first))
    while piece < end:
        with _pagemap() as pagemap, _one_thread() as until:
            while piece < end and time.monotonic() < until:
                nbytes = min(size, end - piece)
                at = offset + piece - address
                flags = _page_flags(pagemap, piece, nbytes) if has_holes else None
                for start, stop in _touched(flags, nbytes):
                    arena.write(at + start, piece + start, stop - start)
                if time.monotonic() > until + _HOLD_SECONDS and size > _PAGE:
                    size = max(size // 4, _PAGE)  # another thread may have been let in: once more, and quicker
                    break
                if exchanged:
                    private = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
                    exchanged = _libc.mmap(piece, nbytes, _PROT, private, arena.fd, at) != _MAP_FAILED
                piece += nbytes
    arena.write(offset + end - address, end, address + place.nbytes - end)
    return exchanged


@contextmanager
def _one_thread() -> Iterator[float]:
    """Python does not hand its lock on between the copy of a piece and the exchange of its pages.

    Yields:
        when, by `time.monotonic()`, to begin no other piece.
    """
    with _ONE_EXCHANGE:
        before = sys.getswitchinterval()
        sys.setswitchinterval(4 * _HOLD_SECONDS)
        try:
            # A thread that waits for the lock asks for it after the interval that held when it began to wait.
            time.sleep(0)
            yield time.monotonic() + _HOLD_SECONDS
        finally:
            sys.setswitchinterval(before)


def _touched(flags: bytes | None, nbytes: int) -> Iterator[tuple[int, int]]:
    """The parts of whole pages of anonymous memory that have been written to; the others are zeroes."""
    if flags is None:
        yield 0, nbytes
        return
    used = bytes(flag & _PRESENT_OR_SWAPPED for flag in flags)
    for pages in re.finditer(rb"[^\0]+", used):
        yield pages.start() * _PAGE, pages.end() * _PAGE


def _page_flags(pagemap: int, address: int, nbytes: int) -> bytes | None:
    """The highest byte of what the kernel says of each page, None where it does not; Python's lock is kept.

    Bit 61 of 64: the page belongs to a file; 62: it is swapped out; 63: it is present. Documentation/admin-guide/mm/
    pagemap.rst.
    """
    entries = ctypes.create_string_buffer(nbytes // _PAGE * 8)
    got = _libc.pread(pagemap, entries, len(entries), address // _PAGE * 8)
    return entries.raw[7::8] if got == len(entries) else None


@contextmanager
def _pagemap() -> Iterator[int]:
    """The descriptor of this process's pagemap; -1 where there is none."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Mapping:
    """A line of proc_pid_maps(5)."""

    start: int
    end: int
    permissions: str
    offset: int
    inode: int


def mappings(address: int, nbytes: int) -> list[Mapping]:
    """The process's mappings (proc_pid_maps(5)) that a range touches."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            extent, permissions, offset, _, inode = line.split(maxsplit=5)[:5]
            start, end = (int(text, 16) for text in extent.split("-"))
            if start < address + nbytes and address < end:
                found.append(Mapping(start, end, permissions, int(offset, 16), int(inode)))
    return found


@functools.cache
def _has_glibc_malloc() -> bool:
    """Whether memory comes from the C library. jemalloc, for one, drops the pages of freed memory and counts on
    zeroes there (madvise(2), MADV_DONTNEED), and a mapping of a file has the file's bytes."""
    # Not by malloc itself, whose address in Debian's Python, which is not position-independent, is the program's own.
    in_use, libc = (
        ctypes.cast(ctypes.CDLL(name).malloc_usable_size, ctypes.c_void_p).value for name in (None, "libc.so.6")
    )
    tuned = any(name.startswith("MALLOC_MMAP_") for name in os.environ) or "mmap_" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    return in_use == libc and not tuned


def _is_plain_memory(address: int, nbytes: int) -> bool:
    """Whether a buffer is ordinary memory of the process: private, writable, no file, no device, no huge pages.

    Memory that a driver has pinned must keep its pages: the caller asks torch about that.
    """
    first, end = _inner(address, nbytes)
    found = mappings(first, end - first)
    whole = bool(found) and found[0].start <= first and found[-1].end >= end
    return whole and all(one.permissions == "rw-p" and (one.inode == 0 or _is_arena(one)) for one in found)


def _is_arena(mapping: Mapping) -> bool:
    return any(arena.inode == mapping.inode for arena in _ARENAS)


def _is_unchanged(address: int, place: Place) -> bool:
    """Whether a buffer that was exchanged still has the arena's pages and none of its own.

    A page that was written to has become the process's own, and no longer belongs to the file.
    """
    first, end = _inner(address, place.nbytes)
    for mapping in mappings(first, end - first):
        start = max(first, mapping.start)
        at = place.offset + start - address
        if mapping.inode != place.arena.inode or mapping.offset + start - mapping.start != at:
            return False
    with _pagemap() as pagemap:
        flags = _page_flags(pagemap, first, end - first)
    if flags is None or any(flag & _SWAPPED or flag & (_PRESENT | _OF_FILE) == _PRESENT for flag in set(flags)):
        return False
    edges = ((address, first), (end, address + place.nbytes))
    return all(
        os.pread(place.arena.fd, stop - start, place.offset + start - address)
        == ctypes.string_at(start, stop - start)
        for start, stop in edges
    )


class MappedArenas:
    """In a worker: the arenas that it was given, each mapped once, so that what shared memory goes on sharing it."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds
        self._maps: dict[int, memoryview] = {}

    def view(self, arena: int, offset: int, nbytes: int) -> memoryview:
        """The bytes of one buffer, writable without anybody else's seeing it."""
        if arena not in self._maps:
            mapped = mmap.mmap(self._fds[arena], 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=_PROT)
            self._maps[arena] = memoryview(mapped)
        return self._maps[arena][offset : offset + nbytes]

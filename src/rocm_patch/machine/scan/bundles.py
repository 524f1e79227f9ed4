"""clang offload bundles: the containers in which HIP's compiler puts the code for several GPUs.

A library holds them in its section `.hip_fatbin`, one after another with padding between; a file may also be one
bundle. Plain ones have a table of entries, compressed ones a header and one compressed plain bundle
(https://clang.llvm.org/docs/ClangOffloadBundler.html).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from rocm_patch.machine.scan import compression
from rocm_patch.machine.scan.elf import Content

PLAIN = b"__CLANG_OFFLOAD_BUNDLE__"
COMPRESSED = b"CCOB"
_WINDOW = 1 << 16
# An entry's name: `hipv4-amdgcn-amd-amdhsa--gfx90a:xnack-`, with one dash before ROCm 4.2, or `amdgcnspirv`.
_TARGET = re.compile(rb"amdgcn-amd-amdhsa-(?:[a-z]*-)?(gfx[0-9a-z-]*[0-9a-z])|(amdgcnspirv)")
_LONGEST_NAME = 300
_TABLE_BYTES = 16 * 1024  # the header and a table of 200 targets
_MOST_ENTRIES = 1024
# A bundle is what one source file compiles to, for every target: far less.
LARGEST = 1 << 30


@dataclass(frozen=True)
class Entry:
    """Code for one target in a bundle.

    Attributes:
        target: without features, `gfx90a`; `amdgcnspirv` for code that is compiled when it is loaded.
        start: where it begins, from the start of the plain bundle.
        size: its bytes.
    """

    target: str
    start: int
    size: int


@dataclass(frozen=True)
class Bundle:
    """One bundle in a file.

    Attributes:
        start: where it begins in the file.
        size: bytes that it takes there; 0 where its head is cut off or does not say.
        is_compressed: whether its entries lie in a compressed plain bundle.
        entries: those for AMD GPUs; None where the head of a compressed one cannot be unpacked.
        unpacked: bytes of the plain bundle, as a compressed one says.
    """

    start: int
    size: int
    is_compressed: bool
    entries: tuple[Entry, ...] | None
    unpacked: int


def bundles(content: Content, start: int, end: int) -> Iterator[Bundle]:
    """The bundles between two offsets, from their heads alone: a table each, of a compressed one its first bytes.

    What only looks like a bundle is passed over: programs that read bundles have the magic among their strings.
    """
    # The next one follows after padding as a rule: the search looks at a page or two, not at the code.
    place = find_first(content, (PLAIN, COMPRESSED), start, end)
    while place >= 0:
        head = bytes(content[place : min(place + _TABLE_BYTES, end)])
        bundle = _plain(place, head) if head.startswith(PLAIN) else _compressed(place, head)
        if bundle is not None:
            yield bundle
        # A size from a spoilt table can be anything.
        size = bundle.size if bundle is not None else 0
        after = min(place + max(size, len(COMPRESSED)), end)
        place = find_first(content, (PLAIN, COMPRESSED), after, end)


def find_first(content: Content, magics: tuple[bytes, ...], start: int, end: int) -> int:
    """Where the first of several magics begins, -1 if nowhere.

    In windows, which are copied: a memory map's own search is a slow one, and a magic that is nowhere must not keep
    the search from another one that is near.
    """
    overlap = max(map(len, magics)) - 1
    for window in range(start, end, _WINDOW):
        part = bytes(content[window : min(window + _WINDOW + overlap, end)])
        found = [place for magic in magics if (place := part.find(magic)) >= 0]
        if found:
            return window + min(found)
    return -1


def _plain(place: int, head: bytes) -> Bundle | None:
    size, entries = read_table(head)
    return None if entries is None else Bundle(place, size, False, entries, size)


def _compressed(place: int, head: bytes) -> Bundle | None:
    if len(head) < 8:
        return None
    version, method = struct.unpack_from("<HH", head, 4)
    if not 1 <= version <= 3 or method > 1:
        return None
    try:
        entries = read_table(_unpacked(head, _TABLE_BYTES) or b"")[1]
    except ValueError:  # `code_of` says what is wrong with it
        entries = None
    size, unpacked = _compressed_sizes(head)
    return Bundle(place, size, True, entries, unpacked)


def read_table(head: bytes) -> tuple[int, tuple[Entry, ...] | None]:
    """Size of a plain bundle and its entries for AMD GPUs; (0, None) where its head is cut off or is none.

    The head is a magic, a count, and for each entry offset, size, length of the name, name.
    """
    if not head.startswith(PLAIN) or len(head) < len(PLAIN) + 8:
        return 0, None
    (count,) = struct.unpack_from("<Q", head, len(PLAIN))
    position, length = len(PLAIN) + 8, 0
    entries = []
    if not 0 < count <= _MOST_ENTRIES:
        return 0, None
    for _ in range(count):
        if position + 24 > len(head):
            return 0, None
        offset, size, name_length = struct.unpack_from("<QQQ", head, position)
        if name_length > _LONGEST_NAME:
            return 0, None
        target = _TARGET.search(head[position + 24 : position + 24 + name_length])
        if target:
            entries.append(Entry((target[1] or target[2]).decode(), offset, size))
        position += 24 + name_length
        length = max(length, offset + size)
    return length, tuple(entries)


def code_of(content: Content, bundle: Bundle, end: int) -> Iterator[tuple[str, bytes]]:
    """Target and code of each entry of a bundle, whose file or section ends at `end`.

    Raises:
        ValueError: it cannot be decompressed, or holds no bundle, or more than `LARGEST`.
    """
    if not bundle.is_compressed:
        for entry in bundle.entries or ():
            first = min(bundle.start + entry.start, end)
            yield entry.target, bytes(content[first : min(first + entry.size, end)])
        if any(bundle.start + entry.start + entry.size > end for entry in bundle.entries or ()):
            raise ValueError("a bundle is cut off")
        return
    packed = bytes(content[bundle.start : min(bundle.start + (bundle.size or LARGEST), end)])
    whole = _unpacked(packed, LARGEST + 1)
    if whole is None:
        raise ValueError("the head of a compressed bundle is cut off")
    if len(whole) > LARGEST:
        raise ValueError(f"a compressed bundle holds more than {LARGEST >> 20} MiB")
    entries = read_table(whole[:_TABLE_BYTES])[1]
    if entries is None:
        raise ValueError("a compressed bundle holds no bundle")
    for entry in entries:
        yield entry.target, whole[entry.start : entry.start + entry.size]
    if any(entry.start + entry.size > len(whole) for entry in entries):
        raise ValueError("a compressed bundle is cut off")


def _compressed_sizes(head: bytes) -> tuple[int, int]:
    """Sizes of a compressed bundle, packed (0 before version 2) and unpacked, from its header."""
    if len(head) < 24:
        return 0, 0
    (version,) = struct.unpack_from("<H", head, 4)
    sizes = struct.unpack_from("<QQ" if version >= 3 else "<II", head, 8)
    return (0, sizes[0]) if version == 1 else (sizes[0], sizes[1])


def _unpacked(packed: bytes, most: int) -> bytes | None:
    """At most so many bytes of what is inside a compressed bundle; None where its header is cut off.

    The header is a magic, version, method, and from version 2 on its size, then the unpacked size and a hash; sizes
    have 4 bytes, from version 3 on 8.
    """
    if len(packed) < 32:
        return None
    version, method = struct.unpack_from("<HH", packed, 4)
    body = {1: 20, 2: 24}.get(version, 32)
    return (compression.inflate if method == 0 else compression.zstd)(packed[body:], most)

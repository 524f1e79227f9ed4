"""Which GPU targets the device code in a shared library is for, read from the file alone.

A HIP library holds its device code in the ELF section `.hip_fatbin`: clang offload bundles one after another, each
with a table of the targets in it (https://clang.llvm.org/docs/ClangOffloadBundler.html). Only these tables are read,
through a memory map, so a library of several GB costs a few hundred page reads. What was read is kept in the cache
folder under the file's identity.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from rocm_patch.machine.folders import cache_folder
from rocm_patch.settings import LOGGER

_BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"
_MAGIC = re.compile(_BUNDLE + b"|CCOB")  # CCOB starts a compressed bundle
# An entry's name, `hipv4-amdgcn-amd-amdhsa--gfx90a:xnack-`.
_TARGET = re.compile(rb"amdgcn-amd-amdhsa-[a-z]*-(gfx[0-9a-z-]*[0-9a-z])")
# What torch itself answers to torch.cuda.get_arch_list(), a constant of the build.
_ARCH_LIST = re.compile(rb"gfx[0-9a-f]{3,4}(?:[ ;]gfx[0-9a-f]{3,4})+(?=\x00)")
# Sections that can hold the build's list of targets; the others of a torch library are GBs of kernels.
_TEXT_SECTIONS = (".rodata", ".rodata.str1.1", ".rodata.str1.8")
_TABLE_BYTES = 16 * 1024  # the header and a table of 200 targets


def targets_of(library: Path) -> frozenset[str]:
    """The gfx targets that a library has device code for, without features: `gfx90a:xnack-` counts as `gfx90a`.

    Generic targets appear under their own names, `gfx10-1-generic`. Bundles compressed with zstd are read where
    Python can (3.14 on, or with the `zstandard` package); otherwise the list of targets that torch was built with
    stands in. Empty where nothing can be read.

    Raises:
        OSError: the file cannot be opened.
    """
    with library.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return frozenset()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # The tables lie MBs apart: reading ahead would read the whole library.
            content.madvise(mmap.MADV_RANDOM)
            sections = _sections(content)
            found: set[bytes] = set()
            for start, end in sections.get(".hip_fatbin", [(0, len(content))] if not sections else []):
                found.update(_targets(content, start, end))
            if not found:
                content.madvise(mmap.MADV_NORMAL)
                for name in _TEXT_SECTIONS:
                    for start, end in sections.get(name, []):
                        for listed in _ARCH_LIST.finditer(content, start, end):
                            found.update(re.split(rb"[ ;]", listed[0]))
    return frozenset(target.decode() for target in found)


def cached_targets_of(library: Path) -> frozenset[str]:
    """`targets_of`, remembered in the cache folder under the file's path, size, inode and time.

    Raises:
        OSError: the file cannot be opened.
    """
    status = library.stat()
    identity = f"{library}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    store = cache_folder(os.environ) / "device_code.json"
    known = _read_store(store)
    if identity in known:
        return frozenset(known[identity])
    found = targets_of(library)
    if not found:  # another Python, or another version of us, may read more
        return found
    # One entry for each path: an upgraded library takes its predecessor's place.
    kept = {key: value for key, value in known.items() if not key.startswith(f"{library}|")}
    _write_store(store, {**kept, identity: sorted(found)})
    return found


def _sections(content: mmap.mmap) -> dict[str, list[tuple[int, int]]]:
    """Start and end of every section of a 64-bit little-endian ELF file, by name; empty for anything else."""
    if content[:6] != b"\x7fELF\x02\x01" or len(content) < 64:
        return {}
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", content, 0x3A)
    found: dict[str, list[tuple[int, int]]] = {}
    try:
        headers = [struct.unpack_from("<IIQQQQ", content, table + index * size) for index in range(count)]
        names = headers[names_index][4]
        for name, _, _, _, offset, length in headers:
            end = content.find(b"\x00", names + name)
            text = content[names + name : end].decode("ascii", "replace")
            found.setdefault(text, []).append((offset, min(offset + length, len(content))))
    except (struct.error, IndexError):  # truncated, or the headers were stripped
        return {}
    return found


def _targets(content: mmap.mmap, start: int, end: int) -> Iterator[bytes]:
    """The targets that the bundles between two offsets name in their heads."""
    # The next bundle follows after padding, so the search looks at a page or two, not at the code.
    found = _MAGIC.search(content, start, end)
    while found:
        head = content[found.start() : min(found.start() + _TABLE_BYTES, end)]
        if found[0] == _BUNDLE:
            length, names = _bundle(head)
        else:
            length, names = _compressed_length(head), _bundle(_decompressed(head))[1]
        for name in names:
            if target := _TARGET.search(name):
                yield target[1]
        # A length from a spoilt table can be anything.
        found = _MAGIC.search(content, min(found.start() + max(length, len(found[0])), end), end)


def _bundle(head: bytes) -> tuple[int, list[bytes]]:
    """Length of an uncompressed bundle and the names of its entries; (0, none) where its head is cut off.

    The head is a magic, a count, and for each entry offset, size, length of the name, name.
    """
    names: list[bytes] = []
    try:
        (count,) = struct.unpack_from("<Q", head, len(_BUNDLE))
        position, length = len(_BUNDLE) + 8, 0
        for _ in range(count):
            if position + 24 > len(head):
                return 0, []
            offset, size, name_length = struct.unpack_from("<QQQ", head, position)
            names.append(head[position + 24 : position + 24 + name_length])
            position += 24 + name_length
            length = max(length, offset + size)
    except struct.error:
        return 0, []
    return length, names


def _compressed_length(head: bytes) -> int:
    """Length of a compressed bundle from its header, which carries it from version 2 on."""
    try:
        (version,) = struct.unpack_from("<H", head, 4)
        if version >= 3:
            return int(struct.unpack_from("<Q", head, 8)[0])
        return int(struct.unpack_from("<I", head, 8)[0]) if version == 2 else 0
    except struct.error:
        return 0


def _decompressed(head: bytes) -> bytes:
    """The first bytes inside a compressed bundle, empty where they cannot be had."""
    if len(head) < 32:
        return b""
    version, method = struct.unpack_from("<HH", head, 4)
    payload = head[{1: 20, 2: 24}.get(version, 32) :]
    try:
        if method == 0:
            return zlib.decompressobj().decompress(payload, _TABLE_BYTES)
        return _zstd(payload)
    except zlib.error:
        return b""


def _zstd(payload: bytes) -> bytes:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14

        try:
            return bytes(zstd.ZstdDecompressor().decompress(payload, _TABLE_BYTES))
        except zstd.ZstdError:
            return b""
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return b""
    try:
        return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(payload)[:_TABLE_BYTES])
    except zstandard.ZstdError:
        return b""


def _read_store(store: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        return {str(key): [str(item) for item in value] for key, value in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or spoilt: it is read from the library again
        return {}


def _write_store(store: Path, content: dict[str, list[str]]) -> None:
    beside = store.with_name(f"{store.name}.{os.getpid()}")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.replace(store)
    except OSError as error:
        LOGGER.debug("cannot keep %s: %s", store, error)

"""Files that hold code beside other things: databases of MIOpen and rocFFT, AOTriton's images, AMD's kpack files."""

from __future__ import annotations

import mmap
import os
import re
import sqlite3
import struct
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rocm_patch.machine.scan import compression

_SQLITE, _AOTRITON, _ZIP, _BZIP2, _KPACK = b"SQLite format 3\0", b"AKS2", b"PK\3\4", b"BZh", b"KPAK"
_ZSTD = b"\x28\xb5\x2f\xfd"
# A database over which SQLite works for longer than this many of its steps is a trap.
_MOST_STEPS, _STEPS_AT_ONCE = 200_000_000, 1_000_000
_MOST_ROWS = 1_000_000
_LARGEST = 1 << 28
_CHIP = re.compile(r"gfx[0-9a-f]{3,4}|gfx[0-9-]+-generic")
# Tables that hold code: name, the column with it, a column that names the chip.
_TABLES = (
    # MIOpen's compiled kernels, each compressed with bzip2 (MIOpen src/include/miopen/kern_db.hpp)
    ("kern_db", "kernel_blob", "kernel_args"),
    # rocFFT's (rocFFT library/src/rtc_cache.cpp)
    ("cache_v1", "code", "arch"),
)


def is_one(head: bytes) -> bool:
    """Whether a file that begins so can be read here."""
    return head.startswith((_SQLITE, _AOTRITON, _ZIP, _KPACK))


def blobs(path: Path) -> Iterator[tuple[bytes, str]]:
    """Each piece of code in the file and the chip that it is said to be for, empty where nothing says.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is spoilt.
    """
    with path.open("rb") as file:
        head = file.read(16)
        if head.startswith(_AOTRITON):
            file.seek(0)
            for blob in _of_aotriton(file.read(_LARGEST)):
                yield blob, ""
    if head.startswith(_SQLITE):
        yield from _of_database(path)
    elif head.startswith(_ZIP):
        yield from _of_zip(path)
    elif head.startswith(_KPACK):
        yield from _of_kpack(path)


def _of_database(path: Path) -> Iterator[tuple[bytes, str]]:
    steps = 0

    def is_too_much() -> int:
        nonlocal steps
        steps += _STEPS_AT_ONCE
        return int(steps > _MOST_STEPS)

    # As it lies: no lock is taken, and no journal made beside it.
    address = f"file:{quote(os.fspath(path.absolute()))}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            database.execute("PRAGMA trusted_schema=OFF")
            database.set_progress_handler(is_too_much, _STEPS_AT_ONCE)
            names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' LIMIT 999")
            tables = {row[0] for row in names}
            for table, code, about in _TABLES:
                if table in tables:
                    rows = database.execute(
                        f"SELECT {code}, {about} FROM {table} WHERE length({code}) < {_LARGEST} LIMIT {_MOST_ROWS}"
                    )
                    for blob, said in rows:
                        if isinstance(blob, bytes):
                            name = _CHIP.search(said) if isinstance(said, str) else None
                            is_packed = blob.startswith(_BZIP2)
                            yield (
                                compression.bzip2(blob, _LARGEST) if is_packed else blob,
                                name[0] if name else "",
                            )
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise ValueError(f"a spoilt database: {error}") from error


def _of_zip(path: Path) -> Iterator[tuple[bytes, str]]:
    """AOTriton's newer form: its files in one archive, not compressed again."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                is_plain = entry.compress_type == zipfile.ZIP_STORED  # as AOTriton writes them
                if entry.filename.endswith(".aks2") and is_plain and entry.file_size < _LARGEST:
                    for blob in _of_aotriton(archive.read(entry)):
                        yield blob, ""
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"a spoilt archive: {error}") from error


def _of_aotriton(content: bytes) -> Iterator[bytes]:
    """The images in one of AOTriton's files.

    A header of magic, unpacked size, number of kernels and size of the directory; then, compressed with xz, the
    directory and the images. An entry of the directory has shared memory, threads, offset behind the directory, size,
    length of the name, name (AOTriton's Storage V2, v2src/packed_kernel.cc). One without an image stands for a kernel
    that could not be compiled.
    """
    if len(content) < 16:
        raise ValueError("the head of an AOTriton file is cut off")
    size, count, directory = struct.unpack_from("<III", content, 4)
    whole = compression.xz(content[16:], min(size, _LARGEST))
    place, left = 0, len(whole)
    for _ in range(count):
        if place + 20 > min(directory, len(whole)):
            raise ValueError("the directory of an AOTriton file is cut off")
        _, _, offset, length, name = struct.unpack_from("<IIIII", whole, place)
        place += 20 + name
        left -= length
        if left < 0:
            raise ValueError("the images of an AOTriton file overlap")
        yield whole[directory + offset : directory + offset + length]


def _of_kpack(path: Path) -> Iterator[tuple[bytes, str]]:
    """The device code that AMD's multi-arch wheels keep apart from their libraries, one file for each chip.

    A magic, a version, the offset of a table of contents in msgpack, code. The table names the binary and the chip of
    each piece, which lies as it is or is compressed with zstd: then its place is found by counting (TheRock,
    rocm-systems shared/kpack/python/rocm_kpack/kpack.py).
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        version, table_start = struct.unpack_from("<IQ", content[:16].ljust(16, b"\0"), 4)
        if version != 1 or not 16 <= table_start < size or size - table_start > _LARGEST:
            raise ValueError(f"a kpack file of version {version}, or without its table")
        table = _msgpack(bytes(content[table_start:]))
        rows = sorted(_kpack_rows(table), key=lambda row: row[1])
        if table.get("compression_scheme") == "zstd-per-kernel":
            frames = _kpack_frames(content, _number(table.get("zstd_offset")), table_start)
            places = dict(enumerate(frames))
        else:
            listed = table.get("blobs")
            blobs = [blob for blob in listed if isinstance(blob, dict)] if isinstance(listed, list) else []
            places = {n: (_number(blob.get("offset")), _number(blob.get("size"))) for n, blob in enumerate(blobs)}
        for chip, ordinal in rows:
            if ordinal not in places:
                raise ValueError("the table of a kpack file names code that is not there")
            start, length = places[ordinal]
            blob = bytes(content[min(start, size) : min(start + length, size)])
            yield (compression.zstd(blob, _LARGEST) if blob.startswith(_ZSTD) else blob), chip


def _number(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _msgpack(packed: bytes) -> dict[str, Any]:
    import msgpack  # here: every start of rocm-patch comes through this module's importers

    try:
        table = msgpack.unpackb(packed, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"the table of a kpack file is spoilt: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("toc"), dict):
        raise ValueError("a kpack file without a table of contents")
    return table


def _kpack_rows(table: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Chip and number of each piece of code."""
    for of_binary in table["toc"].values():
        for chip, entry in of_binary.items() if isinstance(of_binary, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("ordinal"), int):
                yield str(chip), entry["ordinal"]


def _kpack_frames(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Place and size of each zstd frame: their number, then for each its size and itself."""
    if not 16 <= start <= end - 4:
        raise ValueError("a kpack file without its code")
    (count,) = struct.unpack_from("<I", content, start)
    place = start + 4
    for _ in range(count):
        if place + 4 > end:
            raise ValueError("the code of a kpack file is cut off")
        (length,) = struct.unpack_from("<I", content, place)
        yield place + 4, min(length, end - place - 4)
        place += 4 + length

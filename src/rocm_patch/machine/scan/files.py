"""What lies in one file: code for GPUs in whatever container, or records about them."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.machine import catalog
from rocm_patch.machine.scan import archives, bundles, elf
from rocm_patch.machine.scan.elf import Content

_OFFLOAD_BINARY = b"\x10\xff\x10\xad"
_MOST_IMAGES = 1024
_STATIC_LIBRARY = b"!<arch>\n"
_PROGBITS, _LOADED, _EXECUTABLE = 1, 2, 4
# MIOpen's lists of kernels and times, a line for each convolution: find-db `gfx1030_36.HIP.fdb.txt`, perf-db.
_RECORDS = re.compile(r"gfx[0-9a-f_]+(?:\.[\w.]+)?\.(?:u?fdb|u?db|cd\.pdb)\.txt$")


@dataclass(frozen=True)
class Part:
    """A part of a file that can be read by itself.

    Attributes:
        kind: `bundle`, `object` (one ELF file, or the whole file in another container) or `records`.
        start: where it begins.
        end: where it ends, at the latest.
        unpacked: bytes of what it holds, where it says.
    """

    kind: str
    start: int
    end: int
    unpacked: int = 0

    @property
    def bytes(self) -> int:
        """How much there is to read."""
        return max(self.unpacked, self.end - self.start)


@dataclass(frozen=True)
class Piece:
    """What a part holds for one target.

    Attributes:
        target: `gfx1030`, `gfx90a`, `gfx10-3-generic`.
        code: an ELF file for that target; empty for records and for code that is not machine code yet.
        records: lines or rows about the target that are no code.
        bytes: what it takes, unpacked.
    """

    target: str
    code: bytes
    records: int
    bytes: int


def parts(path: Path) -> list[Part]:
    """The parts of a file, from a few of its pages; none where it has nothing to do with GPUs.

    Raises:
        OSError: it cannot be read.
        ValueError: it is spoilt.
    """
    size = path.stat().st_size
    if size < 16:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # The tables lie MBs apart: reading ahead would read the whole file.
        content.madvise(mmap.MADV_RANDOM)
        head = content[:32]
        if elf.target_of(content) is not None or archives.is_one(head):
            return [Part("object", 0, size)]
        if head.startswith(elf.MAGIC):
            return _of_library(content)
        if head.startswith(_STATIC_LIBRARY):
            return _of_region(content, 0, size)
        if head.startswith((bundles.PLAIN, bundles.COMPRESSED)):
            found = _of_bundles(content, 0, size)
            if not found:
                raise ValueError("a spoilt bundle")
            return found
        if _RECORDS.search(path.name):
            return [Part("records", 0, size)]
    return []


def _of_library(content: mmap.mmap) -> list[Part]:
    """Bundles and bare code objects wherever data lies in a library: compilers put them into `.rodata` too."""
    known = elf.sections(content)
    if not known:  # stripped of its table of sections, it still has the code
        return _of_region(content, 0, len(content))
    found: list[Part] = []
    done = 0
    for section in sorted(known, key=lambda section: section.start):
        start, end = max(section.start, done), section.start + section.size  # a spoilt table's may overlap
        if start >= end:
            continue
        if section.name == ".llvm.offloading":
            found.append(Part("offload", start, end))
        elif section.kind == _PROGBITS and section.flags & _LOADED and not section.flags & _EXECUTABLE:
            found += _of_region(content, start, end)
        else:
            continue
        done = end
    return found


def _of_region(content: mmap.mmap, start: int, end: int) -> list[Part]:
    """Bundles, and between them code objects."""
    found: list[Part] = []
    place = start
    for part in [*_of_bundles(content, start, end), Part("", end, end)]:
        while (place := bundles.find_first(content, (elf.DEVICE_MAGIC,), place, part.start)) >= 0:
            head = bytes(content[place : min(place + 64, end)])
            size = elf.length_at(content, place, end) if elf.target_of(head) else 0
            if size:
                found.append(Part("object", place, min(place + size, end)))
            place += max(size, 4)
        if part.kind:
            found.append(part)
        place = part.end
    return found


def _of_bundles(content: mmap.mmap, start: int, end: int) -> list[Part]:
    found = list(bundles.bundles(content, start, end))
    following = [*(bundle.start for bundle in found[1:]), end][: len(found)]
    return [
        Part(
            "bundle",
            bundle.start,
            min(bundle.start + bundle.size, end) if bundle.size else after,
            min(bundle.unpacked, bundles.LARGEST),
        )
        for bundle, after in zip(found, following, strict=True)
    ]


def pieces(path: Path, part: Part) -> Iterator[Piece]:
    """What one part of a file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: the part is spoilt, or compressed in a way that cannot be read here.
    """
    if part.kind == "records":
        yield from _of_records(path)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = min(part.end, len(content))
        if part.kind == "bundle":
            for bundle in bundles.bundles(content, part.start, end):
                for target, code in bundles.code_of(content, bundle, end):
                    yield _piece(code, target)
                return
        elif part.kind == "offload":
            yield from _offload_binaries(content, part.start, end)
        elif archives.is_one(content[:32]):
            for blob, said in archives.blobs(path):
                yield from _of_blob(blob, said)
        else:
            yield _piece(bytes(content[part.start : end]), "")


def _piece(code: bytes, said: str) -> Piece:
    """Code as a piece; the ELF file itself knows best what it is for."""
    target = elf.target_of(code)
    if target is None:  # bitcode or SPIR-V: compiled when it is loaded
        return Piece(said or "unknown", b"", 0, len(code))
    return Piece(target, code, 0, len(code))


def _of_blob(blob: bytes, said: str) -> Iterator[Piece]:
    """Code from an archive, in whatever container."""
    if blob.startswith((bundles.PLAIN, bundles.COMPRESSED)):
        for bundle in bundles.bundles(blob, 0, len(blob)):
            for target, code in bundles.code_of(blob, bundle, len(blob)):
                yield _piece(code, target)
    elif blob:
        yield _piece(blob, said)


def _offload_binaries(content: Content, start: int, end: int) -> Iterator[Piece]:
    """Images of clang's newer container: a header with the place of its entries, each with that of an image.

    Version 1 has one entry, later ones several, and from 3 on the rest can be compressed. Images that are no ELF file
    for an AMD GPU are another vendor's. Layout: llvm/include/llvm/Object/OffloadBinary.h.
    """
    place = start
    while place + 40 <= end and content[place : place + 4] == _OFFLOAD_BINARY:
        version, size, entry, count, inflated = struct.unpack_from("<IQQQQ", content, place + 4)
        if version >= 3 and inflated:
            raise ValueError("a compressed offload binary, whose form is not known")
        entries = 1 if version == 1 else min(count, _MOST_IMAGES)
        if not 40 <= size <= end - place or entry + 40 * entries > size:
            raise ValueError("a spoilt offload binary")
        for number in range(entries):
            _, _, _, _, _, image, length = struct.unpack_from("<HHIQQQQ", content, place + entry + 40 * number)
            code = bytes(content[place + min(image, size) : place + min(image + length, size)])
            if elf.target_of(code) is not None:
                yield _piece(code, "")
        place += size


def _of_records(path: Path) -> Iterator[Piece]:
    lines = size = 0
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            lines, size = lines + block.count(b"\n"), size + len(block)
    # The number of compute units follows the chip, in decimal after `_` or in hexadecimal at once: gfx90878.
    chips = [row.gfx for row in catalog.archs() if path.name.startswith(row.gfx)]
    yield Piece(max(chips, key=len, default="unknown"), b"", lines, size)

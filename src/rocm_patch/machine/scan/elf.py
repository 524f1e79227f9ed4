"""ELF files, as far as device code needs them: sections, the GPU that a file is for, its functions.

Layouts: the System V ABI (https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html) and, for AMD's own numbers,
LLVM's "User Guide for AMDGPU Backend" (https://llvm.org/docs/AMDGPUUsage.html). Whatever a spoilt file says, nothing
outside it is read, and no more of it than the limits below.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Content: TypeAlias = "bytes | mmap.mmap"

MAGIC = b"\x7fELF\x02\x01"  # 64 bit, little endian: all that there is of AMD's
# How an AMD GPU's begins that lies in the middle of something else: with ELF's version and HSA's number.
DEVICE_MAGIC = MAGIC + b"\x01\x40"
_AMDGPU = 224
_MOST_SECTIONS = 4096
_MOST_SYMBOLS = 1 << 20
_LONGEST_NAME = 8192  # C++ names of templates reach 4,000
_DESCRIPTOR_BYTES = 64
_FUNCTION, _OBJECT, _HSA_KERNEL = 2, 1, 10
_EXECUTABLE = 4
_NO_BITS = 8

# EF_AMDGPU_MACH, the low byte of the flags: LLVM's llvm/include/llvm/BinaryFormat/ELF.h.
_MACHINES: Mapping[int, str] = {
    0x20: "gfx600", 0x21: "gfx601", 0x3A: "gfx602", 0x22: "gfx700", 0x23: "gfx701", 0x24: "gfx702", 0x25: "gfx703",
    0x26: "gfx704", 0x3B: "gfx705", 0x28: "gfx801", 0x29: "gfx802", 0x2A: "gfx803", 0x3C: "gfx805", 0x2B: "gfx810",
    0x2C: "gfx900", 0x2D: "gfx902", 0x2E: "gfx904", 0x2F: "gfx906", 0x30: "gfx908", 0x31: "gfx909", 0x3F: "gfx90a",
    0x32: "gfx90c", 0x40: "gfx940", 0x4B: "gfx941", 0x4C: "gfx942", 0x4F: "gfx950", 0x33: "gfx1010", 0x34: "gfx1011",
    0x35: "gfx1012", 0x42: "gfx1013", 0x36: "gfx1030", 0x37: "gfx1031", 0x38: "gfx1032", 0x39: "gfx1033",
    0x3E: "gfx1034", 0x3D: "gfx1035", 0x45: "gfx1036", 0x41: "gfx1100", 0x46: "gfx1101", 0x47: "gfx1102",
    0x44: "gfx1103", 0x43: "gfx1150", 0x4A: "gfx1151", 0x55: "gfx1152", 0x58: "gfx1153", 0x48: "gfx1200",
    0x4E: "gfx1201", 0x49: "gfx1250", 0x51: "gfx9-generic", 0x5F: "gfx9-4-generic", 0x52: "gfx10-1-generic",
    0x53: "gfx10-3-generic", 0x54: "gfx11-generic", 0x59: "gfx12-generic", 0x50: "gfx1310", 0x57: "gfx1154",
    0x5A: "gfx1251", 0x5B: "gfx12-5-generic", 0x5C: "gfx1172", 0x5D: "gfx1170", 0x5E: "gfx1171",
    0x62: "gfx11-7-generic", 0x63: "gfx13-generic",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: its name.
        kind: ELF's number of its type.
        flags: ELF's bits.
        address: where it is loaded.
        start: where it begins in the file.
        size: its bytes in the file.
        link: the number of the section that belongs to it.
    """

    name: str
    kind: int
    flags: int
    address: int
    start: int
    size: int
    link: int


@dataclass(frozen=True)
class Function:
    """Machine code under one name.

    Attributes:
        name: as in the file, for C++ a mangled one.
        start: where its code begins in the file.
        size: bytes of it, the padding behind it not counted.
        is_kernel: whether it can be launched; the others are called by kernels.
        is_wave32: whether 32 threads run it together; False where that is not known.
    """

    name: str
    start: int
    size: int
    is_kernel: bool
    is_wave32: bool


@dataclass(frozen=True)
class CodeObject:
    """An ELF file for an AMD GPU.

    Attributes:
        target: `gfx1030`, `gfx10-3-generic`, or `unknown-0x..` for a number that is not known here.
        kernels: how many kernels it has.
        functions: its code, in the order of the file; kernels whose code cannot be found are missing.
    """

    target: str
    kernels: int
    functions: tuple[Function, ...]


def sections(content: Content) -> list[Section]:
    """Every section of an ELF file; none where it is no such file, is truncated, or has its table stripped."""
    if len(content) < 64 or content[:6] != MAGIC:
        return []
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", content, 0x3A)
    if size != 64 or not 0 < count <= _MOST_SECTIONS or names_index >= count or table + 64 * count > len(content):
        return []
    rows = [struct.unpack_from("<IIQQQQI", content, table + 64 * index) for index in range(count)]
    names_start, names_size = rows[names_index][4], rows[names_index][5]
    found = []
    for name, kind, flags, address, start, length, link in rows:
        text = _name(content, names_start, names_size, name)
        inside = 0 if kind == _NO_BITS else max(0, min(length, len(content) - start))
        found.append(Section(text, kind, flags, address, start, inside, link))
    return found


def _name(content: Content, start: int, size: int, place: int) -> str:
    if place >= size:
        return ""
    raw = bytes(content[start + place : start + min(size, place + _LONGEST_NAME)])
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def target_of(content: Content) -> str | None:
    """The GPU that an ELF file is for; None where it is not for one of AMD's."""
    if len(content) < 64 or content[:6] != MAGIC or struct.unpack_from("<H", content, 0x12)[0] != _AMDGPU:
        return None
    machine = struct.unpack_from("<I", content, 0x30)[0] & 0xFF
    return _MACHINES.get(machine, f"unknown-{machine:#x}")


def is_cut_off(content: Content) -> bool:
    """Whether an ELF file's table of sections, or a section, lies beyond its end."""
    (table,) = struct.unpack_from("<Q", content, 0x28)
    (count,) = struct.unpack_from("<H", content, 0x3C)
    return bool(count) and (table + 64 * count > len(content) or length_at(content, 0, len(content)) > len(content))


def length_at(content: Content, place: int, end: int) -> int:
    """How long the ELF file is that begins at a place in something longer; 0 where its table lies beyond the end."""
    if place + 64 > end:
        return 0
    (table,) = struct.unpack_from("<Q", content, place + 0x28)
    size, count = struct.unpack_from("<HH", content, place + 0x3A)
    if size != 64 or not 0 < count <= _MOST_SECTIONS or place + table + 64 * count > end:
        return 0
    ends = [table + 64 * count]
    for index in range(count):
        kind, _, _, start, length = struct.unpack_from("<IQQQQ", content, place + table + 64 * index + 4)
        ends.append(0 if kind == _NO_BITS else int(start + length))
    return int(max(ends))


def read_code_object(content: Content) -> CodeObject | None:
    """What an AMD GPU's ELF file holds; None where it is none.

    A kernel is a symbol `name.kd` of 64 bytes, its descriptor, which says where the code begins ("Kernel Descriptor"
    in LLVM's guide); before code object V3 it was a symbol of a type of its own.
    """
    target = target_of(content)
    if target is None:
        return None
    known = sections(content)
    entries: dict[str, tuple[int, bool]] = {}  # where the code of each kernel is loaded, and whether it is wave32
    sizes: dict[str, tuple[int, int]] = {}  # address and size of each function
    kernels: set[str] = set()
    # A file that is not stripped has in .symtab what .dynsym has, and the functions that kernels call.
    for section in [s for s in known if s.name == ".symtab"] or [s for s in known if s.name == ".dynsym"]:
        names = known[section.link] if section.link < len(known) else section
        count = min(section.size // 24, _MOST_SYMBOLS)
        table = bytes(content[section.start : section.start + 24 * count])
        spent = 0
        for name, info, _, index, value, size in struct.iter_unpack("<IBBHQQ", table[: len(table) // 24 * 24]):
            kind = info & 15
            if spent > 4 * names.size:  # linkers share the ends of names, not whole ones
                raise ValueError("a code object's names overlap")
            if kind == _FUNCTION and size:
                text = _name(content, names.start, names.size, name)
                sizes[text], spent = (value, size), spent + len(text)
            elif kind == _HSA_KERNEL:
                text = _name(content, names.start, names.size, name)
                kernels.add(text)
                spent += len(text)
                # The code follows its header of 256 bytes ("Code Object V2" in LLVM's guide).
                sizes[text] = (value + 256, max(size - 256, 0))
            elif kind == _OBJECT and size == _DESCRIPTOR_BYTES and 0 < index < len(known):
                text = _name(content, names.start, names.size, name)
                spent += len(text)
                if text.endswith(".kd"):
                    kernels.add(text[:-3])
                    entry = _entry(content, known[index], value)
                    if entry is not None:
                        entries[text[:-3]] = entry
    return CodeObject(target, len(kernels), tuple(_functions(known, entries, sizes, kernels)))


def _entry(content: Content, section: Section, address: int) -> tuple[int, bool] | None:
    """Where the code of the kernel whose descriptor lies at `address` is loaded, and whether it is wave32."""
    place = section.start + address - section.address
    if not section.start <= place <= section.start + section.size - _DESCRIPTOR_BYTES:
        return None
    (offset,) = struct.unpack_from("<q", content, place + 16)
    (properties,) = struct.unpack_from("<H", content, place + 56)
    return address + int(offset), bool(properties >> 10 & 1)


def _functions(
    known: list[Section],
    entries: dict[str, tuple[int, bool]],
    sizes: dict[str, tuple[int, int]],
    kernels: set[str],
) -> list[Function]:
    """Functions and kernels with their place in the file; one that names no size goes up to the next."""
    code = [section for section in known if section.flags & _EXECUTABLE and section.size]
    starts = {name: address for name, (address, _) in [*sizes.items(), *entries.items()]}
    borders = sorted(set(starts.values()))
    following = dict(itertools.pairwise(borders))
    found = []
    # Functions that kernels call say nothing of their own: theirs is what the kernels' is.
    are_wave32 = bool(entries) and all(is_wave32 for _, is_wave32 in entries.values())
    for name, address in starts.items():
        section = next((s for s in code if s.address <= address < s.address + s.size), None)
        if section is None:
            continue
        end = section.address + section.size
        # Up to the next one: code that lies in two functions is looked at once.
        size = min(sizes.get(name, (0, 0))[1] or end, following.get(address, end) - address)
        start = section.start + address - section.address
        is_wave32 = entries[name][1] if name in entries else are_wave32
        found.append(Function(name, start, min(size, end - address), name in kernels, is_wave32))
    return sorted(found, key=lambda function: function.start)

"""Where one instruction ends and the next begins in AMD GPU code, of the generations gfx9, gfx10 and gfx11.

The first bits of an instruction name its format, and the format, with a few fields that can ask for a literal or for
another word, its length. That is all that is decoded here. It is written as regular expressions, since Python's
matcher walks over millions of instructions a second; the words of the code are turned to big-endian first, so that
the bits which tell the most come first. Encodings: AMD's "Vega", "RDNA 1.0", "RDNA 2" and "RDNA3 Instruction Set
Architecture", chapter "Microcode Formats"; the tests hold every length to LLVM's disassembler.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

_ANY = rb"[\x00-\xff]"
_WORD = _ANY + b"{4}"
_EVEN, _ODD = range(0, 256, 2), range(1, 256, 2)
_LITERAL = 0xFF
# What the first source of a vector instruction says for "one more word": a literal, SDWA, DPP of 16 and of 8 lanes.
_SDWA, _DPP16, _DPP8, _DPP8_FI = 0xF9, 0xFA, 0xE9, 0xEA


@dataclass(frozen=True)
class Generation:
    """What differs between generations.

    Attributes:
        name: `gfx10`.
        memory: first bytes of the 8-byte formats, by name.
        vop3: first bytes of VOP3, and whether a literal may follow.
        vop3p: first bytes of VOP3P; on gfx9 it shares its first byte with VOP3.
        interpolation: first bytes of the 4-byte vector format.
        long_vop2: opcodes of VOP2 that always have a literal.
        setreg_imm: opcode of `s_setreg_imm32_b32` in SOPK, which has one too.
        extra: first sources of VOP1, VOP2 and VOPC that ask for one more word.
    """

    name: str
    memory: tuple[tuple[str, int], ...]
    vop3: int
    vop3p: int
    interpolation: int
    long_vop2: tuple[int, ...]
    setreg_imm: int
    extra: tuple[int, ...]


# Each first byte stands for four: the two bits that follow belong to fields.
_GFX9 = Generation(
    "gfx9",
    (("SMEM", 0xC0), ("EXP", 0xC4), ("DS", 0xD8), ("FLAT", 0xDC), ("MUBUF", 0xE0), ("MTBUF", 0xE8), ("MIMG", 0xF0)),
    0xD0, 0xD3, 0xD4, (0x17, 0x18, 0x24, 0x25), 0x14, (_LITERAL, _SDWA, _DPP16),
)  # fmt: skip
_GFX10 = Generation(
    "gfx10",
    (("SMEM", 0xF4), ("EXP", 0xF8), ("DS", 0xD8), ("FLAT", 0xDC), ("MUBUF", 0xE0), ("MTBUF", 0xE8), ("MIMG", 0xF0)),
    0xD4, 0xCC, 0xC8, (0x20, 0x21, 0x2C, 0x2D, 0x37, 0x38), 0x15, (_LITERAL, _SDWA, _DPP16, _DPP8, _DPP8_FI),
)  # fmt: skip
_GFX11 = Generation(
    "gfx11",
    (("SMEM", 0xF4), ("EXP", 0xF8), ("DS", 0xD8), ("FLAT", 0xDC), ("MUBUF", 0xE0), ("MTBUF", 0xE8), ("MIMG", 0xF0)),
    0xD4, 0xCC, 0xCE, (0x2C, 0x2D, 0x37, 0x38), 0x13, (_LITERAL, _DPP16, _DPP8, _DPP8_FI),
)  # fmt: skip
GENERATIONS = {"gfx9": _GFX9, "gfx10": _GFX10, "gfx11": _GFX11}


def generation_of(target: str) -> str | None:
    """The generation of a gfx target whose code can be decoded here; None for others."""
    found = re.match(r"gfx(9|10|11)(?:[0-9a-f]{2}|-[0-9-]*generic|-generic)$", target.partition(":")[0])
    return f"gfx{found[1]}" if found else None


def big_endian(code: bytes) -> bytes:
    """The 32-bit words of a code with their bytes turned round; a rest of less than a word is left out."""
    words = array("I", code[: len(code) // 4 * 4])
    words.byteswap()
    return words.tobytes()


def one_of(values: Iterable[int]) -> bytes:
    """Any of these bytes."""
    return b"[" + b"".join(b"\\x%02x" % value for value in sorted(set(values))) + b"]"


def _four(first: int) -> bytes:
    return one_of(range(first, first + 4))


def _no(values: Iterable[int]) -> bytes:
    return one_of(set(range(256)) - set(values))


@cache
def formats(generation: str) -> dict[str, bytes]:
    """A regular expression for each format, for whole instructions in big-endian words. No two match the same."""
    gen = GENERATIONS[generation]
    found = {
        "VOP2": vop2(generation, range(62)),
        "VOPC": _vop(one_of((0x7C, 0x7D)), _ANY, range(256), gen.extra),
        "VOP1": vop1(generation, without=()),
        "SOP2": _sop2(generation),
        "SOPK": _sopk(gen),
        "SOP1": rb"\xbe[\x80-\xff]" + _ANY + rb"(?:[^\xff]|\xff" + _WORD + b")",
        "SOPC": rb"\xbf[\x00-\x7f]" + _scalar_sources(),
        "SOPP": rb"\xbf[\x80-\xff]" + _ANY + b"{2}",
        "VOP3": vop3(generation, range(1024)),
        "VOP3P": _vop3p(generation),
    }
    for name, first in gen.memory:
        found[name] = _four(first) + _ANY + b"{7}"
    found["MIMG"] = _mimg(generation)
    if generation == "gfx11":
        found["VOPD"] = _vopd()
        found["VINTERP"] = rb"\xcd" + _ANY + b"{7}"
        found["LDSDIR"] = rb"\xce" + _ANY + b"{3}"
    else:
        found["VINTRP"] = _four(gen.interpolation) + _ANY + b"{3}"
    return found


def _sop2(generation: str) -> bytes:
    if generation != "gfx11":
        return rb"[\x80-\xaf]" + _ANY + _scalar_sources()
    # s_fmaak_f32 (0x45) and s_fmamk_f32 (0x46) of gfx11.5 always have a literal: opcodes are bits 29 to 23.
    heads = rb"\xa2[\x80-\xff]|\xa3[\x00-\x7f]"
    return (
        b"(?:(?:" + heads + b")" + _ANY + b"{6}|(?!" + heads + rb")[\x80-\xaf]" + _ANY + _scalar_sources() + b")"
    )  # fmt: skip


def _scalar_sources() -> bytes:
    """Two scalar sources, the last two bytes of a word, either of which can ask for a literal."""
    return rb"(?:[^\xff][^\xff]|(?:\xff" + _ANY + rb"|[^\xff]\xff)" + _WORD + b")"


def _sopk(gen: Generation) -> bytes:
    # Five bits of opcode: four in the first byte, one on top of the second; opcodes from 29 on are other formats.
    first, second = 0xB0 + (gen.setreg_imm >> 1), gen.setreg_imm & 1
    half = rb"[\x80-\xff]" if second else rb"[\x00-\x7f]"
    other = rb"[\x00-\x7f]" if second else rb"[\x80-\xff]"
    rest = one_of(set(range(0xB0, 0xBE)) - {first}) + _ANY + b"|" + rb"\xbe[\x00-\x7f]"
    return (
        b"(?:(?:" + rest + b"|" + one_of([first]) + other + b")" + _ANY + b"{2}|"
        + one_of([first]) + half + _ANY + b"{6})"
    )  # fmt: skip


def _vop(first: bytes, second: bytes, thirds: Iterable[int], extra: Iterable[int]) -> bytes:
    """A vector instruction of one word, or two: its first source is the last byte and the lowest bit of the third."""
    thirds = set(thirds)
    register, other = one_of(thirds & set(_ODD)), one_of(thirds & set(_EVEN))
    wanted = one_of(extra)
    return (
        first + second + b"(?:" + register + _ANY + b"|" + other
        + b"(?:" + _no(extra) + b"|" + wanted + _WORD + b"))"
    )  # fmt: skip


def vop2(generation: str, opcodes: Iterable[int]) -> bytes:
    """VOP2 with these opcodes, of 0 to 61."""
    gen = GENERATIONS[generation]
    chosen = set(opcodes)
    long = chosen & set(gen.long_vop2)
    plain = _vop(one_of(byte for op in chosen - long for byte in (2 * op, 2 * op + 1)), _ANY, range(256), gen.extra)
    if not long:
        return plain
    return b"(?:" + plain + b"|" + one_of(b for op in long for b in (2 * op, 2 * op + 1)) + _ANY + b"{7})"


def vop1(generation: str, without: Iterable[int]) -> bytes:
    """VOP1 but for some opcodes below 128."""
    gen = GENERATIONS[generation]
    thirds = set(range(256)) - {byte for op in without for byte in (2 * op, 2 * op + 1)}
    low = _vop(one_of((0x7E, 0x7F)), one_of(_EVEN), thirds, gen.extra)
    return b"(?:" + low + b"|" + _vop(one_of((0x7E, 0x7F)), one_of(_ODD), range(256), gen.extra) + b")"


def vop3(generation: str, opcodes: Iterable[int]) -> bytes:
    """VOP3 with these opcodes of ten bits."""
    gen = GENERATIONS[generation]
    pages: dict[int, set[int]] = {}
    for op in opcodes:
        pages.setdefault(op >> 8, set()).add(op & 255)
    if generation == "gfx9" and 3 in pages:
        pages[3] -= set(range(0x80, 0x100))  # VOP3P's
    heads = b"|".join(one_of([gen.vop3 + page]) + one_of(low) for page, low in sorted(pages.items()) if low)
    return b"(?:" + heads + b")" + _ANY + b"{2}" + _second_word(generation)


def _vop3p(generation: str) -> bytes:
    gen = GENERATIONS[generation]
    if generation == "gfx9":
        head = one_of([gen.vop3p]) + rb"[\x80-\xff]"
    else:
        head = (one_of([gen.vop3p]) if generation == "gfx11" else _four(gen.vop3p)) + _ANY
    return head + _ANY + b"{2}" + _second_word(generation)


def _second_word(generation: str) -> bytes:
    """The sources of VOP3, nine bits each from the lowest on; from gfx10 on one of them can ask for a literal."""
    if generation == "gfx9":
        return _WORD
    extra = one_of(GENERATIONS[generation].extra if generation == "gfx11" else [_LITERAL])
    first = _ANY + b"{2}" + one_of(_EVEN) + extra
    second = _ANY + one_of(byte for byte in range(256) if byte & 3 == 1) + rb"[\xfe\xff]"
    third = one_of(byte for byte in range(256) if byte & 7 == 3) + rb"[\xfc-\xff]"
    asks = b"(?:" + first + b"|" + second + b"|" + third + b")"
    return b"(?:(?=" + asks + b")" + _WORD + _WORD + b"|(?!" + asks + b")" + _WORD + b")"


def _mimg(generation: str) -> bytes:
    """Image instructions: from gfx10 on up to three more words with addresses."""
    first = _four(0xF0) + _ANY + b"{2}"
    if generation == "gfx9":
        return first + _ANY + _WORD
    if generation == "gfx11":
        return first + b"(?:" + one_of(_EVEN) + _WORD + b"|" + one_of(_ODD) + _WORD + _WORD + b")"
    words = [
        one_of(b for b in range(256) if b >> 1 & 3 == more) + _ANY + b"{%d}" % (4 + 4 * more) for more in range(4)
    ]
    return first + b"(?:" + b"|".join(words) + b")"


def _vopd() -> bytes:
    """Two operations in one: a literal where a first source asks for it, or one is fmaak (1) or fmamk (2)."""
    # Opcodes: x in bits 25:22 (the first byte's last two and the second's first two), y in 21:17.
    heads = [(first, second) for first in range(0xC8, 0xCC) for second in range(256)]
    long: dict[int, set[int]] = {}
    short: dict[int, set[int]] = {}
    for first, second in heads:
        x, y = (first & 3) << 2 | second >> 6, second >> 1 & 31
        (long if x in (1, 2) or y in (1, 2) else short).setdefault(first, set()).add(second)

    def either(chosen: dict[int, set[int]]) -> bytes:
        return b"(?:" + b"|".join(one_of([first]) + one_of(low) for first, low in chosen.items()) + b")"

    source = one_of(_EVEN) + rb"\xff"  # the last nine bits of a word
    asks = b"(?:" + source + b"|" + _ANY + b"{2}" + _ANY + b"{2}" + source + b")"
    return (
        b"(?:" + either(long) + _ANY + b"{10}|" + either(short)
        + b"(?:(?=" + asks + b")" + _ANY + b"{10}|(?!" + asks + b")" + _ANY + b"{6}))"
    )  # fmt: skip


@cache
def instruction(generation: str) -> re.Pattern[bytes]:
    """One instruction, with a group for each format by its name."""
    return re.compile(b"|".join(b"(?P<%s>%s)" % (name.encode(), text) for name, text in formats(generation).items()))


def instructions(code: bytes, generation: str) -> Iterator[tuple[int, int, str]]:
    """Offset, size and format of each instruction of a code; a word that is none has the format `` (empty)."""
    words, pattern, place = big_endian(code), instruction(generation), 0
    while place < len(words):
        found = pattern.match(words, place)
        size = found.end() - place if found else 4
        yield place, size, (found.lastgroup or "") if found else ""
        place += size

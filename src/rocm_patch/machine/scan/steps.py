"""gfx10 instructions as far as hardware bugs of gfx10.1 ask: what each reads and writes of scalar registers.

Opcodes and fields are those of "RDNA 1.0 Instruction Set Architecture" (AMD, 2020), held to LLVM's disassembler by
the tests. Registers are bits of an integer, s0 to s127; EXEC is 126 and 127.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import NamedTuple

from rocm_patch.machine.scan import isa

VECTOR, COMPARE, SCALAR, SCALAR_WAIT, SCALAR_MEMORY = "vector", "compare", "scalar", "scalar wait", "scalar memory"
PERMLANE = "permlane"
BUFFER, FLAT, IMAGE, LDS, EXPORT = "buffer", "flat", "image", "LDS", "export"
WAIT, WAIT_DEPENDENCY, BRANCH, END = "wait", "wait dependency", "branch", "end"
VECTOR_MEMORY = (BUFFER, FLAT, IMAGE)

NULL = 125
_VCC, _M0 = 106, 124
_CARRY_VOP2 = (0x28, 0x29, 0x2A)  # v_add_co_ci_u32 and kin: they write VCC
_VOP3B = {0x128, 0x129, 0x12A, 0x16D, 0x16E, 0x176, 0x177, 0x30F, 0x310, 0x319}  # a second, scalar result
_READLANE, _READFIRSTLANE, _READFIRSTLANE_VOP3 = 0x360, 0x02, 0x182
_PERMLANES = (0x377, 0x378)  # v_permlane16_b32, v_permlanex16_b32
_WIDE_SOP1 = {
    0x04, 0x06, 0x08, 0x0A, 0x0C, 0x1C, 0x1E, 0x1F, 0x21, *range(0x24, 0x2C), 0x2D, 0x2F, 0x31, *range(0x37, 0x3C),
}  # fmt: skip
_SAVEEXEC = {*range(0x24, 0x2C), *range(0x37, 0x3B), *range(0x3C, 0x48)}
_WIDE_SOP2 = {0x0B, *range(0x0F, 0x24, 2), 0x25, 0x29, 0x2A}
_NO_RESULT_SOPK = {*range(0x03, 0x0F), 0x13, 0x15}  # comparisons, s_setreg
_SMEM_WORDS = {
    0: 1,
    1: 2,
    2: 4,
    3: 8,
    4: 16,
    5: 1,
    6: 2,
    7: 4,
    8: 1,
    9: 2,
    10: 4,
    11: 8,
    12: 16,
    0x24: 2,
    0x25: 2,
    0x2A: 1,
}
_DS_WITH_M0 = {*range(0x18, 0x1E), 0x3D, 0x3E, 0x3F, 0xB0, 0xB1}  # GWS, consume, append, ordered count, addtid
_INVALIDATES = (0x71, 0x72)  # buffer_gl0_inv, buffer_gl1_inv: no resource, no offset
_CONDITIONAL = {*range(0x04, 0x0A), *range(0x17, 0x1B)}
_ENDS = {0x01, 0x1B, 0x1E}
# Vector instructions in one step of the matcher, which remembers each of them.
_MOST_IN_RUN = 1000


class Step(NamedTuple):
    """An instruction, or a run of vector instructions that write no scalar register.

    Attributes:
        place: its offset in the code.
        end: where the next one begins.
        kind: `VECTOR`, for the run; `COMPARE`, a vector instruction with a scalar result; and so on.
        reads: registers that it reads; a wait's immediate; where a branch leads to, from its own place.
        writes: registers that it writes.
        flag: of `COMPARE` whether the result is an operand of its own or implied (LLVM's `sdst`); of `SCALAR` and
            `BRANCH` whether it reads EXEC; of `FLAT` whether it has an offset without a segment; of `BUFFER` whether
            an image instruction before it can spoil it; of `IMAGE` whether it takes 16 bytes and more; of
            `SCALAR_WAIT` whether it waits for all of lgkmcnt.
        other: of `COMPARE` whether it writes EXEC; of `BRANCH` whether it may not be taken; of `SCALAR_WAIT` whether
            it waits for all of vscnt; of `FLAT` whether it is scratch at a negative offset, no multiple of 4.
    """

    place: int
    end: int
    kind: str
    reads: int = 0
    writes: int = 0
    flag: bool = False
    other: bool = False


# What one instruction is, wherever it stands: kind, reads, writes, flag, other.
_Meaning = tuple[str, int, int, bool, bool]


def steps(words: bytes, is_wave32: bool) -> list[Step]:
    """The steps of one function; instructions that matter to no bug are left out.

    Args:
        words: its code in big-endian words (`isa.big_endian`).
        is_wave32: whether comparisons write one register or two.
    """
    meaning = _meaning_wave32 if is_wave32 else _meaning_wave64
    found: list[Step] = []
    new, run_of_vectors = (
        tuple.__new__,
        (VECTOR, 0, 0, False, False),
    )  # a named tuple's own `new` takes four times as long
    for match in _pattern().finditer(words):
        (_, end), (run, place) = match.regs
        if place > run:
            found.append(new(Step, (run, place, *run_of_vectors)))
        known = meaning(words[place:end])
        if known is not None:
            found.append(new(Step, (place, end, *known)))
    return found


@cache
def _pattern() -> re.Pattern[bytes]:
    """A run of vector instructions that write no scalar register, and one instruction of any other kind."""
    gen = "gfx10"
    scalar = {*range(0x100), *_VOP3B, _READLANE, _READFIRSTLANE_VOP3, *_PERMLANES}
    plain = (
        isa.vop2(gen, set(range(62)) - set(_CARRY_VOP2)),
        isa.vop3(gen, set(range(1024)) - scalar),
        isa.vop1(gen, (_READFIRSTLANE,)),
        isa.formats(gen)["VOP3P"],
        isa.formats(gen)["VINTRP"],
    )
    # What is no instruction is passed word by word.
    other = b"|".join([*isa.formats(gen).values(), rb"[\x00-\xff]{4}"])
    return re.compile(b"((?:%s){0,%d})(?:%s)" % (b"|".join(plain), _MOST_IN_RUN, other))


def _meaning(code: bytes, pair: int) -> _Meaning | None:
    """What one instruction means; None for one that does not matter.

    Args:
        code: the instruction in big-endian words.
        pair: the bits of the registers that a comparison writes: one of a wave of 32, two of one of 64.
    """
    word, second = int.from_bytes(code[:4], "big"), int.from_bytes(code[4:8], "big")
    top = word >> 24
    if top < 0x80:
        return _vector(word, second, pair)
    if top < 0xB0:
        width = 2 if word >> 23 & 0x7F in _WIDE_SOP2 else 1
        return SCALAR, 0, _bits(word >> 16 & 0x7F, width), _reads_exec(word), False
    if top < 0xBE or (top == 0xBE and not word & 0x800000):
        return _sopk(word)
    if top == 0xBE:
        return _sop1(word)
    if top == 0xBF:
        return _sopp(word) if word & 0x800000 else (SCALAR, 0, 0, _reads_exec(word), False)
    if 0xD4 <= top < 0xD8:
        return _vop3(word, pair)
    if 0xF8 <= top < 0xFC:
        return EXPORT, 0, 0, False, False
    if len(code) < 8:
        return None
    if 0xF4 <= top < 0xF8:
        return _smem(word, second)
    if 0xF0 <= top < 0xF4:
        # Loads, stores and atomics, which come before sampling in the list of opcodes, use no sampler.
        sampler = _bits(second >> 19 & 0x7C, 4) if 0x20 <= word >> 18 & 0x7F < 0x66 else 0
        reads = _bits(second >> 14 & 0x7C, 4 if word & 0x8000 or word >> 18 & 0x7F >= 0x66 else 8) | sampler
        return IMAGE, reads, 0, len(code) >= 16, False
    if 0xE0 <= top < 0xE4 and word >> 18 & 0x7F in _INVALIDATES:
        return BUFFER, 0, 0, False, False
    if 0xE0 <= top < 0xEC:
        reads = _bits(second >> 14 & 0x7C, 4) | _bits(second >> 24, 1) | (1 << _M0 if word & 0x10000 else 0)  # to LDS
        return BUFFER, reads, 0, bool(word & 6), False
    if 0xDC <= top < 0xE0:
        return _flat(word, second)
    if 0xD8 <= top < 0xDC:
        has_m0 = word >> 18 & 255 in _DS_WITH_M0 or bool(word & 1 << 17)  # the second is GDS
        return LDS, 1 << _M0 if has_m0 else 0, 0, False, False
    return None  # interpolation and packed instructions behind a full run


@lru_cache(1 << 16)
def _meaning_wave32(code: bytes) -> _Meaning | None:
    return _meaning(code, 1)


@lru_cache(1 << 16)
def _meaning_wave64(code: bytes) -> _Meaning | None:
    return _meaning(code, 3)


def _bits(first: int, count: int) -> int:
    """Registers as bits; constants and the null register are none."""
    return 0 if first > 127 or first == NULL else ((1 << count) - 1) << first


def _vector(word: int, second: int, pair: int) -> _Meaning:
    if word >> 25 == 0x3E:
        if word >> 17 & 0x10:
            return COMPARE, 0, 0, True, True
        # SDWA can name another register for the result.
        is_named = word & 0x1FF == 0xF9 and second & 0x8000
        return COMPARE, 0, pair << (second >> 8 & 0x7F if is_named else _VCC), True, False
    if word >> 25 == 0x3F and word >> 9 & 255 == _READFIRSTLANE:
        return COMPARE, 0, _bits(word >> 17 & 0x7F, 1), False, False
    if word >> 25 in _CARRY_VOP2:
        return COMPARE, 0, pair << _VCC, True, False
    return VECTOR, 0, 0, False, False


def _vop3(word: int, pair: int) -> _Meaning:
    opcode = word >> 16 & 0x3FF
    if opcode < 0x100 and opcode & 0x10:
        return COMPARE, 0, 0, True, True
    if opcode < 0x100 or opcode in _VOP3B:
        register = word & 0x7F if opcode < 0x100 else word >> 8 & 0x7F
        return COMPARE, 0, 0 if register == NULL else pair << register, True, register == 126
    if opcode in (_READLANE, _READFIRSTLANE_VOP3):
        return COMPARE, 0, _bits(word & 0x7F, 1), False, False
    return PERMLANE if opcode in _PERMLANES else VECTOR, 0, 0, False, False


def _reads_exec(word: int) -> bool:
    return word & 0xFE == 126 or word >> 8 & 0xFE == 126


def _sop1(word: int) -> _Meaning:
    opcode = word >> 8 & 255
    if opcode in (0x20, 0x22):  # s_setpc_b64, s_rfe_b64
        return END, 0, 0, False, False
    written = _bits(word >> 16 & 0x7F, 2 if opcode in _WIDE_SOP1 else 1)
    return SCALAR, 0, written, word & 0xFE == 126 or opcode in _SAVEEXEC, False


def _sopk(word: int) -> _Meaning:
    opcode, result, value = word >> 23 & 31, word >> 16 & 0x7F, word & 0xFFFF
    if opcode in (0x1B, 0x1C):  # s_subvector_loop_begin, _end
        return BRANCH, _displacement(value), 0, True, True
    if opcode == 0x01 or 0x17 <= opcode <= 0x1A:  # s_version, s_waitcnt_vscnt and kin
        is_zero = result == NULL and value == 0
        return SCALAR_WAIT, 0, 0, is_zero and opcode == 0x1A, is_zero and opcode == 0x17
    written = 0 if opcode in _NO_RESULT_SOPK else _bits(result, 2 if opcode == 0x16 else 1)
    return SCALAR, 0, written, False, False


def _sopp(word: int) -> _Meaning | None:
    opcode, value = word >> 16 & 0x7F, word & 0xFFFF
    if opcode == 0x02 or opcode in _CONDITIONAL:
        return BRANCH, _displacement(value), 0, opcode in (0x08, 0x09), opcode != 0x02
    if opcode in (0x0C, 0x23):
        return WAIT if opcode == 0x0C else WAIT_DEPENDENCY, value, 0, False, False
    return (END, 0, 0, False, False) if opcode in _ENDS else None


def _displacement(value: int) -> int:
    return 4 + 4 * (value - 0x10000 if value & 0x8000 else value)


def _smem(word: int, second: int) -> _Meaning:
    opcode, base, result = word >> 18 & 255, (word & 0x3F) << 1, word >> 6 & 0x7F
    written = _SMEM_WORDS.get(opcode, 0)
    reads = 0
    if not 0x20 <= opcode < 0x40:  # the clocks and the caches
        is_buffer = 0x08 <= opcode <= 0x0F or 0x18 <= opcode <= 0x1F or 0x40 <= opcode < 0x80
        reads = _bits(base, 4 if is_buffer else 2) | _bits(second >> 25, 1)
        if not written:  # stores and atomics
            reads |= _bits(result, 4)
    return SCALAR_MEMORY, reads, _bits(result, written), False, False


def _flat(word: int, second: int) -> _Meaning:
    segment, register = word >> 14 & 3, second >> 16 & 0x7F
    width = 0 if register == 127 else (0, 1, 2, 0)[segment]
    offset = word & 0xFFF  # signed
    is_spoilt = segment == 1 and bool(offset & 0x800) and bool(offset & 3)
    return FLAT, _bits(register, width), 0, segment == 0 and bool(offset), is_spoilt

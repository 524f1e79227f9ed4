"""Which bits of its first word make an instruction the one that it is: what the catalog's rules are written in."""

from __future__ import annotations

from rocm_patch.machine.scan import isa

# Where the opcode lies in the first word: lowest bit and width, by format.
_OPCODES = {
    "SOP1": (8, 8), "SOP2": (23, 7), "SOPK": (23, 5), "SOPC": (16, 7), "SOPP": (16, 7), "VOP1": (9, 8),
    "VOP2": (25, 6), "VOPC": (17, 8), "VOP3": (16, 10), "VOP3P": (16, 7), "SMEM": (18, 8), "FLAT": (18, 7),
    "SCRATCH": (18, 7), "GLOBAL": (18, 7), "MUBUF": (18, 8), "DS": (18, 8), "MIMG": (18, 7),
}  # fmt: skip
_SCALAR_HEADS = {
    "SOP1": (0xFF800000, 0xBE800000), "SOP2": (0xC0000000, 0x80000000), "SOPK": (0xF0000000, 0xB0000000),
    "SOPC": (0xFF800000, 0xBF000000), "SOPP": (0xFF800000, 0xBF800000), "VOP1": (0xFE000000, 0x7E000000),
    "VOP2": (0x80000000, 0), "VOPC": (0xFE000000, 0x7C000000),
}  # fmt: skip
# FLAT's own field tells these apart.
_SEGMENTS = {"FLAT": 0, "SCRATCH": 1, "GLOBAL": 2}


def head(generation: str, name: str, opcode: int) -> bytes:
    """A regular expression for the first word of one instruction.

    Args:
        generation: `gfx10`.
        name: of its format; `GLOBAL` and `SCRATCH` are FLAT with another segment.
        opcode: as LLVM and AMD's documents number it for this generation.

    Raises:
        ValueError: the format is not known, or has no such opcode.
    """
    gen = isa.GENERATIONS[generation]
    memory = dict(gen.memory)
    if name not in _OPCODES:
        raise ValueError(f"unknown format {name!r}; it can be {', '.join(_OPCODES)}")
    low, width = _OPCODES[name]
    if name == "DS" and generation == "gfx9":
        low = 17
    if name == "MIMG" and generation == "gfx11":
        width = 8
    if name in _SCALAR_HEADS:
        mask, value = _SCALAR_HEADS[name]
    elif name == "VOP3":
        mask, value = 0xFC000000, gen.vop3 << 24
    elif name == "VOP3P":
        is_short = generation == "gfx10"
        mask = 0xFC000000 if is_short else 0xFF800000 if generation == "gfx9" else 0xFF000000
        value = (gen.vop3p << 24) + (0x800000 if generation == "gfx9" else 0)
    else:
        mask, value = 0xFC000000, memory["FLAT" if name in _SEGMENTS else name] << 24
    if name in _SEGMENTS:
        place = 16 if generation == "gfx11" else 14
        mask, value = mask | 3 << place, value | _SEGMENTS[name] << place
    if name == "MIMG" and generation != "gfx11":  # an eighth bit at the other end
        mask, value, opcode = mask | 1, value | opcode >> 7, opcode & 0x7F
    if opcode >> width:
        raise ValueError(f"{name} has no opcode {opcode:#x}")
    mask, value = mask | ((1 << width) - 1) << low, value | opcode << low
    classes = [
        isa.one_of(byte for byte in range(256) if byte & (mask >> shift & 255) == value >> shift & 255)
        for shift in (24, 16, 8, 0)
    ]
    return b"".join(classes)

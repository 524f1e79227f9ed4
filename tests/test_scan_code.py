"""Machine code: where instructions end, and which of them a card cannot run, held to LLVM's disassembler."""

import random
import re
import struct
import subprocess
import tempfile

import pytest

from code_objects import HIP_TARGETS, OBJDUMP, TRITON_TARGETS, disassembled, hip, needs_hipcc, needs_objdump, triton
from rocm_patch.machine import catalog
from rocm_patch.machine.scan import elf, flow, hazards, isa, opcodes

pytestmark = pytest.mark.torch_free
# LLVM's own work-arounds for gfx10.1, by the word that it inserts before the second instruction of each bug: a wait
# for one dependency (with the other fields as LLVM 15 and as Triton's LLVM fill them), s_mov_b32 null, 0.
WORK_AROUNDS = {
    0xBFA3FFE3: flow.VMEM_THEN_SCALAR, 0xBFA3FF03: flow.VMEM_THEN_SCALAR, 0xBFA3FFFE: flow.EXEC_READ_THEN_CMPX,
    0xBEFD0380: flow.SMEM_THEN_VECTOR, 0xBEFD0480: flow.SMEM_THEN_VECTOR,
}  # fmt: skip
NOTHING = 0xBF800000  # s_nop 0


def samples():
    found = [pytest.param("hip", target, marks=needs_hipcc, id=f"hip-{target}") for target in HIP_TARGETS]
    return found + [pytest.param("triton", target, id=f"triton-{target}") for target in TRITON_TARGETS]


def code_of(compiler, target):
    return hip(target) if compiler == "hip" else triton()[target]


def text_of(code):
    return next(section for section in elf.sections(code) if section.name == ".text")


@needs_objdump
@pytest.mark.parametrize(("compiler", "target"), samples())
def test_instructions_are_where_llvm_sees_them(compiler, target):
    code = code_of(compiler, target)
    text = text_of(code)
    ours = {
        text.address + place: size
        for place, size, _ in isa.instructions(code[text.start : text.start + text.size], isa.generation_of(target))
    }
    theirs = disassembled(code, target)
    assert len(theirs) > 20
    assert {address: ours.get(address) for address in theirs} == {a: size for a, (size, _) in theirs.items()}


@needs_objdump
@needs_hipcc
@pytest.mark.parametrize("target", ["gfx900", "gfx906", "gfx1010", "gfx1011", "gfx1030", "gfx1100"])
def test_lengths_of_random_words(target):
    """Words out of a generator, with sources that ask for literals and the like more often than chance would."""
    compared = sum(compare_random_words(target, seed) for seed in range(8))
    assert compared > 150


def compare_random_words(target, seed, pieces=150, each=32):
    """How many instructions LLVM could read, each as long as here."""
    chance = random.Random(f"{target} {seed}")
    buffer = bytearray()
    for _ in range(pieces):
        words = [chance.getrandbits(32) for _ in range(5)]
        if chance.random() < 0.5:
            words[0] = (words[0] & ~0x1FF) | chance.choice([0xFF, 0xFA, 0xF9, 0xE9, 0xEA, 0x80, 0x104])
        if chance.random() < 0.4:
            source = chance.choice
            words[1] = source([0xFF, 0x101, 0x80]) | source([0xFF, 0x101, 0x80]) << 9
            words[1] |= source([0, 0xFF, 0x102]) << 18
        buffer += struct.pack("<8I", *words, NOTHING, NOTHING, NOTHING)
    # In the place of the code of a file that is long enough: LLVM reads files, not words.
    code = bytearray(hip("gfx1030"))
    text = text_of(bytes(code))
    header = struct.unpack_from("<Q", code, 0x28)[0] + 64 * [s.name for s in elf.sections(bytes(code))].index(".text")
    struct.pack_into("<QQ", code, header + 24, len(code), len(buffer))
    code += buffer
    try:
        theirs = disassembled(bytes(code), target)
    except subprocess.CalledProcessError:  # LLVM 22 dies of some words
        return 0
    words, instruction = isa.big_endian(bytes(buffer)), isa.instruction(isa.generation_of(target))
    compared = 0
    for piece in range(pieces):
        size, shown = theirs.get(text.address + each * piece, (0, ".long"))
        if not shown.startswith(".long") and "Invalid" not in shown:
            found = instruction.match(words, each * piece)
            assert found is not None, shown
            third = struct.unpack_from("<I", buffer, each * piece + 4)[0] >> 18 & 0x1FF
            if found.end() - each * piece != size and found.lastgroup == "VOP3" and third == 0xFF:
                continue  # LLVM does not look at the third source of an instruction that has two
            assert found.end() - each * piece == size, shown
            compared += 1
    return compared


@needs_objdump
@pytest.mark.parametrize("rule", [row for row in catalog.hazards() if row.instructions], ids=lambda row: row.id)
def test_opcodes_of_rules_are_what_llvm_calls_so(rule):
    """Each is known to a chip that has it under the rule's name, and to the rule's chips not, or under another."""
    has = {"gfx9": "gfx906", "gfx10": "gfx1030", "gfx11": "gfx1150"}[rule.code]
    for text in rule.instructions:
        name, opcode, mnemonic = text.split()
        shown = {target: as_llvm_reads(rule.code, name, int(opcode, 16), target) for target in (has, *rule.archs)}
        if rule.kind == "encoding":
            assert any(line.startswith(mnemonic) for line in shown[has]), (text, shown[has])
            for target in rule.archs:
                assert not any(line.startswith(mnemonic) for line in shown[target]), (text, target, shown[target])
        else:
            assert all(any(line.startswith(mnemonic) for line in lines) for lines in shown.values()), (text, shown)


def as_llvm_reads(generation, name, opcode, target):
    """What LLVM makes of one opcode with a few operands."""
    pattern = opcodes.head(generation, name, opcode)
    ranges = [
        [value for value in range(256) if re.fullmatch(part, bytes([value]), re.DOTALL)]
        for part in re.findall(rb"\[(?:\\x[0-9a-f]{2})+\]", pattern)
    ]
    lines = []
    code = bytearray(triton()["gfx1100"])
    text = text_of(bytes(code))
    for operands, second in (
        (0, 0x04020501),
        (0x00040508, 0x007D0401),
        (0x00020104, 0x017D0002),
        (0x9F01, 0x00010409),
    ):
        word = 0
        for shift, values in zip((24, 16, 8, 0), ranges, strict=True):
            wanted = operands >> shift & 255
            word |= min(values, key=lambda value: bin(value ^ wanted).count("1")) << shift
        struct.pack_into("<8I", code, text.start, word, second, *[NOTHING] * 6)
        lines.append(disassembled(bytes(code), target).get(text.address, (0, ""))[1])
    return lines


@needs_hipcc
def test_what_gfx1010_cannot_run_of_gfx1030s_code():
    code = hip("gfx1030")
    found = hazards.examine(code, elf.read_code_object(code), "gfx1010")
    by_name = {kernel.name: kernel.hazards for kernel in found.kernels}
    assert by_name["prefetched_loop"]["inst-prefetch"] == 2
    assert by_name["dot_product"]["gfx10-dot"] == 1
    assert "add" not in by_name
    assert (found.examined, found.called, found.cannot_encode) == (5, 1, 1)
    assert found.clean == found.examined - len(by_name) > 0
    worst = sorted(found.kernels, key=lambda kernel: kernel.rank)
    assert worst[0].name == "dot_product"


@needs_hipcc
@needs_objdump
def test_counts_agree_with_the_disassembler():
    code = hip("gfx1030")
    shown = [text for _, text in disassembled(code, "gfx1030").values()]
    found = hazards.examine(code, elf.read_code_object(code), "gfx1010")
    assert found.places["inst-prefetch"] == sum(text.startswith("s_inst_prefetch") for text in shown) == 2
    assert found.places["gfx10-dot"] == sum(text.startswith("v_dot2") for text in shown) == 1
    # LLVM for gfx1010 cannot read what that chip has not.
    assert sum(text.startswith(".long") for _, text in disassembled(code, "gfx1010").values()) == 1
    gfx906 = hip("gfx906")
    shown = [text for _, text in disassembled(gfx906, "gfx906").values()]
    has_not = ("v_dot2", "v_fmac_f32", "v_xnor", "v_dot4", "v_dot8")
    found = hazards.examine(gfx906, elf.read_code_object(gfx906), "gfx900")
    assert found.places["gfx9-dot"] == sum(text.startswith(has_not) for text in shown) > 0


# A card of the same generation that has the fewest instructions.
OLDEST = {"gfx9": "gfx900", "gfx10": "gfx1010", "gfx11": "gfx1103"}


@needs_objdump
@pytest.mark.parametrize(("compiler", "target"), samples())
def test_every_count_agrees_with_the_disassembler(compiler, target):
    code = code_of(compiler, target)
    read = elf.read_code_object(code)
    shown = [text for _, text in disassembled(code, target).values()]
    card = OLDEST[isa.generation_of(target)]
    found = hazards.examine(code, read, card)
    for rule in hazards.rules_for(card, target):
        if rule.instructions:
            names = tuple({text.split()[2] for text in rule.instructions})
            assert found.places.get(rule.id, 0) == sum(text.startswith(names) for text in shown), rule.id
    assert read.kernels == len(descriptors(code))


def descriptors(code):
    """The kernels that LLVM's list of symbols has."""
    with tempfile.NamedTemporaryFile(suffix=".co") as file:
        file.write(code)
        file.flush()
        table = subprocess.run([OBJDUMP, "-t", "-T", file.name], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in table.splitlines() if line.endswith(".kd")}


@pytest.mark.parametrize(("compiler", "target"), samples())
def test_code_for_the_card_itself_is_clean(compiler, target):
    code = code_of(compiler, target)
    found = hazards.examine(code, elf.read_code_object(code), target)
    assert found.examined > 0 and found.clean == found.examined and not found.kernels


def test_gfx1100s_code_is_examined_for_other_rdna3_chips():
    code = triton()["gfx1100"]
    found = hazards.examine(code, elf.read_code_object(code), "gfx1103")
    assert found.clean == found.examined == 1


def taken_out(code):
    """Code for gfx1010 without LLVM's work-arounds, and where the instructions stood that they protected."""
    changed, expected = bytearray(code), {}
    for function in elf.read_code_object(code).functions:
        body = code[function.start : function.start + function.size]
        places = [place for place, _, _ in isa.instructions(body, "gfx10")]
        words = {place: struct.unpack_from("<I", body, place)[0] for place in places}
        for place in places:
            if words[place] in WORK_AROUNDS:
                struct.pack_into("<I", changed, function.start + place, NOTHING)
                after = next(later for later in places if later > place and words[later] not in WORK_AROUNDS)
                expected.setdefault(WORK_AROUNDS[words[place]], set()).add(function.start + after)
    return bytes(changed), expected


def found_in(code):
    found = {}
    for function in elf.read_code_object(code).functions:
        words = isa.big_endian(code[function.start : function.start + function.size])
        for check, places in flow.find(words, function.is_wave32).items():
            found.setdefault(check, set()).update(function.start + place for place in places)
    return found


@pytest.mark.parametrize("source", [pytest.param("hip", marks=needs_hipcc), "triton"])
def test_every_work_around_that_is_taken_out_is_missed_and_nothing_else(source):
    """LLVM's own decisions are the reference: it has put one work-around wherever it sees a bug."""
    code = code_of(source, "gfx1010")
    assert found_in(code) == {}
    changed, expected = taken_out(code)
    assert expected and found_in(changed) == expected


def sequence(*words):
    return isa.big_endian(struct.pack(f"<{len(words)}I", *words))


S_LOAD_S4_5 = (0xF4000202, 0xFA000000)  # s_load_dword s8, s[4:5], 0x0
V_CMP_S4 = (0xD4810004, 0x00020300)  # v_cmp_lt_i32_e64 s4, v0, v1
GLOBAL_LOAD_S4_5 = (0xDC308000, 0x01040000)  # global_load_dword v1, v0, s[4:5]
S_MOV_S4 = (0xBE840380,)  # s_mov_b32 s4, 0
V_MOV = (0x7E020300,)  # v_mov_b32 v1, v0
V_CMPX = (0x7C220300,)  # v_cmpx_lt_f32 v0, v1
S_MOV_EXEC = (0xBE86037E,)  # s_mov_b32 s6, exec_lo
DS_READ = (0xD8D80000, 0x01000000)  # ds_read_b32 v1, v0
S_BRANCH_NEXT = (0xBF820000,)
S_CBRANCH_NEXT = (0xBF850000,)
END = (0xBF810000,)
V_PERMLANE = (0xD7770005, 0x000C0501)


@pytest.mark.parametrize(
    ("check", "first", "between", "second", "cures"),
    [
        (
            flow.SMEM_THEN_VECTOR, S_LOAD_S4_5, V_MOV, V_CMP_S4,
            [S_MOV_EXEC, (0xBF8CC07F,), (0xBD7D0000,)],  # s_waitcnt lgkmcnt(0), s_waitcnt_lgkmcnt null, 0
        ),
        (flow.VMEM_THEN_SCALAR, GLOBAL_LOAD_S4_5, (NOTHING,), S_MOV_S4, [V_MOV, (0xBF8C0000,), (0xBFA3FFE3,)]),
        (flow.EXEC_READ_THEN_CMPX, S_MOV_EXEC, V_MOV, V_CMPX, [V_CMP_S4, (0xBFA3FFFE,)]),
        (flow.LDS_BRANCH_VMEM, DS_READ, S_CBRANCH_NEXT, GLOBAL_LOAD_S4_5, [(0xBBFD0000,)]),
        (flow.CMPX_THEN_PERMLANE, V_CMPX, (NOTHING,), V_PERMLANE, [V_MOV]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_sequence_and_its_work_arounds(check, first, between, second, cures):
    words = sequence(*first, *between, *second, *END)
    assert flow.find(words, True)[check] == {4 * len(first + between)}
    for cure in cures:
        assert check not in flow.find(sequence(*first, *between, *cure, *second, *END), True), cure


def test_a_bug_across_a_loop_and_behind_a_branch():
    # The load is at the end of a loop, the write at its begin: only the way back joins them.
    loop = (*S_MOV_S4, *GLOBAL_LOAD_S4_5, 0xBF850000 | (-4 & 0xFFFF), *END)
    assert flow.find(sequence(*loop), True)[flow.VMEM_THEN_SCALAR] == {0}
    # A branch jumps over the work-around.
    jump = (*GLOBAL_LOAD_S4_5, 0xBF850001, *V_MOV, *S_MOV_S4, *END)
    assert flow.find(sequence(*jump), True)[flow.VMEM_THEN_SCALAR] == {16}
    straight = (*GLOBAL_LOAD_S4_5, NOTHING, *V_MOV, *S_MOV_S4, *END)
    assert flow.VMEM_THEN_SCALAR not in flow.find(sequence(*straight), True)
    # Nothing passes an unconditional branch.
    never = (*GLOBAL_LOAD_S4_5, 0xBF820001, *S_MOV_S4, *END)
    assert flow.VMEM_THEN_SCALAR not in flow.find(sequence(*never), True)


def test_which_registers_an_instruction_reads():
    ds_append, ds_append_gds, s_mov_m0 = (0xD8F80000, 0), (0xD8D20000, 0), (0xBEFC0380,)
    assert flow.VMEM_THEN_SCALAR in flow.find(sequence(*ds_append, *s_mov_m0, *END), True)
    assert flow.VMEM_THEN_SCALAR in flow.find(sequence(*ds_append_gds, *s_mov_m0, *END), True)
    assert flow.VMEM_THEN_SCALAR not in flow.find(sequence(*DS_READ, *s_mov_m0, *END), True)
    image_load = (0xF0000F00, 0x00040000)  # of s[16:23], with no sampler
    assert flow.VMEM_THEN_SCALAR not in flow.find(sequence(*image_load, 0xBE810380, *END), True)
    assert flow.VMEM_THEN_SCALAR in flow.find(sequence(*image_load, 0xBE900380, *END), True)
    s_andn2_wrexec_b32 = (0xBE864706,)
    assert flow.EXEC_READ_THEN_CMPX in flow.find(sequence(*s_andn2_wrexec_b32, *V_CMPX, *END), True)


def test_a_branch_out_of_the_function_leads_nowhere():
    words = sequence(*S_MOV_S4, *GLOBAL_LOAD_S4_5, 0xBF850000 | (-40 & 0xFFFF), *END)
    assert flow.VMEM_THEN_SCALAR not in flow.find(words, True)


def test_scalar_arithmetic_of_gfx115x_with_a_literal():
    code = struct.pack("<3I", 0xA2800408, 0x3F8000FF, NOTHING)  # s_fmaak_f32 s0, s8, s4, 1.0
    assert [size for _, size, _ in isa.instructions(code, "gfx11")] == [8, 4]


def test_instructions_that_are_a_bug_by_themselves():
    assert flow.find(sequence(0xBF82003F, *END), True) == {flow.BRANCH_OFFSET_3F: {0}}
    assert flow.find(sequence(0xDC300004, 0x017D0000, *END), True) == {flow.FLAT_OFFSET: {0}}
    assert flow.find(sequence(0xDC304FFD, 0x017D0002, *END), True) == {flow.SCRATCH_OFFSET: {0}}
    image = (0xF0800F04, 0x00820000, 0, 0)  # image_sample with three words of addresses
    assert flow.find(sequence(*image, 0xE0300004, 0x80010000, *END), True) == {flow.NSA_THEN_BUFFER: {16}}


def test_every_check_has_a_rule_and_every_rule_a_check_or_instructions():
    assert {row.check for row in catalog.hazards() if row.check} == set(flow.CHECKS)
    for row in catalog.hazards():
        assert bool(row.check) != bool(row.instructions), row.id
        assert row.kind in ("encoding", "bug")
        for text in row.instructions:
            name, opcode, mnemonic = text.split()
            assert opcodes.head(row.code, name, int(opcode, 16)) and re.fullmatch(r"[a-z0-9_]+", mnemonic)


def test_targets_that_cannot_be_decoded_are_counted():
    code = bytearray(triton()["gfx1100"])
    struct.pack_into("<I", code, 0x30, 0x4E)  # gfx1201
    read = elf.read_code_object(bytes(code))
    found = hazards.examine(bytes(code), read, "gfx1201")
    assert (read.target, found.examined, found.undecoded) == ("gfx1201", 0, 1)

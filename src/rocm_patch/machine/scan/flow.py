"""Sequences of gfx10 instructions that trigger hardware bugs of gfx10.1, found along the flow of control.

Each bug takes a first instruction and a second one, with nothing between that is a work-around. LLVM, when it
compiles for gfx10.1, searches backwards from every second instruction for a first one, and inserts the work-around
where it finds one (llvm/lib/Target/AMDGPU/GCNHazardRecognizer.cpp). What counts as first, as second and as
work-around here is what counts there, read forwards: five sets are carried along the code and joined where branches
meet, until nothing changes any more.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Mapping

from rocm_patch.machine.scan.steps import (
    BRANCH,
    BUFFER,
    COMPARE,
    END,
    EXPORT,
    FLAT,
    IMAGE,
    LDS,
    NULL,
    PERMLANE,
    SCALAR,
    SCALAR_MEMORY,
    SCALAR_WAIT,
    VECTOR,
    VECTOR_MEMORY,
    WAIT,
    WAIT_DEPENDENCY,
    Step,
    steps,
)

SMEM_THEN_VECTOR = "smem-then-vector"
VMEM_THEN_SCALAR = "vmem-then-scalar"
EXEC_READ_THEN_CMPX = "exec-read-then-cmpx"
LDS_BRANCH_VMEM = "lds-branch-vmem"
BRANCH_OFFSET_3F = "branch-offset-3f"
FLAT_OFFSET = "flat-offset"
SCRATCH_OFFSET = "scratch-offset"
CMPX_THEN_PERMLANE = "cmpx-then-permlane"
NSA_THEN_BUFFER = "nsa-then-buffer"
CHECKS = (
    SMEM_THEN_VECTOR, VMEM_THEN_SCALAR, EXEC_READ_THEN_CMPX, LDS_BRANCH_VMEM, BRANCH_OFFSET_3F, FLAT_OFFSET,
    NSA_THEN_BUFFER, SCRATCH_OFFSET, CMPX_THEN_PERMLANE,
)  # fmt: skip

# Kinds that can be a bug by themselves or with the one right before.
_ALONE = frozenset((BRANCH, BUFFER, FLAT, IMAGE))
_EXEC = 3 << 126
_REGISTERS = (1 << NULL) - 1
_OFFSET_3F = 4 + 4 * 0x3F
# Fields of the waits' immediates; zero waits for all.
_LGKM, _VM_VSRC, _SA_SDST = 0x3F00, 0x1C, 0x01

# What is carried along: registers read by scalar memory; registers read by vector memory or LDS; whether something
# other than a vector instruction has read EXEC; which came last, LDS (1) or vector memory (2), times 4 once a branch
# has followed; and whether the last vector instruction was v_cmpx (LLVM lets a v_nop pass here; that is not seen).
_State = tuple[int, int, int, int, int]
_NOTHING: _State = (0, 0, 0, 0, 0)
_LAST_LDS, _LAST_VMEM = 1, 2
_Found = dict[str, set[int]]


def find(words: bytes, is_wave32: bool) -> Mapping[str, set[int]]:
    """Where each bug is triggered in one function: check to the offsets of the second instructions.

    Args:
        words: the function's code for gfx10 in big-endian words (`isa.big_endian`).
        is_wave32: whether comparisons write one register or two.
    """
    found: _Found = {}
    code = steps(words, is_wave32)
    before: Step | None = None
    for step in code:
        if step.kind not in _ALONE:
            before = None
            continue
        if step.kind == BRANCH and step.reads == _OFFSET_3F:
            found.setdefault(BRANCH_OFFSET_3F, set()).add(step.place)
        elif step.kind == FLAT and step.flag:
            found.setdefault(FLAT_OFFSET, set()).add(step.place)
        elif step.kind == FLAT and step.other:
            found.setdefault(SCRATCH_OFFSET, set()).add(step.place)
        elif step.kind == BUFFER and step.flag and before is not None and _is_nsa_before(before, step):
            found.setdefault(NSA_THEN_BUFFER, set()).add(step.place)
        before = step
    _walk(code, found)
    return found


def _is_nsa_before(before: Step, step: Step) -> bool:
    return before.kind == IMAGE and before.flag and before.end == step.place


def _walk(code: list[Step], found: _Found) -> None:
    """Carry the state through every block until nothing changes; the sets only grow, so that ends."""
    targets = {step.place + step.reads for step in code if step.kind == BRANCH}
    blocks = _blocks(code, targets)
    starts = sorted(blocks)
    following = dict(itertools.pairwise(starts))
    before: dict[int, _State] = {}
    waiting, queued = list(starts), set(starts)
    while waiting:
        start = heapq.heappop(waiting)
        queued.discard(start)
        leaves, end = _through(blocks[start], before.get(start, _NOTHING), found)
        ways = [(_block_of(starts, target), state) for target, state in leaves]
        if end is not None:
            ways.append((following.get(start), end))
        for target, state in ways:
            if target is None:  # out of the function
                continue
            old = before.get(target, _NOTHING)
            new = (
                old[0] | state[0], old[1] | state[1], old[2] | state[2], old[3] | state[3], old[4] | state[4],
            )  # fmt: skip
            if new != old:
                before[target] = new
                if target not in queued:
                    queued.add(target)
                    heapq.heappush(waiting, target)


def _blocks(code: list[Step], targets: set[int]) -> dict[int, list[Step]]:
    """The steps between a place that is branched to, or a branch, and the next one, by their first place."""
    blocks: dict[int, list[Step]] = {}
    wanted = sorted(targets, reverse=True)
    current: list[Step] = []
    is_new = True
    for step in code:
        while wanted and wanted[-1] <= step.place:
            wanted.pop()
            is_new = True
        if is_new:
            current = blocks.setdefault(step.place, [])
        current.append(step)
        while step.kind == VECTOR and wanted and wanted[-1] < step.end:
            # Into the middle of a run: what follows there is a vector instruction as well.
            middle = step._replace(place=wanted.pop())
            current = blocks.setdefault(middle.place, [middle])
        is_new = step.kind in (BRANCH, END)
    return blocks


def _block_of(starts: list[int], target: int) -> int | None:
    """The block that a branch to `target` enters: instructions that do not matter may come before it."""
    if target < 0:
        return None
    place = bisect.bisect_left(starts, target)
    return starts[place] if place < len(starts) else None


def _through(block: list[Step], state: _State, found: _Found) -> tuple[list[tuple[int, _State]], _State | None]:
    """What leaves a block by its branches, with where to, and at its end; None where nothing passes that."""
    scalar, vector, exec_read, last, cmpx = state
    leaves: list[tuple[int, _State]] = []
    for place, _, kind, reads, writes, flag, other in block:
        if kind == VECTOR:
            vector = cmpx = 0
        elif kind == PERMLANE:
            if cmpx:
                found.setdefault(CMPX_THEN_PERMLANE, set()).add(place)
            vector = cmpx = 0
        elif kind == COMPARE:
            vector, cmpx = 0, int(other)
            if scalar & writes & _REGISTERS:
                found.setdefault(SMEM_THEN_VECTOR, set()).add(place)
                scalar = 0
            if other and exec_read:
                found.setdefault(EXEC_READ_THEN_CMPX, set()).add(place)
            exec_read = 0 if flag else exec_read
        elif kind in (SCALAR, SCALAR_MEMORY):
            if vector & writes:
                found.setdefault(VMEM_THEN_SCALAR, set()).add(place)
                vector = 0
            scalar, exec_read = (0, exec_read | flag) if kind == SCALAR else (scalar | reads, exec_read)
        elif kind == LDS or kind in VECTOR_MEMORY:
            mine, others = (_LAST_LDS, _LAST_VMEM) if kind == LDS else (_LAST_VMEM, _LAST_LDS)
            if last & others << 2:
                found.setdefault(LDS_BRANCH_VMEM, set()).add(place)
            last, exec_read, vector = mine, 1, vector | reads | _EXEC
        elif kind == EXPORT:
            exec_read = 1
        elif kind == WAIT:
            scalar, vector = scalar if reads & _LGKM else 0, vector if reads else 0
        elif kind == WAIT_DEPENDENCY:
            vector, exec_read = vector if reads & _VM_VSRC else 0, exec_read if reads & _SA_SDST else 0
        elif kind == SCALAR_WAIT:
            scalar, last = 0 if flag else scalar, 0 if other else last
        elif kind == BRANCH:
            last, exec_read = (last & 3 | last >> 2) << 2, exec_read | flag
            leaves.append((place + reads, (scalar, vector, exec_read, last, cmpx)))
            if not other:
                return leaves, None
        else:
            return leaves, None
    return leaves, (scalar, vector, exec_read, last, cmpx)

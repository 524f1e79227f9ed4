"""implicit_gemm: one kernel computes the convolution as a matrix product without unrolling the image.

S. Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning" (arXiv:1410.0759), section 3.1. Sums run over the
channels of one tap at a time, for which operands are copied to channels last where they are not (a transpose in
memory, as vendor libraries make it); with few channels they run through channels and taps of operands as they are.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work, rates
from rocm_patch.conv.fused import (
    MOST_BLOCKS,
    Fused,
    Plan,
    cdiv,
    dense,
    next_power_of_2,
    reduction,
    result_of,
    sizes_of,
)
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import Strategy
from rocm_patch.conv.to_last import Copy, ToLast
from rocm_patch.kernels.launch import INTERPRETED, Launch, multiprocessors, target_of
from rocm_patch.kernels.variant import Target


class Blocks(NamedTuple):
    """Shape of a program's block, and how it is run."""

    rows: int
    columns: int
    summed: int
    warps: int
    stages: int


# By rows (filters, or channels in grad_input). Hopper: of the shapes tried on the layers of conv/cases.py those that
# were fastest for some. AMD: shapes that spill no register (docs/KERNELS.md); not yet run on AMD hardware.
HOPPER = (Blocks(128, 128, 64, 4, 3), Blocks(64, 128, 64, 4, 3), Blocks(32, 256, 32, 4, 3), Blocks(16, 128, 32, 4, 3))
AMPERE = (Blocks(64, 128, 32, 4, 3), Blocks(32, 128, 32, 4, 3), Blocks(16, 128, 32, 4, 3))
WMMA = (Blocks(64, 64, 32, 4, 2), Blocks(32, 64, 32, 4, 2), Blocks(16, 64, 32, 4, 2))
FMA = (Blocks(64, 64, 16, 4, 2), Blocks(32, 64, 16, 4, 2), Blocks(16, 64, 16, 4, 2))
FMA_HALF = (Blocks(32, 32, 16, 4, 2), Blocks(16, 32, 16, 4, 2))
_INTERPRETED: tuple[Blocks, ...] = (Blocks(32, 32, 32, 4, 1), Blocks(16, 32, 16, 4, 1))
ROWS = (128, 64, 32, 16)
# Below so many channels a step of one tap would be mostly padding.
_FEWEST_CHANNELS = 16
# A split has to be worth its part of memory.
_FEWEST_STEPS = 8
_MOST_SPLITS = 64


def choices(target: Target, dtype: str) -> tuple[Blocks, ...]:
    """The block shapes for a target."""
    if target.backend == "cuda":
        if dtype == "float32":
            return FMA
        return HOPPER if int(target.arch) >= 90 else AMPERE
    if dtype == "float32":
        return FMA
    return WMMA if str(target.arch).startswith(("gfx11", "gfx12", "gfx9")) else FMA_HALF


def _blocks(spec: ConvSpec, rows: int) -> Blocks | None:
    """The block with so many rows, None where the target has none."""
    shapes = _INTERPRETED
    if not INTERPRETED:
        shapes = choices(target_of(torch.device(spec.device).index or 0), spec.dtype)
    return next((blocks for blocks in shapes if blocks.rows == rows), None)


def _scattered(blocks: Blocks) -> Blocks:
    """The block for sums through channels and taps, whose addresses take registers; faster so on an H200."""
    return blocks._replace(summed=min(blocks.summed, 32), stages=4 if blocks.summed > 32 else blocks.stages)


def _splits(spec: ConvSpec, programs: int, steps: int) -> int:
    """In how many parts a sum is cut so that the card is full."""
    wanted = max(1, round(2 * multiprocessors(spec.device) / programs)) if programs else 1
    if programs >= multiprocessors(spec.device):
        wanted = 1
    return max(1, min(wanted, steps // _FEWEST_STEPS, _MOST_SPLITS))


def _map_plan(spec: ConvSpec, blocks: Blocks) -> Plan:
    """forward, and grad_input: the same with the roles of channels and filters exchanged."""
    sizes = sizes_of(spec)
    is_forward = spec.direction == FORWARD
    rows, depth = (sizes["K"], sizes["C"]) if is_forward else (sizes["C"], sizes["K"])
    stride = math.prod(spec.stride)
    source = spec.image if is_forward else spec.grad
    if is_forward or stride == 1:
        positions, taps = math.prod(spec.result) // spec.result[1], spec.taps
        phases = 1
    else:  # of the largest phase
        positions = spec.batch * math.prod(map(cdiv, spec.spatial, spec.stride))
        taps = math.prod(map(cdiv, spec.kernel, spec.stride))
        phases = stride
    last = depth >= _FEWEST_CHANNELS
    blocks = blocks if last else _scattered(blocks)
    steps = taps * cdiv(depth, blocks.summed) if last else cdiv(taps * depth, blocks.summed)
    programs = cdiv(rows, blocks.rows) * cdiv(positions, blocks.columns)
    splits = _splits(spec, programs * spec.groups * phases, steps)
    # A phase with fewer taps has fewer steps; its later splits are empty and write zeros.
    integers = {**sizes, "STEPS": cdiv(steps, splits)}
    part = "float32" if splits > 1 else spec.dtype
    constants: dict[str, int | bool] = {"DEPTH": len(spec.kernel) == 3}
    shape = {"POSITIONS": blocks.columns, "SUMMED": blocks.summed}
    if is_forward:
        constants = {"HAS_BIAS": False, **constants, "X_LAST": last, "Y_LAST": spec.channels_last, "ONE_TAP": last}
        name = "forward"
        types: tuple[str, ...] = (spec.dtype, spec.dtype, spec.dtype, part)
        constants |= {"FILTERS": blocks.rows, **shape}
    else:
        integers["SPLITS"] = splits
        constants |= {"STRIDED": stride > 1, "G_LAST": last, "Y_LAST": spec.channels_last, "ONE_TAP": last}
        name, types = "grad_input", (spec.dtype, spec.dtype, part)
        constants |= {"CHANNELS": blocks.rows, **shape}
    gemm = Launch(
        "gemm", name, types, integers, constants, (programs, spec.groups, phases * splits), spec.device,
        blocks.warps, blocks.stages, aligned=("C", "K", "W", "OW"),
    )  # fmt: skip
    of_weight = _weight_copy(spec)
    to_last = ToLast(spec, Copy(source, is_shared=not is_forward), of_weight) if last else None
    sum_up = reduction(spec, math.prod(spec.result), splits)
    length = math.prod(spec.result)

    def run(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        result = result_of(spec, first)
        if to_last is None:
            first, second = dense(first), dense(second)
        elif of_weight is not None:
            first, second = to_last.both(first, second)
        else:
            first, second = to_last.one(first), _weight_last(spec, second)
        parts = result if splits == 1 else first.new_empty(splits * length, dtype=torch.float32)
        if is_forward:
            gemm(first, second, second, parts)
        else:
            gemm(first, second, parts)
        if splits > 1:
            sum_up(parts, result)
        return result

    launches = (gemm, *(to_last.launches if to_last else ()), *((sum_up,) if splits > 1 else ()))
    # A weight with channels last is made dense before it is brought into grad_input's order.
    copies = (math.prod(source) + (2 if spec.channels_last else 1) * math.prod(spec.weight)) * spec.itemsize
    return Plan(launches, run, copies + (4 * splits * length if splits > 1 else 0))


def _weight_copy(spec: ConvSpec) -> Copy | None:
    """forward: (G K, C, taps) to (G K, taps, C); grad_input: to (C, taps, K); None where `_weight_last` does it."""
    filters, channels, taps = spec.weight[0], spec.weight[1], spec.taps
    if spec.direction == FORWARD:
        return Copy((filters, channels, taps)) if taps > 1 else None
    return Copy((channels, filters, taps), (taps, channels * taps, 1)) if spec.groups == 1 else None


def _weight_last(spec: ConvSpec, weight: torch.Tensor) -> torch.Tensor:
    if spec.direction == FORWARD:
        return dense(weight)
    grouped = weight.reshape(spec.groups, -1, spec.weight[1], spec.taps)
    return grouped.permute(0, 2, 3, 1).contiguous()


def _weight_plan(spec: ConvSpec, blocks: Blocks) -> Plan:
    sizes = sizes_of(spec)
    rows, channels, taps = sizes["K"], sizes["C"], spec.taps
    last = channels >= _FEWEST_CHANNELS
    blocks = blocks if last else _scattered(blocks)
    width = channels if last else channels * taps
    positions = spec.batch * math.prod(spec.out)
    columns = min(blocks.columns, max(16, next_power_of_2(width)))
    if not last and blocks.summed == 16:
        columns = min(columns, 32)  # with the tap of every column to be kept, more spill
    column_blocks = taps * cdiv(channels, columns) if last else cdiv(width, columns)
    programs = cdiv(rows, blocks.rows) * column_blocks
    splits = _splits(spec, programs * spec.groups, cdiv(positions, blocks.summed))
    length = cdiv(cdiv(positions, splits), blocks.summed) * blocks.summed
    splits = cdiv(positions, length)
    # Written channel by channel; what is in that order already needs no second pass where there is one split.
    is_direct = splits == 1 and (taps == 1 or not last)
    gemm = Launch(
        "gemm", "grad_weight", (spec.dtype, spec.dtype, spec.dtype if is_direct else "float32"),
        {**sizes, "LENGTH": length},
        {
            "DEPTH": len(spec.kernel) == 3, "X_LAST": last, "G_LAST": last, "ONE_TAP": last, "FILTERS": blocks.rows,
            "COLUMNS": columns, "SUMMED": blocks.summed,
        },
        (programs, spec.groups, splits), spec.device, blocks.warps, blocks.stages, aligned=("C", "K", "W", "OW"),
    )  # fmt: skip
    to_last = ToLast(spec, Copy(spec.image), Copy(spec.grad, is_shared=True)) if last else None
    entries = math.prod(spec.weight)
    if last and taps > 1:
        side = min(64, next_power_of_2(channels))
        sum_up = Launch(
            "layout", "reduce_weight", ("float32", spec.dtype),
            {"ROWS": spec.weight[0], "TAPS": taps, "C": channels, "SPLITS": splits},
            {"CHANNELS": side, "COLUMNS": next_power_of_2(taps)},
            (cdiv(channels, side), spec.weight[0]), spec.device, aligned=("C",),
        )  # fmt: skip
    else:
        sum_up = reduction(spec, entries, splits)

    def run(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        result = image.new_empty(spec.weight)
        image, grad = to_last.both(image, grad) if to_last else (dense(image), dense(grad))
        if is_direct:
            gemm(image, grad, result)
            return result
        parts = image.new_empty(splits * entries, dtype=torch.float32)
        gemm(image, grad, parts)
        sum_up(parts, result)
        return result

    launches = (gemm, *(to_last.launches if to_last else ()), *(() if is_direct else (sum_up,)))
    copies = (math.prod(spec.image) + math.prod(spec.grad)) * spec.itemsize
    return Plan(launches, run, copies + (0 if is_direct else 4 * splits * entries))


def _plan(spec: ConvSpec, rows: int) -> Plan:
    blocks = _blocks(spec, rows)
    assert blocks is not None  # _rejects
    return _weight_plan(spec, blocks) if spec.direction == GRAD_WEIGHT else _map_plan(spec, blocks)


def _rows_of(spec: ConvSpec) -> int:
    return spec.weight[1] if spec.direction == GRAD_INPUT else spec.weight[0] // spec.groups


def _rejects(spec: ConvSpec, rows: int) -> str | None:
    if _blocks(spec, rows) is None:
        return f"no block of {rows} rows for this card and {spec.dtype}"
    is_last = spec.channels_last and spec.weight[1] < _FEWEST_CHANNELS
    if is_last and spec.direction == FORWARD and rows >= 64 and _blocks(spec, rows) in FMA:
        return "its addresses and sums are more than the registers of gfx10 hold"
    if rows >= 2 * max(ROWS[-1], _rows_of(spec)):
        return "half of a block would be padding"
    if spec.groups > MOST_BLOCKS or math.prod(spec.stride) * _MOST_SPLITS > MOST_BLOCKS or spec.batch > MOST_BLOCKS:
        return "more groups, samples or phases than a grid holds"
    if max(spec.weight[:2]) > MOST_BLOCKS or spec.taps > 512:
        return "more filters or taps than a grid holds"
    if spec.direction == GRAD_INPUT and any(
        step > 1 and spread > 1 for step, spread in zip(spec.stride, spec.dilation, strict=True)
    ):
        return "grad_input with stride and dilation in one dimension"
    return None


# Shares of the GEMM rate that were reached on an H200, by rows: half types; float32 has no matrix units.
_REACHED = {128: 0.55, 64: 0.45, 32: 0.25, 16: 0.12}
_REACHED_WEIGHT = {128: 0.5, 64: 0.22, 32: 0.15, 16: 0.08}
_REACHED_FLOAT32 = 0.35
# In sums through channels and taps every element has an address of its own, worth so many loads.
_SCATTERED, _SCATTERED_WEIGHT = 4, 8
# The share of a card that a few programs keep busy.
_LEAST_FILLED = 0.35
# More parts than these make it little faster.
_WORTH_CUTTING = 3


def _work(spec: ConvSpec, rows: int) -> Work:
    blocks = _blocks(spec, rows)
    assert blocks is not None  # rejects() comes first
    of_rows = _rows_of(spec)
    depth = spec.weight[0] // spec.groups if spec.direction == GRAD_INPUT else spec.weight[1]
    is_weight = spec.direction == GRAD_WEIGHT
    last = depth >= _FEWEST_CHANNELS
    columns = spec.weight[1] * spec.taps if is_weight else math.prod(spec.result) // spec.result[1]
    programs = cdiv(of_rows, rows) * cdiv(columns, blocks.columns) * spec.groups
    share = (_REACHED_WEIGHT if is_weight else _REACHED)[rows] if spec.itemsize == 2 else _REACHED_FLOAT32
    processors = rates(spec.device).processors
    # Where programs are few the sums are cut, and their parts added up in another pass.
    cuts = 1 if programs >= processors else max(1, round(2 * processors / programs))
    filled = min(1.0, max(programs * min(cuts, _WORTH_CUTTING) / processors, _LEAST_FILLED))
    padding = of_rows / (cdiv(of_rows, rows) * rows)
    if last:
        padding *= depth / (cdiv(depth, blocks.summed) * blocks.summed)
    copies = 0
    if last:
        copies = (2 + is_weight) * max(math.prod(spec.image), math.prod(spec.grad)) * spec.itemsize
        copies += 0 if is_weight else 3 * math.prod(spec.weight) * spec.itemsize
    # Sums for the weight go through float32 parts, twice.
    parts = 16 * math.prod(spec.weight) * max(1, round(processors / programs)) if is_weight else 0
    if not is_weight and cuts > 1:
        parts = 8 * cuts * math.prod(spec.result)
    launches = 3 + (4 if last else 0) + 2 * (is_weight or cuts > 1)
    loads = 0.0
    if not last:
        summed = _scattered(blocks).summed
        unrolled = cdiv(depth * spec.taps, summed) * summed * spec.batch * math.prod(spec.out) * spec.groups
        loads = unrolled * cdiv(of_rows, rows) * (_SCATTERED_WEIGHT if is_weight else _SCATTERED)
    moved = cost.operand_bytes(spec) + copies + parts
    return Work(cost.flops(spec), share * filled * padding, moved, launches, loads)


def _strategy(rows: int) -> Strategy:
    of_rows: dict[str, Any] = {"rows": rows}
    return Fused(
        f"implicit_gemm_{rows}", partial(_plan, **of_rows), partial(_rejects, **of_rows), partial(_work, **of_rows),
        uses_blas=False,
    ).strategy  # fmt: skip


IMPLICIT_GEMMS = tuple(map(_strategy, ROWS))

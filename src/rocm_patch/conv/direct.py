"""direct: every output is summed in registers from the image itself; for few channels a group (depthwise, stems).

No columns, no transforms, nothing beyond the operands in memory; as many loads as products by one filter or channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.fused import (
    MOST_BLOCKS,
    Fused,
    Plan,
    cdiv,
    copies_to_first,
    dense,
    next_power_of_2,
    only,
    reduction,
    sizes_of,
)
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.kernels.launch import Launch, multiprocessors, target_of

# Filters, or channels in grad_input, of a program; in grad_weight, where gradients are read for each of them, fewer.
_MOST_ROWS, _MOST_ROWS_WEIGHT = 16, 4
# From so many on a program takes many positions; in between it takes few, several rows high.
_MANY_ROWS = 8
# Rows of a position times filters: rows share what they read.
_HIGH = 16
# Sums of a program: more spill on gfx1010 (docs/KERNELS.md).
_MOST_SUMS, _MOST_SUMS_CUDA = 4096, 8192
# Programs of grad_weight for each multiprocessor; from the first number on a second pass costs more than it saves.
_FEWEST_PROGRAMS, _PROGRAMS = 16, 64
# What the kernels are compiled for; the sizes of maps are not among them.
_CONSTANTS = ("C", "KD", "KH", "KW", "SD", "SH", "SW", "LD", "LH", "LW")
# Products of a position in a program, which are written out one by one.
_MOST_UNROLLED = 150
# Where matrix products are far ahead.
_MOST_CHANNELS = 64


def _most_sums() -> int:
    return _MOST_SUMS_CUDA if target_of(0).backend == "cuda" else _MOST_SUMS


def _positions(most: int, of_map: int, batch: int, rows: int) -> tuple[int, int]:
    """Positions of a program, and of how many samples they are; rows: sums for each position."""
    positions = min(most, 1 << ((_most_sums() // rows).bit_length() - 1))
    samples = min(batch, max(1, positions // of_map))
    return min(positions, next_power_of_2(samples * of_map)), samples


def _taps_of(width: int) -> int:
    """How many taps of a row a program of grad_weight takes: up to four, in parts of about the same number."""
    return cdiv(width, cdiv(width, 4))


def _map_plan(spec: ConvSpec) -> Plan:
    """forward, and grad_input with stride 1: the same with the roles exchanged."""
    is_flipped = spec.direction == GRAD_INPUT
    sizes = _flipped(sizes_of(spec)) if is_flipped else sizes_of(spec)
    rows = _rows_of(spec)
    high = _high(sizes, rows)
    of_map = sizes["OD"] * cdiv(sizes["OH"], high) * sizes["OW"]
    is_many = rows >= _MANY_ROWS
    positions, samples = _positions(512 if is_many else 64, of_map, spec.batch, rows * high)
    # Nothing is said of the alignment: stores of four elements a thread would make loads of every fourth.
    kernel = Launch(
        "direct", "forward", (spec.dtype,) * 4, {**only(sizes, *_CONSTANTS), "SAMPLES": samples},
        {
            **_constants(spec, sizes), "FLIPPED": is_flipped, "HAS_BIAS": False, "FILTERS": rows, "HIGH": high,
            "SEVERAL": samples > 1, "POSITIONS": positions,
        },
        (cdiv(samples * of_map, positions), spec.groups * cdiv(sizes["K"], rows), cdiv(spec.batch, samples)),
        spec.device, warps=max(1, 4 * rows * high * positions // _most_sums()) if is_many else 1,
    )  # fmt: skip

    def run(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        first, second = dense(first), dense(second)
        result = first.new_empty(spec.result)
        kernel(first, second, second, result)
        return result

    return Plan((kernel,), run, copies_to_first(spec))


def _phase_plan(spec: ConvSpec) -> Plan:
    """grad_input with a stride."""
    sizes, rows, phases = sizes_of(spec), _rows_of(spec), math.prod(spec.stride)
    of_map = math.prod(map(cdiv, spec.spatial, spec.stride))
    positions, samples = _positions(512 if rows > 1 else 256, of_map, spec.batch, rows)
    kernel = Launch(
        "direct", "grad_input", (spec.dtype,) * 3, {**only(sizes, *_CONSTANTS), "SAMPLES": samples},
        {**_constants(spec, sizes), "CHANNELS": rows, "SEVERAL": samples > 1, "POSITIONS": positions},
        (cdiv(samples * of_map, positions), spec.groups * cdiv(sizes["C"], rows), cdiv(spec.batch, samples) * phases),
        spec.device, warps=max(1, positions // 128),
    )  # fmt: skip

    def run(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        grad, weight = dense(grad), dense(weight)
        result = grad.new_empty(spec.image)
        kernel(grad, weight, result)
        return result

    return Plan((kernel,), run, copies_to_first(spec))


def _constants(spec: ConvSpec, sizes: dict[str, int]) -> dict[str, int | bool]:
    return {**{name: sizes[name] for name in _CONSTANTS}, "DEPTH": len(spec.kernel) == 3}


def _flipped(sizes: dict[str, int]) -> dict[str, int]:
    """The convolution of grad with the kernel turned round, which with stride 1 is grad_input."""
    swapped = {"C": "K", "K": "C", "D": "OD", "H": "OH", "W": "OW", "OD": "D", "OH": "H", "OW": "W"}
    found = {name: sizes[swapped.get(name, name)] for name in sizes}
    return found | {f"P{n}": sizes[f"L{n}"] * (sizes[f"K{n}"] - 1) - sizes[f"P{n}"] for n in "DHW"}


def _high(sizes: dict[str, int], rows: int) -> int:
    """Rows of a position: those of a thread share what they read."""
    if sizes["LH"] > 1 or sizes["SH"] > sizes["KH"]:
        return 1
    return max(1, min(_HIGH // rows, 4, 1 << (sizes["OH"].bit_length() - 1)))


def _weight_plan(spec: ConvSpec) -> Plan:
    sizes = sizes_of(spec)
    rows, taps, of_map = _rows_of(spec), _taps_of(sizes["KW"]), math.prod(spec.out)
    positions, samples = _positions(128, of_map, spec.batch, rows * taps)
    tap_rows, filter_blocks = spec.taps // sizes["KW"] * cdiv(sizes["KW"], taps), spec.groups * cdiv(sizes["K"], rows)
    # Blocks of positions are shared out before samples are: the later ones of a program cost less than the first.
    programs, full = sizes["C"] * tap_rows * filter_blocks, multiprocessors(spec.device)
    wanted = 1 if programs >= _FEWEST_PROGRAMS * full else cdiv(_PROGRAMS * full, programs)
    blocks, all_times = cdiv(samples * of_map, positions), cdiv(spec.batch, samples)
    steps = cdiv(blocks, min(wanted, blocks))
    times = cdiv(all_times, min(max(1, wanted // blocks), all_times))
    splits = cdiv(blocks, steps) * cdiv(all_times, times)
    constants = _constants(spec, sizes)
    del constants["C"]
    kernel = Launch(
        "direct", "grad_weight", (spec.dtype, spec.dtype, "float32" if splits > 1 else spec.dtype),
        {**only(sizes, *constants), "SAMPLES": samples, "TIMES": times, "STEPS": steps},
        {
            **constants, "FILTERS": rows, "TAPS": taps, "SEVERAL": samples > 1,
            "POSITIONS": positions,
        },
        (sizes["C"] * tap_rows, filter_blocks, splits), spec.device,
        warps=max(1, positions // (32 if rows == 1 else 64)),
    )  # fmt: skip
    entries = math.prod(spec.weight)
    sum_up = reduction(spec, entries, splits)

    def run(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        image, grad = dense(image), dense(grad)
        result = image.new_empty(spec.weight)
        if splits == 1:
            kernel(image, grad, result)
            return result
        parts = image.new_empty(splits * entries, dtype=torch.float32)
        kernel(image, grad, parts)
        sum_up(parts, result)
        return result

    launches: tuple[Any, ...] = (kernel, sum_up) if splits > 1 else (kernel,)
    return Plan(launches, run, copies_to_first(spec) + 4 * splits * entries)


def _plan(spec: ConvSpec) -> Plan:
    if spec.direction == GRAD_WEIGHT:
        return _weight_plan(spec)
    return _map_plan(spec) if spec.direction == FORWARD or math.prod(spec.stride) == 1 else _phase_plan(spec)


def _rejects(spec: ConvSpec) -> str | None:
    if max(spec.weight[1], spec.weight[0] // spec.groups) > _MOST_CHANNELS:
        return f"more than {_MOST_CHANNELS} channels or filters a group"
    if _unrolled(spec) > _MOST_UNROLLED:
        return "more taps and filters than registers hold"
    if any(step > 1 and spread > 1 for step, spread in zip(spec.stride, spec.dilation, strict=True)):
        return "stride and dilation in one dimension"
    if max(spec.weight[0], spec.image[1], spec.batch * math.prod(spec.stride)) > MOST_BLOCKS:
        return "more filters or samples than a grid holds"
    return None


def _unrolled(spec: ConvSpec) -> int:
    taps = {FORWARD: spec.taps, GRAD_INPUT: math.prod(map(cdiv, spec.kernel, spec.stride))}
    return taps.get(spec.direction, 1) * _rows_of(spec)


def _rows_of(spec: ConvSpec) -> int:
    """Filters, or channels in grad_input, that a program computes."""
    rows = spec.weight[1] if spec.direction == GRAD_INPUT else spec.weight[0] // spec.groups
    return min(_MOST_ROWS_WEIGHT if spec.direction == GRAD_WEIGHT else _MOST_ROWS, next_power_of_2(rows))


def _work(spec: ConvSpec) -> Work:
    """Loads for each product, as timed on an H200: phases and grad_weight read every element anew."""
    products, a_product = cost.flops(spec) / 2, 0.2
    if spec.direction == GRAD_WEIGHT:
        a_product = 0.6
    elif spec.direction == GRAD_INPUT and math.prod(spec.stride) > 1:
        a_product = 0.1 + 1.0 / _rows_of(spec)
    return Work(bytes=cost.operand_bytes(spec), loads=a_product * products, launches=3)


DIRECT = Fused("direct", _plan, _rejects, _work, uses_blas=False).strategy

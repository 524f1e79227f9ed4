"""taps: one GEMM per kernel position, added up over the padded image; no columns are ever made.

A tap reads the padded image at an offset. In the memory of one padded plane that is a shift, so the products of a
tap are a matrix product with a shifted view: nothing is copied, and what runs over the right border lands in columns
of the result that are cut off at the end. With a stride the padded image is first split into its phases (positions
of one remainder by the stride), each of which is read with a stride of 1. So is a dilation: its shifts are longer.

The idea is that of the "kn2row" methods: A. Vasudevan, A. Anderson, D. Gregg, "Parallel Multi Channel Convolution
using General Matrix Multiplication" (arXiv:1704.04428), here with the shift in the GEMM's operand and not in a sum
after it.

Letters in the shape comments: n samples, C channels, K filters, R kernel taps, P phases, M positions of a phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy, empty_result, sum_dtype
from rocm_patch.conv.windows import (
    Box,
    at,
    boxes,
    largest_box,
    longest_sum,
    on_output,
    padded_part,
    sizes,
    taps,
    window_extent,
)


class _Grid(NamedTuple):
    """How one phase of a padded image lies in memory, and where the taps read."""

    size: tuple[int, ...]  # of one phase
    length: int  # from the first to the last output position, counted in positions of a phase
    phases: tuple[tuple[int, ...], ...]  # remainders by the stride that a tap has
    taps: tuple[tuple[int, int], ...]  # phase and shift, in the order of the weight

    @property
    def positions(self) -> int:
        """M."""
        return math.prod(self.size)


@lru_cache(maxsize=4096)
def _grid(spec: ConvSpec, out: tuple[int, ...]) -> _Grid:
    reach = [(k - 1) * d // s for k, d, s in zip(spec.kernel, spec.dilation, spec.stride, strict=True)]
    size = tuple(o + r for o, r in zip(out, reach, strict=True))
    pitch = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    length = sum((o - 1) * step for o, step in zip(out, pitch, strict=True)) + 1
    phases: dict[tuple[int, ...], int] = {}
    found = []
    for tap in taps(spec):
        offset = [r * d for r, d in zip(tap, spec.dilation, strict=True)]
        phase = tuple(o % s for o, s in zip(offset, spec.stride, strict=True))
        shift = sum(o // s * step for o, s, step in zip(offset, spec.stride, pitch, strict=True))
        found.append((phases.setdefault(phase, len(phases)), shift))
    return _Grid(size, length, tuple(phases), tuple(found))


def _position_elements(spec: ConvSpec) -> int:
    """Workspace of one output position: its share of the padded image, of its phases and of the sums."""
    kept = 2 if spec.itemsize == 2 else 1
    split = math.prod(min(s, k) for s, k in zip(spec.stride, spec.kernel, strict=True))
    return spec.image[1] * (split + math.prod(spec.stride)) + (1 + kept) * spec.weight[0]


def _boxes_of(spec: ConvSpec, budget: int) -> Iterator[Box]:
    return boxes((spec.batch, *spec.out), _position_elements(spec), budget, spec.itemsize, longest_sum(spec))


def _split(spec: ConvSpec, grid: _Grid, image: torch.Tensor, box: Box) -> torch.Tensor:
    """The phases of what a box reads of the padded image: (P, n, C, M)."""
    part = padded_part(spec, image, box)
    if math.prod(spec.stride) == 1:
        return part.reshape(1, *part.shape[:2], grid.positions)
    planes = part.new_zeros((len(grid.phases), *part.shape[:2], *grid.size))
    for index, phase in enumerate(grid.phases):
        positions = tuple(slice(f, None, s) for f, s in zip(phase, spec.stride, strict=True))
        found = at(at(part, *positions), *map(slice, grid.size))
        at(planes[index], *map(slice, found.shape[2:])).copy_(found)
    return planes.flatten(3)


def _on_grid(spec: ConvSpec, grid: _Grid, out: tuple[int, ...], grad: torch.Tensor) -> torch.Tensor:
    """grad of a box with zeros between its rows, so that a row is as long as one of the phases: (n, K, length)."""
    if out[1:] == grid.size[1:]:
        return grad.reshape(*grad.shape[:2], -1)
    laid = grad.new_zeros((*grad.shape[:2], out[0], *grid.size[1:]))
    at(laid, *map(slice, out)).copy_(grad)
    return laid.flatten(2)[..., : grid.length]


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, is_first: bool = False) -> None:
    """total (n, ., .) += first (n, ., .) @ second (n, ., .); a first product replaces what total holds."""
    if total.dtype == first.dtype and is_first:
        torch.bmm(first, second, out=total)
    elif total.dtype == first.dtype:
        total.baddbmm_(first, second)
    elif is_first:
        total.copy_(torch.bmm(first, second))
    else:
        total.add_(torch.bmm(first, second))


def _matrices(weight: torch.Tensor) -> torch.Tensor:
    """(R, K, C), each tap's matrix in one piece."""
    return weight.flatten(2).permute(2, 0, 1).contiguous()


def _forward(spec: ConvSpec, image: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    result = empty_result(spec, image)
    matrices = _matrices(weight)

    def fill(box: Box) -> None:
        samples, *out = sizes(box)
        grid = _grid(spec, tuple(out))
        planes = _split(spec, grid, image, box)
        rows = out[0] * math.prod(grid.size[1:])
        total = image.new_empty((samples, spec.weight[0], rows), dtype=sum_dtype(image))
        reached = total[..., : grid.length]
        for index, (phase, shift) in enumerate(grid.taps):
            part = planes[phase, :, :, shift : shift + grid.length]
            _add_product(reached, matrices[index].expand(samples, -1, -1), part, is_first=index == 0)
        whole = total.view(samples, spec.weight[0], out[0], *grid.size[1:])
        result[on_output(box)] = at(whole, *map(slice, out))

    for box in _boxes_of(spec, budget):
        fill(box)
    return result


def _grad_input(spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    result = empty_result(spec, grad, sum_dtype(grad)).zero_()
    matrices = _matrices(weight).transpose(1, 2)  # (R, C, K)

    def add(box: Box) -> None:
        samples, *out = sizes(box)
        grid = _grid(spec, tuple(out))
        laid = _on_grid(spec, grid, tuple(out), grad[on_output(box)])
        planes = result.new_zeros((len(grid.phases), samples, spec.image[1], grid.positions))
        for index, (phase, shift) in enumerate(grid.taps):
            reached = planes[phase, :, :, shift : shift + grid.length]
            _add_product(reached, matrices[index].expand(samples, -1, -1), laid)
        for index, remainders in enumerate(grid.phases):
            reads, writes = _inside(spec, grid, box, remainders)
            at(result[box[0]], *writes).add_(at(planes[index].view(samples, -1, *grid.size), *reads))

    for box in _boxes_of(spec, budget):
        add(box)
    return result.to(grad.dtype)


def _inside(
    spec: ConvSpec, grid: _Grid, box: Box, phase: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The positions of a phase that lie in the image and not in its padding, in the phase and in the image."""
    reads, writes = [], []
    dims = zip(phase, grid.size, box[1:], spec.spatial, spec.stride, spec.padding, strict=True)
    for remainder, length, rows, size, s, p in dims:
        origin = rows.start * s + remainder - p
        start = max(0, -(origin // s))
        stop = max(start, min(length, (size - 1 - origin) // s + 1))
        reads.append(slice(start, stop))
        writes.append(slice(start * s + origin, max(0, (stop - 1) * s + origin + 1) if stop > start else 0, s))
    return tuple(reads), tuple(writes)


def _grad_weight(spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int) -> torch.Tensor:
    total = image.new_zeros((spec.taps, *spec.weight[:2]), dtype=sum_dtype(image))

    def add(box: Box) -> None:
        out = sizes(box)[1:]
        grid = _grid(spec, out)
        planes = _split(spec, grid, image, box)
        laid = _on_grid(spec, grid, out, grad[on_output(box)])
        for index, (phase, shift) in enumerate(grid.taps):
            part = planes[phase, :, :, shift : shift + grid.length]
            total[index].add_(torch.bmm(laid, part.transpose(1, 2)).sum(0, dtype=total.dtype))

    for box in _boxes_of(spec, budget):
        add(box)
    return total.permute(1, 2, 0).reshape(spec.weight).to(image.dtype)


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    if spec.direction == FORWARD:
        return _forward(spec, first, second, budget)
    if spec.direction == GRAD_INPUT:
        return _grad_input(spec, first, second, budget)
    return _grad_weight(spec, first, second, budget)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    return None


def _work(spec: ConvSpec) -> Work:
    # A product for each tap, and its sum in a pass over memory.
    moved = spec.taps * (math.prod(spec.image) / math.prod(spec.stride) + 3 * math.prod(spec.grad))
    sides = (spec.weight[0], spec.image[1] if spec.direction == GRAD_WEIGHT else math.prod(spec.out))
    share = cost.filled(spec, *sides, spec.batch)
    return Work(cost.flops(spec) * spec.groups, share, 2 * moved * max(4, spec.itemsize), 16 + 8 * spec.taps)


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    samples, *out = largest_box(
        (spec.batch, *spec.out), _position_elements(spec), budget, spec.itemsize, longest_sum(spec)
    )
    grid = _grid(spec, tuple(out))
    kept = 2 if spec.itemsize == 2 else 1
    padded = spec.image[1] * math.prod(window_extent(spec, out))
    split = spec.image[1] * len(grid.phases) * grid.positions
    laid = spec.weight[0] * out[0] * math.prod(grid.size[1:])
    weight = math.prod(spec.weight)
    if spec.direction == FORWARD:
        elements = samples * (padded + split + laid * (kept + (kept > 1))) + weight
    elif spec.direction == GRAD_INPUT:
        products = samples * spec.image[1] * grid.length if kept > 1 else 0
        elements = samples * (kept * split + laid) + products + weight
        elements += kept * math.prod(spec.image) if kept > 1 else 0
    else:
        elements = samples * (padded + split + laid + math.prod(spec.weight[:2])) + (2 * kept + 1) * weight
    return elements * spec.itemsize


TAPS = Strategy("taps", _run, _workspace_bytes, GEMM_RTOL, _rejects, _work)

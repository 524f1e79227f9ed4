"""im2col: the image unrolled into columns by one strided view, then one GEMM per piece.

K. Chellapilla, S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document Processing"
(2006). Serves every spec: any number of dimensions, stride, padding and dilation; groups one after the other.
Columns are made for as many samples at a time as the budget holds, and for a part of the output positions where one
sample exceeds it.

grad_input has two forms: convolutions of grad with the flipped filters (conv/phases.py), or, where these would take
far more columns (few channels, many filters: stems), columns of the image that are added in their places (col2im).

Letters in the shape comments: n samples, C channels, K filters, R kernel taps, L output positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.phases import grad_input, phases
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy, channels_to_rows, empty_result, is_small_map, sum_dtype
from rocm_patch.conv.windows import (
    Box,
    at,
    boxes,
    is_whole,
    largest_box,
    longest_sum,
    meeting,
    on_output,
    sizes,
    taps,
    window_extent,
    windows,
)


def position_elements(spec: ConvSpec) -> int:
    """Workspace of one output position: its column, its share of the padded image, its product."""
    return spec.image[1] * (spec.taps + math.prod(spec.stride)) + spec.weight[0]


def boxes_of(spec: ConvSpec, budget: int) -> Iterator[Box]:
    """Pieces whose columns fit the budget."""
    return boxes((spec.batch, *spec.out), position_elements(spec), budget, spec.itemsize, longest_sum(spec))


def _forward(
    spec: ConvSpec, image: torch.Tensor, weight: torch.Tensor, budget: int, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The result (N, K, *out), written into a tensor where one is given."""
    product_of = _planes
    if spec.channels_last:
        product_of = _rows
    elif is_small_map(spec):
        product_of = _one_gemm
    return by_boxes(spec, image, budget, lambda view: product_of(spec, view, weight), into)


def by_boxes(
    spec: ConvSpec,
    image: torch.Tensor,
    budget: int,
    product_of: Callable[[torch.Tensor], torch.Tensor],
    into: torch.Tensor | None,
) -> torch.Tensor:
    """The result (N, K, *out) of a function that computes it from windows (n, C, *kernel, *out), piece by piece."""
    for box in boxes_of(spec, budget):
        if into is None and is_whole(box, (spec.batch, *spec.out)):
            return product_of(windows(spec, image, box))
        if into is None:
            into = empty_result(spec, image)
        into[on_output(box)] = product_of(windows(spec, image, box))
    assert into is not None  # a spec has at least one output position
    return into


def _planes(spec: ConvSpec, view: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A GEMM per sample, written as (n, K, L): contiguous, no transpose afterwards."""
    samples, out = view.shape[0], view.shape[-len(spec.out) :]
    columns = view.reshape(samples, -1, math.prod(out))  # (n, C R, L)
    filters = weight.reshape(1, spec.weight[0], -1).expand(samples, -1, -1)  # (n, K, C R)
    return torch.bmm(filters, columns).view(samples, spec.weight[0], *out)


def _one_gemm(spec: ConvSpec, view: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One GEMM for all samples, written as (K, n L)."""
    dims = len(spec.out)
    samples, out = view.shape[0], view.shape[-dims:]
    columns = view.movedim(0, 1 + dims).reshape(spec.image[1] * spec.taps, -1)  # (C R, n L)
    product = weight.reshape(spec.weight[0], -1) @ columns
    del columns
    return product.view(spec.weight[0], samples, *out).movedim(1, 0).contiguous()


def _rows(spec: ConvSpec, view: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One GEMM written as (n L, K), which is channels_last; reads a channels_last image in long runs."""
    samples, out = view.shape[0], view.shape[-len(spec.out) :]
    filters = weight.movedim(1, -1).reshape(spec.weight[0], -1)  # (K, R C)
    return (_window_rows(spec, view) @ filters.t()).view(samples, *out, spec.weight[0]).movedim(-1, 1)


def _window_rows(spec: ConvSpec, view: torch.Tensor) -> torch.Tensor:
    """Windows as a matrix (n L, R C)."""
    dims = len(spec.out)
    order = (0, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims), 1)  # n, *out, *kernel, C
    return view.permute(order).reshape(-1, spec.taps * spec.image[1])


def _grad_weight(spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int) -> torch.Tensor:
    total: torch.Tensor | None = None
    for box in boxes_of(spec, budget):
        piece = _piece_of_grad_weight(spec, windows(spec, image, box), grad[on_output(box)])
        if is_whole(box, (spec.batch, *spec.out)):
            return piece
        # Sums across boxes are kept in float32, as the GEMM keeps them within one.
        total = piece.to(sum_dtype(piece)) if total is None else total.add_(piece)
    assert total is not None  # a spec has at least one output position
    return total.to(image.dtype)


def _piece_of_grad_weight(spec: ConvSpec, view: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    dims = len(spec.out)
    if spec.channels_last:
        piece = channels_to_rows(grad).t() @ _window_rows(spec, view)  # (K, R C)
        return piece.view(spec.weight[0], *spec.kernel, spec.weight[1]).movedim(-1, 1)
    order = (1, *range(2, 2 + dims), 0, *range(2 + dims, 2 + 2 * dims))  # C, *kernel, n, *out
    columns = view.permute(order).reshape(spec.weight[1] * spec.taps, -1)  # (C R, n L)
    rows = grad.movedim(0, 1).reshape(spec.weight[0], -1)  # (K, n L)
    return (rows @ columns.t()).view(spec.weight)


def _gathers(spec: ConvSpec) -> bool:
    """Whether grad_input is computed as convolutions of grad, rather than added up from columns."""
    return spec.weight[0] <= 2 * spec.image[1]


def _scattered(spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    """Columns (n, C R, L) added in the places that they were read from (col2im).

    Windows overlap, so for half types the sums are kept in float32.
    """
    result = empty_result(spec, grad, sum_dtype(grad)).zero_()
    flat = weight.reshape(1, spec.weight[0], -1).transpose(1, 2)  # (1, C R, K)

    def add(box: Box) -> None:
        samples, *out = sizes(box)
        rows = grad[on_output(box)].reshape(samples, spec.weight[0], -1)  # (n, K, L)
        columns = torch.bmm(flat.expand(samples, -1, -1), rows).view(samples, spec.image[1], spec.taps, *out)
        for index, tap in enumerate(taps(spec)):
            met = meeting(spec, tap, box)
            if met is not None:
                reads, writes = met
                at(result[box[0]], *reads).add_(at(columns[:, :, index], *writes))

    for box in boxes_of(spec, budget):
        add(box)
    return result.to(grad.dtype)


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    if spec.groups > 1:
        return _group_by_group(spec, first, second, budget)
    if spec.direction == FORWARD:
        return _forward(spec, first, second, budget)
    if spec.direction == GRAD_WEIGHT:
        return _grad_weight(spec, first, second, budget)
    if _gathers(spec):
        return grad_input(_forward, spec, first, second, budget)
    return _scattered(spec, first, second, budget)


def _of_one_group(spec: ConvSpec) -> ConvSpec:
    return dataclasses.replace(
        spec, image=(spec.batch, spec.weight[1], *spec.spatial), groups=1,
        weight=(spec.weight[0] // spec.groups, *spec.weight[1:]),
    )  # fmt: skip


def _group_by_group(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    part = _of_one_group(spec)
    of_second, of_result = (1, 0) if spec.direction == GRAD_WEIGHT else (0, 1)
    result = empty_result(spec, first)

    def group(tensor: torch.Tensor, dim: int, index: int) -> torch.Tensor:
        size = tensor.shape[dim] // spec.groups
        return tensor.narrow(dim, index * size, size)

    for index in range(spec.groups):
        operands = group(first, 1, index), group(second, of_second, index)
        group(result, of_result, index).copy_(_run(part, *operands, budget))
    return result


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    if spec.groups > 1:
        part = _of_one_group(spec)
        return _workspace_bytes(part, budget) + math.prod(part.result) * spec.itemsize
    weight = math.prod(spec.weight) * spec.itemsize
    if spec.direction == GRAD_INPUT and _gathers(spec):
        return weight + max((_bytes_of_box(phase.spec, budget) for phase in phases(spec)), default=0)
    sums = 0
    if spec.direction == GRAD_INPUT and spec.itemsize == 2:
        sums = 2 * math.prod(spec.image) * spec.itemsize
    return sums + _bytes_of_box(spec, budget) + (4 if spec.direction == GRAD_WEIGHT else 1) * weight


def _bytes_of_box(spec: ConvSpec, budget: int) -> int:
    """Columns, padded image and product of the largest box, and the weight in the layout of the GEMM."""
    samples, *out = largest_box(
        (spec.batch, *spec.out), position_elements(spec), budget, spec.itemsize, longest_sum(spec)
    )
    positions = math.prod(out)
    padded = spec.image[1] * math.prod(window_extent(spec, out))
    columns = spec.image[1] * spec.taps * positions
    weight = math.prod(spec.weight)
    return (samples * (columns + padded + spec.weight[0] * positions) + weight) * spec.itemsize


def _work(spec: ConvSpec) -> Work:
    rows, length = spec.weight[1] * spec.taps, math.prod(spec.out)
    # Of one group; they come one after the other.
    sides = (spec.weight[0] // spec.groups, rows if spec.direction == GRAD_WEIGHT else length)
    share = cost.filled(spec, *sides, 1 if is_small_map(spec) else spec.batch)
    phases_of = math.prod(spec.stride) if spec.direction == GRAD_INPUT else 1
    # Added in place, tap by tap, where grad_input has a stride; elements of half types are copied one by one.
    passes = 24 if phases_of > 1 else 8 * spec.stride[-1] if spec.itemsize == 2 else 4
    if spec.taps == 1:
        passes = 2
    moved = cost.operand_bytes(spec) + passes * cost.column_bytes(spec)
    return Work(cost.flops(spec), share, moved, (18 + 10 * (phases_of - 1)) * spec.groups)


IM2COL = Strategy("im2col", _run, _workspace_bytes, GEMM_RTOL, work=_work)

"""im2col: the image unrolled into columns by one strided view, then one GEMM per chunk.

K. Chellapilla, S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document Processing"
(2006). Serves every spec: any number of dimensions, stride, padding, dilation and groups. Columns are made for
as many samples at a time as the budget holds, and for a band of output rows where one sample alone exceeds it.

Letters in the shape comments: N samples, G groups, C channels and K filters of one group, R kernel taps,
L output positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from rocm_patch.conv.pointwise import channels_to_rows
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy

# aten's col2im takes as much memory again as the columns that it is given (seen on torch 2.11, CUDA; see
# benchmarks/results/gpu_acceptance_h200.json, check_workspace).
_COL2IM_COPIES = 2

_Chunk = tuple[slice, slice]  # samples, output rows (first spatial dimension)


def _column_bytes(spec: ConvSpec) -> int:
    """Bytes of the columns of one sample and one output row."""
    return spec.image[1] * spec.taps * math.prod(spec.out[1:]) * spec.itemsize


def _chunks(spec: ConvSpec, budget: int) -> Iterator[_Chunk]:
    """Pieces whose columns fit the budget; at least one sample's one output row each."""
    row = max(1, _column_bytes(spec))
    rows = spec.out[0]
    samples = max(1, budget // (row * rows))
    band = rows if row * rows <= budget else max(1, budget // row)
    for first in range(0, spec.batch, samples):
        for top in range(0, rows, band):
            yield slice(first, min(first + samples, spec.batch)), slice(top, min(top + band, rows))


def _is_whole(spec: ConvSpec, chunk: _Chunk) -> bool:
    return chunk[0] == slice(0, spec.batch) and chunk[1] == slice(0, spec.out[0])


def _padded(spec: ConvSpec, image: torch.Tensor) -> torch.Tensor:
    if not any(spec.padding):
        return image
    both_sides = [amount for amount in reversed(spec.padding) for _ in range(2)]
    return F.pad(image, both_sides)


def _windows(spec: ConvSpec, padded: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
    """A view of the padded image as (n, C_all, *kernel, *out) for one chunk; copies nothing."""
    samples, rows = chunk
    steps = padded.stride()
    height = rows.stop - rows.start
    size = (samples.stop - samples.start, padded.shape[1], *spec.kernel, height, *spec.out[1:])
    stride = (
        steps[0],
        steps[1],
        *(step * d for step, d in zip(steps[2:], spec.dilation, strict=True)),
        *(step * s for step, s in zip(steps[2:], spec.stride, strict=True)),
    )
    offset = padded.storage_offset() + samples.start * steps[0] + rows.start * spec.stride[0] * steps[2]
    return padded.as_strided(size, stride, offset)


def _forward(spec: ConvSpec, image: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    piece_of = _forward_rows if spec.channels_last and spec.groups == 1 else _forward_planes
    padded = _padded(spec, image)
    result: torch.Tensor | None = None
    for chunk in _chunks(spec, budget):
        piece = piece_of(spec, _windows(spec, padded, chunk), weight)
        if _is_whole(spec, chunk):
            return piece
        if result is None:
            result = _empty_result(spec, image)
        result[chunk[0], :, chunk[1]] = piece
    assert result is not None  # a spec has at least one sample and one output row
    return result


def _forward_planes(spec: ConvSpec, windows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product written as (n, K, L): contiguous, no transpose afterwards."""
    samples, out, groups = windows.shape[0], windows.shape[-len(spec.out) :], spec.groups
    if groups == 1:
        columns = windows.reshape(samples, -1, math.prod(out))  # (n, C R, L)
        filters = weight.reshape(1, spec.weight[0], -1).expand(samples, -1, -1)  # (n, K, C R)
        return torch.bmm(filters, columns).view(samples, spec.weight[0], *out)
    columns = windows.reshape(samples, groups, -1, math.prod(out))  # (n, G, C R, L)
    filters = weight.reshape(groups, spec.weight[0] // groups, -1)  # (G, K, C R)
    return torch.matmul(filters, columns).reshape(samples, spec.weight[0], *out)


def _forward_rows(spec: ConvSpec, windows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product written as (n L, K), which is channels_last; reads a channels_last image in long runs."""
    dims = len(spec.out)
    samples, out = windows.shape[0], windows.shape[-dims:]
    order = (0, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims), 1)  # n, *out, *kernel, C
    rows = windows.permute(order).reshape(samples * math.prod(out), -1)  # (n L, R C)
    filters = weight.movedim(1, -1).reshape(spec.weight[0], -1)  # (K, R C)
    return (rows @ filters.t()).view(samples, *out, spec.weight[0]).movedim(-1, 1)


def _grad_weight(spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int) -> torch.Tensor:
    dims, groups = len(spec.out), spec.groups
    padded = _padded(spec, image)
    total: torch.Tensor | None = None
    for chunk in _chunks(spec, budget):
        windows = _windows(spec, padded, chunk)
        piece_of_grad = grad[chunk[0], :, chunk[1]]
        if groups == 1 and spec.channels_last:
            order = (0, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims), 1)
            rows = windows.permute(order).reshape(-1, spec.taps * spec.weight[1])  # (n L, R C)
            piece = (channels_to_rows(piece_of_grad).t() @ rows).view(spec.weight[0], *spec.kernel, spec.weight[1])
            piece = piece.movedim(-1, 1)
        else:
            order = (1, *range(2, 2 + dims), 0, *range(2 + dims, 2 + 2 * dims))  # C, *kernel, n, *out
            columns = windows.permute(order).reshape(groups, spec.weight[1] * spec.taps, -1)  # (G, C R, n L)
            rows = piece_of_grad.movedim(0, 1).reshape(groups, spec.weight[0] // groups, -1)  # (G, K, n L)
            piece = torch.bmm(rows, columns.transpose(1, 2)).view(spec.weight)
        if _is_whole(spec, chunk):
            return piece
        # Sums across chunks are kept in float32, as the GEMM keeps them within a chunk.
        piece = piece.to(_sum_dtype(piece))
        total = piece if total is None else total.add_(piece)
    assert total is not None  # a spec has at least one sample and one output row
    return total.to(image.dtype)


def _grad_input(spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    if len(spec.kernel) == 3:
        return _grad_volume(spec, grad, weight, budget)
    result: torch.Tensor | None = None
    banded: torch.Tensor | None = None
    for chunk in _chunks(spec, budget // _COL2IM_COPIES):
        samples, rows = chunk
        columns = _columns_of_grad(spec, grad[samples, :, rows], weight)
        if rows == slice(0, spec.out[0]):
            piece = _fold(spec, columns, spec.spatial, spec.padding)
            if _is_whole(spec, chunk):
                return piece
            if result is None:
                result = _empty_result(spec, grad)
            result[samples] = piece
            continue
        # One sample exceeds the budget: its bands are folded into the padded image. They overlap, so the sums
        # between them are kept in float32 for half types.
        if banded is None:
            padded = [size + 2 * p for size, p in zip(spec.spatial, spec.padding, strict=True)]
            banded = torch.zeros((*spec.image[:2], *padded), dtype=_sum_dtype(grad), device=grad.device)
        height = (rows.stop - rows.start - 1) * spec.stride[0] + spec.dilation[0] * (spec.kernel[0] - 1) + 1
        top = rows.start * spec.stride[0]
        no_padding = (0,) * len(spec.padding)
        banded[samples, :, top : top + height] += _fold(spec, columns, (height, *banded.shape[3:]), no_padding)
    if banded is not None:
        for dim, (size, p) in enumerate(zip(spec.spatial, spec.padding, strict=True), start=2):
            banded = banded.narrow(dim, p, size)
        return banded.to(grad.dtype)
    assert result is not None  # a spec has at least one sample and one output row
    return result


def _columns_of_grad(spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of the columns: (n, G C R, L)."""
    samples, groups, filters = grad.shape[0], spec.groups, spec.weight[0] // spec.groups
    flat = weight.reshape(groups, filters, -1).transpose(1, 2)  # (G, C R, K)
    if groups == 1:
        return torch.bmm(flat.expand(samples, -1, -1), grad.reshape(samples, filters, -1))
    rows = grad.reshape(samples, groups, filters, -1)  # (n, G, K, L)
    return torch.matmul(flat, rows).reshape(samples, spec.image[1] * spec.taps, -1)


def _fold(spec: ConvSpec, columns: torch.Tensor, spatial: tuple[int, ...], padding: tuple[int, ...]) -> torch.Tensor:
    """Columns (n, G C R, L) summed where their windows overlap: (n, G C, *spatial), by aten's own col2im."""
    size, geometry = spatial, [spec.kernel, spec.dilation, padding, spec.stride]
    if len(spatial) == 1:  # as an image of height 1
        size, geometry = (1, *spatial), [(fill, *g) for fill, g in zip((1, 1, 0, 1), geometry, strict=True)]
    image = torch.ops.aten.col2im(columns, list(size), *map(list, geometry))
    return image.view(columns.shape[0], spec.image[1], *spatial)  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def _plane(spec: ConvSpec) -> ConvSpec:
    """The 2-d convolution of every output plane of a volume with one depth of its kernel."""
    return dataclasses.replace(
        spec,
        image=(spec.batch * spec.out[0], spec.image[1], *spec.spatial[1:]),
        weight=(*spec.weight[:2], *spec.kernel[1:]),
        stride=spec.stride[1:],
        padding=spec.padding[1:],
        dilation=spec.dilation[1:],
        out=spec.out[1:],
        channels_last=False,
    )


def _grad_volume(spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    """grad_input in 3-d: all output planes folded in 2-d once per kernel depth, and added in their places.

    torch has no 3-d col2im. The sums between kernel depths are kept in float32 for half types.
    """
    plane = _plane(spec)
    planes = grad.movedim(2, 1).reshape(plane.grad)  # (N OD, K, OH, OW)
    depth = spec.spatial[0] + 2 * spec.padding[0]
    shape = (spec.batch, depth, spec.image[1], *spec.spatial[1:])
    total = torch.zeros(shape, dtype=_sum_dtype(grad), device=grad.device)
    for level in range(spec.kernel[0]):
        folded = _grad_input(plane, planes, weight[:, :, level], budget)
        bottom = level * spec.dilation[0]
        top = bottom + (spec.out[0] - 1) * spec.stride[0] + 1
        total[:, bottom : top : spec.stride[0]] += folded.view(spec.batch, spec.out[0], *shape[2:])
    return total.narrow(1, spec.padding[0], spec.spatial[0]).movedim(1, 2).to(grad.dtype)


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.element_size() == 2 else tensor.dtype


def _empty_result(spec: ConvSpec, like: torch.Tensor) -> torch.Tensor:
    memory_format = torch.contiguous_format
    if spec.channels_last:
        memory_format = torch.channels_last if len(spec.kernel) == 2 else torch.channels_last_3d
    return torch.empty(spec.result, dtype=like.dtype, device=like.device, memory_format=memory_format)


_RUNS = {FORWARD: _forward, GRAD_INPUT: _grad_input, GRAD_WEIGHT: _grad_weight}


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    return _RUNS[spec.direction](spec, first, second, budget)


def _rejects(spec: ConvSpec) -> str | None:
    return None


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    copies = _COL2IM_COPIES if spec.direction == GRAD_INPUT else 1
    sample = _column_bytes(spec) * spec.out[0]
    columns = copies * min(max(budget // copies, _column_bytes(spec)), sample * spec.batch)
    padded = spec.batch * spec.image[1] * spec.itemsize
    padded *= math.prod(size + 2 * p for size, p in zip(spec.spatial, spec.padding, strict=True))
    # A chunk's product is written aside when the call is cut into chunks; operands may be copied for the GEMM.
    grad = math.prod(spec.grad) * spec.itemsize
    kept = 2 if spec.itemsize == 2 else 1  # sums kept in float32 take twice a half type's size
    return columns + padded * (kept + 1) + grad


IM2COL = Strategy("im2col", _rejects, _run, _workspace_bytes, GEMM_RTOL)

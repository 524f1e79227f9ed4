"""Winograd's minimal filtering F(2x2,3x3) and F(4x4,3x3): 2.25 and 4 times fewer products for 3x3 with stride 1.

A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), whose matrices these are:
a tile of m x m outputs is A^T [(G w G^T) * (B^T x B)] A for the (m + 2) x (m + 2) tile x of the image, and the sum
over channels is a GEMM for each of the (m + 2)^2 positions of a transformed tile. grad_input is the forward of grad
with the flipped filters. grad_weight is the derivative of the formula, G^T [(A dy A^T) * (B^T x B)] G summed over
tiles. Each transform is one GEMM with the Kronecker square of its matrix.

The transforms amplify rounding: B. Barabasz, A. Anderson, K. M. Soodhalter, D. Gregg, "Error Analysis and Improving
the Accuracy of Winograd Convolution for Deep Neural Networks" (arXiv:1803.10986). `magnitude` computes the sums that
their bound is made of: |error| <= u * (number of roundings) * |A^T| [(|G| |w| |G^T|) * (|B^T| |x| |B|)] |A|.

Letters in the shape comments: n samples, C channels, K filters, m the output tile's side, a = m + 2 the image
tile's, T tiles of a box.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.im2col import IM2COL
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import Strategy, empty_result
from rocm_patch.conv.windows import Box, boxes, is_whole, largest_box, sizes, window_extent, windows

_MATRICES = {
    2: (
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: (
        (
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}


# Bounds on the relative error of a whole result, above what `magnitude` allows for Gaussian operands of up to 2048
# channels (tests/test_strategies.py); F(4x4,3x3) loses about four bits against a GEMM.
_RTOL = {2: {"float32": 2e-5, "float64": 1e-13}, 4: {"float32": 1e-4, "float64": 1e-12}}


class _Transforms(NamedTuple):
    """Kronecker squares: of the image (a^2, a^2), of the filter (a^2, 9), of the output (m^2, a^2)."""

    image: torch.Tensor
    filter: torch.Tensor
    output: torch.Tensor


_made: dict[tuple[int, torch.dtype, torch.device], _Transforms] = {}


def _transforms(side: int, like: torch.Tensor) -> _Transforms | None:
    """The transforms for a tensor's type and device; None where they would have to be copied into a CUDA graph."""
    key = (side, like.dtype, like.device)
    found = _made.get(key)
    if found is None:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found = _made[key] = _transforms_on(*key)
    return found


def _transforms_on(side: int, dtype: torch.dtype, device: torch.device) -> _Transforms:
    def squared(rows: tuple[tuple[float, ...], ...]) -> torch.Tensor:
        matrix = torch.tensor(rows, dtype=torch.float64, device="cpu")
        return torch.kron(matrix, matrix).to(device, dtype)

    return _Transforms(*map(squared, _MATRICES[side]))


def _tiles_of_image(spec: ConvSpec, side: int) -> ConvSpec:
    """The convolution whose windows are the image's tiles."""
    out = tuple(-(-size // side) for size in spec.out)
    return dataclasses.replace(
        spec, weight=(*spec.weight[:2], side + 2, side + 2), stride=(side, side), out=out, channels_last=False
    )


def _tiles_of_grad(spec: ConvSpec, side: int) -> ConvSpec:
    """The convolution whose windows are grad's tiles."""
    out = tuple(-(-size // side) for size in spec.out)
    return dataclasses.replace(
        spec, image=spec.grad, weight=(1, spec.weight[0], side, side), stride=(side, side), padding=(0, 0), out=out
    )


def _transformed(matrix: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (n, C, side, side, *T) times a transform (b^2, side^2): (b^2, C, n T)."""
    flat = tiles.permute(2, 3, 1, 0, 4, 5).reshape(matrix.shape[1], -1)
    return (matrix @ flat).view(matrix.shape[0], tiles.shape[1], -1)


def _forward(
    spec: ConvSpec, image: torch.Tensor, weight: torch.Tensor, budget: int, transforms: _Transforms
) -> torch.Tensor:
    side = math.isqrt(transforms.output.shape[0])
    tiles = _tiles_of_image(spec, side)
    filters = transforms.filter @ weight.permute(2, 3, 0, 1).reshape(9, -1)
    filters = filters.view(-1, *spec.weight[:2])  # (a^2, K, C)
    result = None
    for box in boxes((spec.batch, *tiles.out), _tile_elements(spec, side), budget, spec.itemsize):
        piece = _output_tiles(tiles, image, filters, box, transforms)
        if is_whole(box, (spec.batch, *tiles.out)) and tuple(piece.shape) == spec.grad:
            return piece
        if result is None:
            result = empty_result(spec, image)
        top, left = box[1].start * side, box[2].start * side
        place = result[box[0], :, top : top + piece.shape[2], left : left + piece.shape[3]]
        place.copy_(piece[:, :, : place.shape[2], : place.shape[3]])
        del piece
    assert result is not None  # a spec has at least one tile
    return result


def _output_tiles(
    tiles: ConvSpec, image: torch.Tensor, filters: torch.Tensor, box: Box, transforms: _Transforms
) -> torch.Tensor:
    """The output under a box of tiles, (n, K, rows m, columns m)."""
    samples, *out = sizes(box)
    side = tiles.stride[0]
    products = torch.bmm(filters, _transformed(transforms.image, windows(tiles, image, box)))  # (a^2, K, n T)
    sums = (transforms.output @ products.flatten(1)).view(side, side, filters.shape[1], samples, *out)
    del products
    # n, K, tile row, row in it, tile column, column in it
    return sums.permute(3, 2, 4, 0, 5, 1).reshape(samples, filters.shape[1], out[0] * side, out[1] * side)


def flipped(spec: ConvSpec) -> ConvSpec:
    """The forward convolution of grad that grad_input is."""
    return dataclasses.replace(
        spec, direction=FORWARD, image=spec.grad, weight=(spec.weight[1], spec.weight[0], 3, 3), out=spec.spatial,
        padding=tuple(2 - p for p in spec.padding),
    )  # fmt: skip


def _grad_weight(
    spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int, transforms: _Transforms
) -> torch.Tensor:
    side = math.isqrt(transforms.output.shape[0])
    of_image, of_grad = _tiles_of_image(spec, side), _tiles_of_grad(spec, side)
    total = image.new_zeros(((side + 2) ** 2, *spec.weight[:2]))
    for box in boxes((spec.batch, *of_image.out), _tile_elements(spec, side), budget, spec.itemsize):
        transformed = _transformed(transforms.image, windows(of_image, image, box))
        derivatives = _transformed(transforms.output.t(), windows(of_grad, grad, box))
        total.baddbmm_(derivatives, transformed.transpose(1, 2))
        del transformed, derivatives
    return (transforms.filter.t() @ total.flatten(1)).view(3, 3, *spec.weight[:2]).permute(2, 3, 0, 1).contiguous()


def _computed(
    spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int, transforms: _Transforms
) -> torch.Tensor:
    if spec.direction == FORWARD:
        return _forward(spec, first, second, budget, transforms)
    if spec.direction == GRAD_INPUT:
        return _forward(flipped(spec), first, second.transpose(0, 1).flip(2, 3), budget, transforms)
    return _grad_weight(spec, first, second, budget, transforms)


def magnitude(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, side: int) -> torch.Tensor:
    """The sums of absolute values that bound the error of each element.

    Args:
        spec: the convolution.
        first: operand, as `Strategy.run` takes them.
        second: likewise.
        side: 2 or 4, the side of the output's tiles.
    """
    positive = _Transforms(*(matrix.abs() for matrix in _transforms_on(side, first.dtype, first.device)))
    return _computed(spec, first.abs(), second.abs(), 1 << 30, positive)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.kernel != (3, 3):
        return f"the kernel is {'x'.join(map(str, spec.kernel))}, not 3x3"
    if (*spec.stride, *spec.dilation) != (1, 1, 1, 1):
        return "stride or dilation is not 1"
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    if spec.dtype not in _RTOL[2]:
        return f"{spec.dtype} is too coarse for its transforms, or complex"
    return None


def _tile_elements(spec: ConvSpec, side: int) -> int:
    """Workspace of one tile at its peak; copies and transforms of both sides, and the padded part (side^2)."""
    filters, channels = spec.weight[:2]
    inner, outer = side**2, (side + 2) ** 2
    if spec.direction == GRAD_WEIGHT:
        return max(channels * (inner + 2 * outer), channels * outer + filters * (2 * inner + outer))
    return max(channels * (inner + 2 * outer), (channels + filters) * outer, filters * (inner + outer))


def _workspace_bytes(spec: ConvSpec, budget: int, side: int) -> int:
    if spec.direction == GRAD_INPUT:
        return _workspace_bytes(flipped(spec), budget, side) + math.prod(spec.weight) * spec.itemsize
    tiles = _tiles_of_image(spec, side)
    elements = _tile_elements(spec, side)
    samples, *out = largest_box((spec.batch, *tiles.out), elements, budget, spec.itemsize)
    # Two rows and columns more than the tiles' own belong to the padded part.
    border = spec.image[1] * (math.prod(window_extent(tiles, out)) - math.prod(out) * side**2)
    filters = math.prod(spec.weight[:2]) * ((side + 2) ** 2 + 9)
    cropped = 0 if tuple(size * side for size in tiles.out) == spec.out else spec.weight[0] * math.prod(out) * side**2
    return (samples * (math.prod(out) * elements + border + cropped) + filters) * spec.itemsize


def _strategy(name: str, side: int) -> Strategy:
    def run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
        transforms = _transforms(side, first)
        if transforms is None:
            return IM2COL.run(spec, first, second, budget)
        return _computed(spec, first, second, budget, transforms)

    return Strategy(
        name,
        run,
        partial(_workspace_bytes, side=side),
        _RTOL[side],
        _rejects,
        partial(_work, side=side),
        is_approximate=True,
    )


# As many as the host's time for a small call is worth.
_LAUNCHES = {FORWARD: 30, GRAD_INPUT: 40, GRAD_WEIGHT: 50}


def _work(spec: ConvSpec, side: int) -> Work:
    as_forward = flipped(spec) if spec.direction == GRAD_INPUT else spec
    tiles = spec.batch * math.prod(-(-size // side) for size in as_forward.out)
    filters, channels = as_forward.weight[:2]
    outer, inner = (side + 2) ** 2, side**2
    # Products between the transforms, and the transforms themselves.
    flops = 2.0 * tiles * (outer * filters * channels + outer * outer * channels + outer * inner * filters)
    # Tiles are copied, transformed, multiplied, transformed back and put in their places.
    moved = tiles * (4 * outer * channels + (2 * outer + 4 * inner) * filters) * spec.itemsize
    moved += 3 * outer * filters * channels * spec.itemsize
    columns = channels if spec.direction == GRAD_WEIGHT else tiles
    share = cost.filled(spec, filters, columns, outer)
    return Work(flops, share, cost.operand_bytes(spec) + moved, _LAUNCHES[spec.direction])


WINOGRAD_F23 = _strategy("winograd_f23", 2)
WINOGRAD_F43 = _strategy("winograd_f43", 4)

"""columns: im2col and col2im by one kernel each, in pieces that a cache may hold, and the BLAS library's products.

The image's columns are written once and read once by the product, which writes the result in its place; grad_input
is the product's columns added up where they overlap. Samples are taken a few at a time.
"""

from __future__ import annotations

import math

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
from rocm_patch.kernels.launch import Launch

# Columns of one piece: of the order of a large card's last cache (50 MB on an H200, 32 to 128 MB on RDNA2 and 3), and
# enough for products that fill it.
_PIECE_BYTES = 64 << 20
_MOST_BYTES = 256 << 20
_ROWS, _POSITIONS = 8, 256
_FOLD_TILE = 256
_MOST_TAPS = 49
# Below so many blocks side by side a batch of products leaves a large card idle.
_FEWEST_BLOCKS = 64


# Elements of half types that matrix units load at once.
_ALIGNED = 8
# The share of the GEMM rate that half types reach, and the least of a card that libraries fill with them.
_REACHED_HALF, _FILLED_HALF = 0.5, 0.7


class _Pieces:
    """Samples at a time, and a kernel for as many and one for the rest."""

    def __init__(self, spec: ConvSpec) -> None:
        self.rows, self.length = spec.image[1] * spec.taps, math.prod(spec.out)
        self.sample_bytes = self.rows * self.length * spec.itemsize
        # A piece begins where the kernels may take it: at a multiple of 16 bytes, four elements.
        at_once = max(4, _PIECE_BYTES // self.sample_bytes // 4 * 4)
        if math.prod(spec.image[1:]) % 4 == 0:
            at_once = max(1, _PIECE_BYTES // self.sample_bytes)
        self.samples = min(spec.batch, at_once)
        self.bytes = copies_to_first(spec) + self.samples * self.sample_bytes
        sizes = sizes_of(spec)
        make = _fold if spec.direction == GRAD_INPUT else _unfold
        counts = {self.samples, spec.batch % self.samples} - {0}
        # For one product of all samples of a piece their columns stand side by side.
        self.is_one_product = spec.direction == GRAD_WEIGHT and _blocks(spec) * self.samples < _FEWEST_BLOCKS
        self.launches = {n: make(spec, sizes, n, self.is_one_product) for n in counts}
        self.starts = range(0, spec.batch, self.samples)
        self.batch = spec.batch


def _blocks(spec: ConvSpec) -> int:
    """Blocks of a BLAS library in the product for a sample's share of grad_weight."""
    return cdiv(spec.weight[0], 128) * cdiv(spec.image[1] * spec.taps, 128)


def _unfold(spec: ConvSpec, sizes: dict[str, int], samples: int, beside: bool) -> Launch:
    rows, length = spec.image[1] * spec.taps, math.prod(spec.out)
    strides = {"yn": length, "yr": samples * length} if beside else {"yn": rows * length, "yr": length}
    return Launch(
        "layout", "unfold", (spec.dtype, spec.dtype), {**only(sizes, "N", "G", "K"), **strides},
        {"DEPTH": len(spec.kernel) == 3, "ROWS": _ROWS, "POSITIONS": _POSITIONS},
        (cdiv(length, _POSITIONS), cdiv(rows, _ROWS), samples), spec.device,
    )  # fmt: skip


def _fold(spec: ConvSpec, sizes: dict[str, int], samples: int, beside: bool) -> Launch:
    columns = min(128, next_power_of_2(sizes["W"]))
    rows = min(_FOLD_TILE // columns, next_power_of_2(sizes["H"]))
    kernel = {name: sizes[name] for name in ("KD", "KH", "KW")}
    return Launch(
        "layout", "fold", (spec.dtype, spec.dtype), only(sizes, "N", "G", "K", *kernel),
        {**kernel, "ROWS": rows, "POSITIONS": columns},
        (samples * sizes["C"] * sizes["D"] * cdiv(sizes["H"], rows), cdiv(sizes["W"], columns)), spec.device,
    )  # fmt: skip


def _forward_plan(spec: ConvSpec) -> Plan:
    pieces = _Pieces(spec)
    filters = spec.weight[0]

    def run(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        image = dense(image)
        result = image.new_empty(spec.grad)
        flat = result.view(spec.batch, filters, pieces.length)
        matrix = weight.reshape(1, filters, -1)
        columns = image.new_empty((pieces.samples, pieces.rows, pieces.length))
        for start in pieces.starts:
            samples = min(pieces.samples, pieces.batch - start)
            pieces.launches[samples](image[start : start + samples] if start else image, columns)
            part = columns if samples == pieces.samples else columns[:samples]
            torch.bmm(matrix.expand(samples, -1, -1), part, out=flat[start : start + samples])
        return result

    return Plan(tuple(pieces.launches.values()), run, pieces.bytes)


def _input_plan(spec: ConvSpec) -> Plan:
    pieces = _Pieces(spec)
    filters = spec.weight[0]

    def run(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        grad = dense(grad)
        result = grad.new_empty(spec.image)
        flat = grad.view(spec.batch, filters, pieces.length)
        matrix = weight.reshape(1, filters, -1).transpose(1, 2)
        columns = grad.new_empty((pieces.samples, pieces.rows, pieces.length))
        for start in pieces.starts:
            samples = min(pieces.samples, pieces.batch - start)
            part = columns if samples == pieces.samples else columns[:samples]
            torch.bmm(matrix.expand(samples, -1, -1), flat[start : start + samples], out=part)
            pieces.launches[samples](part, result[start : start + samples] if start else result)
        return result

    return Plan(tuple(pieces.launches.values()), run, pieces.bytes)


def _weight_plan(spec: ConvSpec) -> Plan:
    pieces = _Pieces(spec)
    if pieces.is_one_product:
        return _one_product_plan(spec, pieces)
    filters, entries = spec.weight[0], math.prod(spec.weight)
    sum_up = reduction(spec, entries, spec.batch)
    is_single = spec.batch == 1

    def run(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        image, grad = dense(image), dense(grad)
        result = image.new_empty(spec.weight)
        flat = grad.view(spec.batch, filters, pieces.length)
        matrix = result.view(1, filters, -1)
        products = matrix if is_single else image.new_empty((spec.batch, filters, pieces.rows))
        columns = image.new_empty((pieces.samples, pieces.rows, pieces.length))
        for start in pieces.starts:
            samples = min(pieces.samples, pieces.batch - start)
            pieces.launches[samples](image[start : start + samples] if start else image, columns)
            part = columns if samples == pieces.samples else columns[:samples]
            torch.bmm(flat[start : start + samples], part.transpose(1, 2), out=products[start : start + samples])
        if not is_single:
            sum_up(products, result)
        return result

    products = 0 if is_single else spec.batch * entries * spec.itemsize
    launches = tuple(pieces.launches.values())
    return Plan(
        launches if is_single else (*launches, sum_up),
        run,
        pieces.bytes + products,
    )


def _one_product_plan(spec: ConvSpec, pieces: _Pieces) -> Plan:
    """grad_weight of few filters: a product per piece, which the BLAS library cuts where it sums."""
    filters = spec.weight[0]

    def run(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        image, grad = dense(image), dense(grad)
        result = image.new_empty(spec.weight)
        matrix, flat = result.view(filters, -1), grad.view(spec.batch, filters, pieces.length)
        buffer = image.new_empty(pieces.samples * pieces.rows * pieces.length)
        for start in pieces.starts:
            samples = min(pieces.samples, pieces.batch - start)
            pieces.launches[samples](image[start : start + samples] if start else image, buffer)
            width = samples * pieces.length
            columns = buffer[: pieces.rows * width].view(pieces.rows, width)
            rows = flat[start : start + samples].transpose(0, 1).reshape(filters, width)
            if start:
                matrix.addmm_(rows, columns.t())
            else:
                torch.mm(rows, columns.t(), out=matrix)
            del rows  # before the next piece's are made
        return result

    copies = pieces.samples * filters * pieces.length * spec.itemsize
    return Plan(tuple(pieces.launches.values()), run, pieces.bytes + copies)


def _plan(spec: ConvSpec) -> Plan:
    if spec.direction == FORWARD:
        return _forward_plan(spec)
    return _input_plan(spec) if spec.direction == GRAD_INPUT else _weight_plan(spec)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.itemsize == 2 and spec.direction != FORWARD:
        return "its products would be rounded to the half type before they are added up"
    if spec.itemsize == 2 and (math.prod(spec.out) % _ALIGNED or spec.image[1] * spec.taps % _ALIGNED):
        return "BLAS libraries are slow with rows of half types that begin anywhere"
    if spec.taps == 1:
        return "there is nothing to unroll"
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    rows, length = spec.image[1] * spec.taps, math.prod(spec.out)
    if rows * length * spec.itemsize > _MOST_BYTES or spec.batch * math.prod(spec.weight) * 4 > _MOST_BYTES:
        return "the columns of one sample are too many"
    if spec.taps > _MOST_TAPS or cdiv(rows, _ROWS) > MOST_BLOCKS:
        return "more taps or rows than a kernel takes"
    return None


def _work(spec: ConvSpec) -> Work:
    rows, length, filters = spec.image[1] * spec.taps, math.prod(spec.out), spec.weight[0]
    samples = min(spec.batch, max(1, _PIECE_BYTES // (rows * length * spec.itemsize)))
    pieces = cdiv(spec.batch, samples)
    sides = {FORWARD: (filters, length), GRAD_INPUT: (rows, length)}.get(spec.direction, (filters, rows))
    share = cost.filled(spec, *sides, samples)
    if spec.itemsize == 2:
        share = _REACHED_HALF * max(_FILLED_HALF, share)
    moved = (1 + 2 * spec.channels_last) * cost.operand_bytes(spec) + 2 * cost.column_bytes(spec)
    return Work(cost.flops(spec), share, moved, 6 * pieces + 2)


COLUMNS = Fused("columns", _plan, _rejects, _work).strategy

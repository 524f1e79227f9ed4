"""columns: im2col and col2im by one kernel each, in pieces that a cache may hold, and the BLAS library's products.

The image's columns are written once and read once by the product, which writes the result in its place; grad_input
is the product's columns added up where they overlap. Samples are taken a few at a time.

In half types nothing is added up after a product, which has rounded: grad_input is a forward convolution of grad,
its taps read backwards, and grad_weight is one product of all samples.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.fused import MOST_BLOCKS, Fused, Plan, cdiv, dense, reduction
from rocm_patch.conv.pieces import PIECE_BYTES, ROWS, Pieces
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.to_last import Copy, to_last

_MOST_BYTES = 256 << 20
_MOST_TAPS = 49
# Elements of half types that matrix units load at once.
_ALIGNED = 8
# Half types, as timed on an H200: the share of the GEMM rate, passes over the columns by direction (which are written
# at the rate of elements, not of bytes), and over operands whose channels are last.
_REACHED_HALF = 0.7
_PASSES_HALF = {FORWARD: 5.5, GRAD_INPUT: 5.5, GRAD_WEIGHT: 6.5}
_PASSES_LAST = 8


def _backwards(spec: ConvSpec) -> ConvSpec:
    """grad_input without a stride: x gets tap r from grad at x + P - r L, as a forward with -P and -L reads it."""
    return dataclasses.replace(
        spec, direction=FORWARD, image=spec.grad, weight=(spec.image[1], spec.weight[0], *spec.kernel),
        padding=tuple(-size for size in spec.padding), dilation=tuple(-step for step in spec.dilation),
        out=spec.spatial,
    )  # fmt: skip


def _forward_plan(spec: ConvSpec) -> Plan:
    pieces = Pieces(spec)
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
            into = flat if samples == pieces.batch else flat[start : start + samples]
            torch.bmm(matrix.expand(samples, -1, -1), part, out=into)
        return result

    return Plan(tuple(pieces.launches.values()), run, pieces.bytes)


def _gathering_plan(spec: ConvSpec) -> Plan:
    forward = _forward_plan(_backwards(spec))
    filters, channels, taps = spec.weight[0], spec.weight[1], spec.taps
    # (K, C, taps) to (C, K, taps), runs of taps as they are.
    turn = to_last(spec, Copy((channels, taps, filters), (taps, 1, channels * taps)))

    def run(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = dense(weight)
        turned = weight.new_empty((channels, filters, taps))
        turn(weight, turned)
        return forward.run(grad, turned)

    copied = math.prod(spec.weight) * spec.itemsize
    return Plan((*forward.launches, turn), run, forward.workspace_bytes + copied)


def _input_plan(spec: ConvSpec) -> Plan:
    pieces = Pieces(spec)
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
    pieces = Pieces(spec)
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


def _one_product_plan(spec: ConvSpec, pieces: Pieces) -> Plan:
    """grad_weight of few filters, or of half types: a product per piece; the BLAS library cuts where it sums."""
    filters, length = spec.weight[0], pieces.length
    # Torch copies half types element by element.
    beside = None
    if spec.itemsize == 2:
        beside = to_last(spec, Copy((filters, length, spec.batch), (length, 1, filters * length)))

    def rows_of(grad: torch.Tensor, start: int, samples: int) -> torch.Tensor:
        """grad of some samples (K, n L)."""
        if beside is None:
            return grad[start : start + samples].transpose(0, 1).reshape(filters, -1)
        if samples > 1:
            rows = grad.new_empty(grad.numel())
            beside(grad, rows)
            grad = rows
        return grad.view(filters, -1)

    def run(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        image, grad = dense(image), dense(grad)
        result = image.new_empty(spec.weight)
        matrix, flat = result.view(filters, -1), grad.view(spec.batch, filters, length)
        buffer = image.new_empty((pieces.rows, pieces.samples * length))
        for start in pieces.starts:
            samples = min(pieces.samples, pieces.batch - start)
            pieces.launches[samples](image[start : start + samples] if start else image, buffer)
            width = samples * length
            columns = buffer
            if samples < pieces.samples:
                columns = buffer.view(-1)[: pieces.rows * width].view(pieces.rows, width)
            rows = rows_of(flat, start, samples)
            if start:
                matrix.addmm_(rows, columns.t())
            else:
                torch.mm(rows, columns.t(), out=matrix)
            del rows  # before the next piece's are made
        return result

    copies = pieces.samples * filters * length * spec.itemsize
    launches = tuple(pieces.launches.values())
    return Plan(launches if beside is None else (*launches, beside), run, pieces.bytes + copies)


def _is_aligned(spec: ConvSpec) -> bool:
    """Whether the rows of all matrices begin where matrix units load them from at once."""
    sides = {
        FORWARD: (math.prod(spec.out), spec.image[1] * spec.taps),
        GRAD_INPUT: (math.prod(spec.spatial), spec.weight[0] * spec.taps),
        GRAD_WEIGHT: (spec.batch * math.prod(spec.out), spec.image[1] * spec.taps),
    }[spec.direction]
    return not any(side % _ALIGNED for side in sides)


def _plan(spec: ConvSpec) -> Plan:
    if spec.direction == FORWARD:
        return _forward_plan(spec)
    if spec.direction == GRAD_WEIGHT:
        return _weight_plan(spec)
    return _gathering_plan(spec) if spec.itemsize == 2 else _input_plan(spec)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.itemsize == 2:
        is_strided = spec.direction == GRAD_INPUT and math.prod(spec.stride) > 1
        is_cut = spec.direction == GRAD_WEIGHT and cost.column_bytes(spec) > PIECE_BYTES
        if is_strided or is_cut:
            return "its products would be rounded to the half type before they are added up"
        if not _is_aligned(spec):
            return "BLAS libraries are slow with rows of half types that begin anywhere"
    if spec.taps == 1:
        return "there is nothing to unroll"
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    rows, length = _shape(spec)
    if rows * length * spec.itemsize > _MOST_BYTES or spec.batch * math.prod(spec.weight) * 4 > _MOST_BYTES:
        return "the columns of one sample are too many"
    if spec.taps > _MOST_TAPS or max(cdiv(rows, ROWS), *spec.weight[:2]) > MOST_BLOCKS:
        return "more taps or rows than a kernel takes"
    return None


def _shape(spec: ConvSpec) -> tuple[int, int]:
    """Rows and positions of a sample's columns: of the image's, or of grad's where grad_input reads them."""
    if spec.direction == GRAD_INPUT and spec.itemsize == 2:
        return spec.weight[0] * spec.taps, math.prod(spec.spatial)
    return spec.image[1] * spec.taps, math.prod(spec.out)


def _work(spec: ConvSpec) -> Work:
    rows, length = _shape(spec)
    filters, column_bytes = spec.weight[0], rows * length * spec.itemsize
    pieces = cdiv(spec.batch, min(spec.batch, max(1, PIECE_BYTES // column_bytes)))
    if spec.itemsize == 2:
        moved = (_PASSES_LAST if spec.channels_last else 1) * cost.operand_bytes(spec)
        moved += _PASSES_HALF[spec.direction] * spec.batch * column_bytes
        if spec.direction == GRAD_INPUT:
            moved += 2 * math.prod(spec.weight) * spec.itemsize
        return Work(cost.flops(spec), _REACHED_HALF, moved, 6 * pieces + 2 + 2 * (spec.direction != FORWARD))
    sides = {FORWARD: (filters, length), GRAD_INPUT: (rows, length)}.get(spec.direction, (filters, rows))
    share = cost.filled(spec, *sides, cdiv(spec.batch, pieces))
    moved = (1 + 2 * spec.channels_last) * cost.operand_bytes(spec) + 2 * spec.batch * column_bytes
    return Work(cost.flops(spec), share, moved, 6 * pieces + 2)


COLUMNS = Fused("columns", _plan, _rejects, _work).strategy

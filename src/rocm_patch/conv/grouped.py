"""grouped: im2col with one batched GEMM over all groups.

Large maps are a batch of samples times groups; the maps of all samples are put together where they are small.

Letters in the shape comments: n samples, G groups, C channels and K filters of one group, R kernel taps,
L output positions.
"""

from __future__ import annotations

import math

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.im2col import boxes_of, by_boxes, position_elements
from rocm_patch.conv.phases import grad_input, phases
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy, is_small_map, sum_dtype
from rocm_patch.conv.windows import largest_box, longest_sum, on_output, window_extent, windows


def _forward(
    spec: ConvSpec, image: torch.Tensor, weight: torch.Tensor, budget: int, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The result (N, G K, *out), written into a tensor where one is given."""
    product_of = _of_all_samples if is_small_map(spec) else _of_each_sample
    filters = weight.reshape(spec.groups, spec.weight[0] // spec.groups, -1)  # (G, K, C R)
    return by_boxes(spec, image, budget, lambda view: product_of(spec, view, filters), into)


def _of_each_sample(spec: ConvSpec, view: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    samples, out = view.shape[0], view.shape[-len(spec.out) :]
    columns = view.reshape(samples * spec.groups, -1, math.prod(out))  # (n G, C R, L)
    repeated = filters.expand(samples, *filters.shape).reshape(-1, *filters.shape[1:])  # (n G, K, C R)
    return torch.bmm(repeated, columns).view(samples, spec.weight[0], *out)


def _of_all_samples(spec: ConvSpec, view: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    samples, out = view.shape[0], view.shape[-len(spec.out) :]
    product = torch.bmm(filters, _columns(spec, view))  # (G, K, n L)
    return product.view(spec.weight[0], samples, *out).movedim(1, 0).contiguous()


def _columns(spec: ConvSpec, view: torch.Tensor) -> torch.Tensor:
    """Windows (n, G C, *kernel, *out) as (G, C R, n L)."""
    return view.movedim(0, 1 + len(spec.out)).reshape(spec.groups, spec.weight[1] * spec.taps, -1)


def _grad_weight(spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int) -> torch.Tensor:
    product_of = _weights_of_all_samples if is_small_map(spec) else _weights_of_each_sample
    total: torch.Tensor | None = None
    for box in boxes_of(spec, budget):
        piece = product_of(spec, windows(spec, image, box), grad[on_output(box)])
        total = piece.to(sum_dtype(piece)) if total is None else total.add_(piece)
    assert total is not None  # a spec has at least one output position
    return total.to(image.dtype).view(spec.weight)


def _weights_of_all_samples(spec: ConvSpec, view: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    rows = grad.movedim(0, 1).reshape(spec.groups, spec.weight[0] // spec.groups, -1)  # (G, K, n L)
    return torch.bmm(rows, _columns(spec, view).transpose(1, 2))


def _weights_of_each_sample(spec: ConvSpec, view: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    samples, positions = view.shape[0], math.prod(view.shape[-len(spec.out) :])
    columns = view.reshape(samples * spec.groups, -1, positions)  # (n G, C R, L)
    rows = grad.reshape(samples * spec.groups, -1, positions)  # (n G, K, L)
    products = torch.bmm(rows, columns.transpose(1, 2))  # (n G, K, C R)
    return products.view(samples, spec.groups, *products.shape[1:]).sum(0, dtype=sum_dtype(products))


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    if spec.direction == FORWARD:
        return _forward(spec, first, second, budget)
    if spec.direction == GRAD_INPUT:
        return grad_input(_forward, spec, first, second, budget)
    return _grad_weight(spec, first, second, budget)


def _rejects(spec: ConvSpec) -> str | None:
    return "there is one group only" if spec.groups == 1 else None


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    if spec.direction == GRAD_INPUT:
        weight = math.prod(spec.weight) * spec.itemsize
        return weight + max((_bytes_of_box(phase.spec, budget) for phase in phases(spec)), default=0)
    return _bytes_of_box(spec, budget)


def _bytes_of_box(spec: ConvSpec, budget: int) -> int:
    """Columns, padded image and product of the largest box; a copy of the weight, or of its gradient, per sample."""
    samples, *out = largest_box(
        (spec.batch, *spec.out), position_elements(spec), budget, spec.itemsize, longest_sum(spec)
    )
    positions = math.prod(out)
    padded = spec.image[1] * math.prod(window_extent(spec, out))
    columns = spec.image[1] * spec.taps * positions
    weights = math.prod(spec.weight) * (samples + 4)
    return (samples * (columns + padded + spec.weight[0] * positions) + weights) * spec.itemsize


def _work(spec: ConvSpec) -> Work:
    # Small products by the thousand: memory is what they cost.
    moved = cost.operand_bytes(spec) + 6 * cost.column_bytes(spec)
    share = cost.filled(spec, spec.weight[0] // spec.groups, math.prod(spec.out), spec.batch * spec.groups)
    return Work(cost.flops(spec), share, moved, 30 if spec.direction == GRAD_INPUT else 20)


GROUPED = Strategy("grouped", _run, _workspace_bytes, GEMM_RTOL, _rejects, _work)

"""1x1 kernels without padding: the convolution is a matrix product over channels, no workspace needed."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy, channels_to_rows, empty_result, is_small_map, sum_dtype
from rocm_patch.conv.windows import boxes, largest_box, longest_sum, on_output


def _strided(spec: ConvSpec, image: torch.Tensor) -> torch.Tensor:
    """The image positions that the stride reaches, as a view (N, C, *out)."""
    for dim, (step, size) in enumerate(zip(spec.stride, spec.out, strict=True), start=2):
        if step != 1 or size != image.shape[dim]:
            image = image.narrow(dim, 0, (size - 1) * step + 1)[(slice(None),) * dim + (slice(None, None, step),)]
    return image


def _product(spec: ConvSpec, matrix: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """matrix (M, C) times source (N, C, *out) -> (N, M, *out), in the memory format of the result."""
    batch, rows = spec.batch, matrix.shape[0]
    # Of half types small maps cost more than putting them together.
    if spec.channels_last or (spec.itemsize == 2 and is_small_map(spec)):
        return torch.mm(channels_to_rows(source), matrix.t()).view(batch, *spec.out, rows).movedim(-1, 1)
    columns = source.reshape(batch, source.shape[1], -1)  # (N, C, L)
    if batch == 1:
        return torch.mm(matrix, columns[0]).view(1, rows, *spec.out)
    return torch.bmm(matrix.expand(batch, *matrix.shape), columns).view(batch, rows, *spec.out)


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    if spec.direction == FORWARD:
        return _product(spec, second.reshape(spec.weight[:2]), _strided(spec, first))
    if spec.direction == GRAD_INPUT:
        reached = _product(spec, second.reshape(spec.weight[:2]).t(), first)
        if spec.out == spec.spatial:
            return reached
        result = empty_result(spec, first).zero_()
        _strided(spec, result).copy_(reached)
        return result
    return _grad_weight(spec, _strided(spec, first), second, budget)


def _grad_weight(spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int) -> torch.Tensor:
    """grad (N, K, *out) times image (N, C, *out), summed over samples and positions."""
    product_of = _summed_gemms
    if _is_one_gemm(spec):
        product_of = _gemm_of_rows if spec.channels_last else _gemm_of_columns
    if _is_one_box(spec, budget):
        return product_of(grad, image, image.dtype).view(spec.weight)
    total: torch.Tensor | None = None
    for box in boxes((spec.batch, *spec.out), _position_elements(spec), budget, spec.itemsize, longest_sum(spec)):
        # Sums across boxes are kept in float32, as the GEMM keeps them within one.
        piece = product_of(grad[on_output(box)], image[on_output(box)], sum_dtype(image))
        total = piece if total is None else total.add_(piece)
    assert total is not None  # a spec has at least one output position
    return total.to(image.dtype).view(spec.weight)


# Asked at every call: what a spec decides is found once.
@lru_cache(4096)
def _is_one_box(spec: ConvSpec, budget: int) -> bool:
    extents = (spec.batch, *spec.out)
    return largest_box(extents, _position_elements(spec), budget, spec.itemsize, longest_sum(spec)) == extents


def _gemm_of_rows(grad: torch.Tensor, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (channels_to_rows(grad).t() @ channels_to_rows(image)).to(dtype)


def _gemm_of_columns(grad: torch.Tensor, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Samples side by side: copies of whole maps, not of single elements."""
    columns = [tensor.movedim(0, 1).reshape(tensor.shape[1], -1) for tensor in (grad, image)]  # (channels, n L)
    return (columns[0] @ columns[1].t()).to(dtype)


def _summed_gemms(grad: torch.Tensor, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    products = torch.bmm(grad.flatten(2), image.flatten(2).transpose(1, 2))  # (n, K, C)
    return products.sum(0, dtype=dtype)


def _is_one_gemm(spec: ConvSpec) -> bool:
    return spec.channels_last or is_small_map(spec)


def _position_elements(spec: ConvSpec) -> int:
    """Workspace of one output position in grad_weight: copies of what is not in the GEMM's layout."""
    elements = 0 if math.prod(spec.stride) == 1 else spec.weight[1]
    if not _is_one_gemm(spec):
        return elements + -(-math.prod(spec.weight) // math.prod(spec.out))  # a product per sample
    return elements if spec.channels_last else spec.weight[0] + spec.weight[1]


def _rejects(spec: ConvSpec) -> str | None:
    if spec.taps != 1:
        return f"the kernel has {spec.taps} taps, not one"
    if any(spec.padding):
        return "the image is padded"
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    return None


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    weight = math.prod(spec.weight)
    if spec.direction == GRAD_WEIGHT:
        elements = _position_elements(spec)
        samples, *out = largest_box((spec.batch, *spec.out), elements, budget, spec.itemsize, longest_sum(spec))
        products = 0 if _is_one_gemm(spec) else samples * weight
        return (samples * math.prod(out) * elements + products + 4 * weight) * spec.itemsize
    # What the stride skips is copied out of the image, or the product is copied into its places.
    copied = math.prod(spec.out) * spec.batch * max(spec.weight[:2])
    return (copied + weight) * spec.itemsize


def _work(spec: ConvSpec) -> Work:
    # Putting small maps together takes many small operations, which the host has to start.
    launches = 10 if spec.itemsize == 2 and is_small_map(spec) and not spec.channels_last else 6
    return Work(cost.flops(spec), 1.0, 1.5 * cost.operand_bytes(spec), launches)


POINTWISE = Strategy("pointwise", _run, _workspace_bytes, GEMM_RTOL, _rejects, _work)

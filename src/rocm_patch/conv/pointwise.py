"""1x1 kernels without padding: the convolution is a matrix product over channels, no workspace needed."""

from __future__ import annotations

import math

import torch

from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, SMALL_MAP, Strategy, channels_to_rows, empty_result, sum_dtype
from rocm_patch.conv.windows import boxes, largest_box


def _strided(spec: ConvSpec, image: torch.Tensor) -> torch.Tensor:
    """The image positions that the stride reaches, as a view (N, C, *out)."""
    for dim, (step, size) in enumerate(zip(spec.stride, spec.out, strict=True), start=2):
        if step != 1 or size != image.shape[dim]:
            image = image.narrow(dim, 0, (size - 1) * step + 1)[(slice(None),) * dim + (slice(None, None, step),)]
    return image


def _product(spec: ConvSpec, matrix: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """matrix (M, C) times source (N, C, *out) -> (N, M, *out), in the memory format of the result."""
    batch, rows = spec.batch, matrix.shape[0]
    if spec.channels_last:
        return (channels_to_rows(source) @ matrix.t()).view(batch, *spec.out, rows).movedim(-1, 1)
    columns = source.reshape(batch, source.shape[1], -1)  # (N, C, L)
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
    if spec.channels_last:
        return (channels_to_rows(grad).t() @ channels_to_rows(image)).view(spec.weight)
    one_gemm = _is_small_map(spec)
    total: torch.Tensor | None = None
    for samples, *_ in boxes((spec.batch,), _sample_elements(spec), budget, spec.itemsize):
        if one_gemm:
            piece = channels_to_rows(grad[samples]).t() @ channels_to_rows(image[samples])
        else:
            products = torch.bmm(grad[samples].flatten(2), image[samples].flatten(2).transpose(1, 2))  # (n, K, C)
            piece = products.sum(0, dtype=sum_dtype(products))
        total = piece.to(sum_dtype(piece)) if total is None else total.add_(piece)
    assert total is not None  # a spec has at least one sample
    return total.to(image.dtype).view(spec.weight)


def _is_small_map(spec: ConvSpec) -> bool:
    return math.prod(spec.out) < SMALL_MAP


def _sample_elements(spec: ConvSpec) -> int:
    """Workspace of one sample in grad_weight."""
    positions = math.prod(spec.out)
    if _is_small_map(spec):
        return (spec.weight[0] + spec.weight[1]) * positions
    return spec.weight[0] * spec.weight[1] + (spec.weight[0] + spec.weight[1]) * positions


def _rejects(spec: ConvSpec) -> str | None:
    if spec.taps != 1:
        return f"the kernel has {spec.taps} taps, not one"
    if any(spec.padding):
        return "the image is padded"
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    return None


def _slow_for(spec: ConvSpec) -> str | None:
    return None


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    weight = math.prod(spec.weight)
    if spec.direction == GRAD_WEIGHT:
        if spec.channels_last:
            return math.prod(spec.out) * spec.batch * (spec.weight[0] + spec.weight[1]) * spec.itemsize
        samples = largest_box((spec.batch,), _sample_elements(spec), budget, spec.itemsize)[0]
        return (samples * _sample_elements(spec) + 4 * weight) * spec.itemsize
    # What the stride skips is copied out of the image, or the product is copied into its places.
    copied = math.prod(spec.out) * spec.batch * max(spec.weight[:2])
    return (copied + weight) * spec.itemsize


POINTWISE = Strategy("pointwise", _rejects, _slow_for, _run, _workspace_bytes, GEMM_RTOL)

"""1x1 kernels without padding: the convolution is a matrix product over channels, no workspace needed."""

from __future__ import annotations

import math

import torch

from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy


def channels_to_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) as a matrix (N * prod(spatial), C); a view where the memory is channels_last."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


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
        memory_format = torch.contiguous_format
        if spec.channels_last:
            memory_format = torch.channels_last if len(spec.kernel) == 2 else torch.channels_last_3d
        result = torch.zeros(spec.image, dtype=first.dtype, device=first.device).contiguous(
            memory_format=memory_format
        )
        _strided(spec, result).copy_(reached)
        return result
    grad = channels_to_rows(second)  # (N * L, K)
    image = channels_to_rows(_strided(spec, first))  # (N * L, C)
    return (grad.t() @ image).view(spec.weight)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.taps != 1:
        return f"the kernel has {spec.taps} taps, not one"
    if any(spec.padding):
        return "the image is padded"
    if spec.groups != 1:
        return f"the channels fall into {spec.groups} groups"
    return None


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    # At most one copy of each operand in the layout that the product needs.
    operands = math.prod(spec.out) * spec.batch * (spec.weight[0] + spec.weight[1]) * spec.itemsize
    return operands


POINTWISE = Strategy("pointwise", _rejects, _run, _workspace_bytes, GEMM_RTOL)

"""An aten convolution call as a `ConvSpec`: the one place that reads aten's arguments."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from rocm_patch.conv.native import cudnn_enabled
from rocm_patch.conv.spec import (
    FORWARD,
    GRAD_INPUT,
    GRAD_WEIGHT,
    ConvSpec,
    output_size,
    transposed_output_size,
)

_SERVED_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Geometry:
    """The arguments of aten's convolutions that are not tensors, as aten names them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def looks(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All of a tensor that decides its spec, hashable and quick to read."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout


def forward_spec(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> ConvSpec | None:
    """The spec of a forward call, or None for a call that only aten can judge (an error, or nothing to do).

    input (N, C_in, *spatial), weight (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) for a
    transposed convolution, bias (C_out,).
    """
    plain = _plain(input, weight, geometry)
    if plain is None:
        return None
    spec = dataclasses.replace(plain, direction=GRAD_INPUT if geometry.transposed else FORWARD)
    if bias is not None and (bias.dtype != input.dtype or bias.shape != spec.result[1:2]):
        return None
    return spec


def backward_specs(
    grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, geometry: Geometry
) -> tuple[ConvSpec, ConvSpec] | None:
    """The specs of the gradients of input and of weight, or None for a call that only aten can judge."""
    plain = _plain(input, weight, geometry)
    if plain is None:
        return None
    # Seen from a transposed convolution, grad_output is the image and the input is the output of the plain one.
    expected = plain.image if geometry.transposed else plain.grad
    if grad_output.shape != expected or grad_output.dtype != input.dtype:
        return None
    of_input = dataclasses.replace(plain, direction=FORWARD if geometry.transposed else GRAD_INPUT)
    return of_input, dataclasses.replace(plain, direction=GRAD_WEIGHT)


def _plain(input: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> ConvSpec | None:
    """The plain convolution behind a call; its direction is set by the caller."""
    dims = input.dim() - 2
    if dims not in (1, 2, 3) or weight.dim() != input.dim():
        return None
    if input.dtype not in _SERVED_DTYPES or weight.dtype != input.dtype or weight.device != input.device:
        return None
    if input.layout is not torch.strided or weight.layout is not torch.strided:
        return None
    expanded = [
        _expanded(values, dims)
        for values in (geometry.stride, geometry.padding, geometry.dilation, geometry.output_padding)
    ]
    if any(len(values) != dims for values in expanded) or geometry.groups <= 0:
        return None
    stride, padding, dilation, output_padding = expanded
    if min(*stride, *dilation) <= 0 or min(*padding, *output_padding) < 0:
        return None
    shape, filters, groups = tuple(input.shape), tuple(weight.shape), geometry.groups
    if 0 in shape or 0 in filters or filters[0] % groups:
        return None
    if geometry.transposed:
        if filters[0] != shape[1]:
            return None
        if any(extra >= max(s, d) for extra, s, d in zip(output_padding, stride, dilation, strict=True)):
            return None
        spatial = transposed_output_size(shape[2:], filters[2:], stride, padding, dilation, output_padding)
        image, out = (shape[0], filters[1] * groups, *spatial), shape[2:]
    else:
        if filters[1] * groups != shape[1]:
            return None
        image, out = shape, output_size(shape[2:], filters[2:], stride, padding, dilation)
        spatial = out
    if min(spatial) <= 0:
        return None
    return ConvSpec(
        direction=FORWARD,
        image=image,
        weight=filters,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        out=out,
        dtype=str(input.dtype).removeprefix("torch."),
        device=str(input.device),
        channels_last=_channels_last(input, weight, geometry),
    )


def _expanded(values: Sequence[int], dims: int) -> tuple[int, ...]:
    """aten takes one number for all dimensions."""
    return tuple(values) * dims if len(values) == 1 else tuple(values)


def _channels_last(input: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> bool:
    """Whether aten lays out the results of this call as channels_last(_3d).

    aten itself is asked where it can be (torch 2.x): fake tensors take the same answer, and compiled graphs
    assert its strides. The rule for torch 1.13 is that of aten/src/ATen/native/ConvUtils.h there.
    """
    last = _CHANNELS_LAST.get(input.dim())
    if last is None:
        return False
    if hasattr(torch._C, "_conv_determine_backend_memory_format"):
        backend = torch._C._select_conv_backend(
            input, weight, None, list(geometry.stride), list(geometry.padding), list(geometry.dilation),
            geometry.transposed, list(geometry.output_padding), geometry.groups,
        )  # fmt: skip
        answer = torch._C._conv_determine_backend_memory_format(input, weight, backend)
        return bool(answer == last)
    formats = [suggest_memory_format(tensor) for tensor in (input, weight)]
    if input.device.type == "cpu":
        # Seen on 35,000 calls: oneDNN has neither 3-d nor transposed, but for transposed bfloat16.
        has_last = input.dim() == 4 and (not geometry.transposed or input.dtype == torch.bfloat16)
    elif torch.version.hip:
        asked = os.environ.get("PYTORCH_MIOPEN_SUGGEST_NHWC") == "1"
        has_last = input.dim() == 4 and asked and cudnn_enabled() and input.dtype != torch.float64
    else:
        has_last = cudnn_enabled() and input.dtype != torch.float64
    return has_last and last in formats

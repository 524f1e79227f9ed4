"""torch's functional convolutions through a dispatcher of one's own instead of aten's convolution.

For single layers that must not reach MIOpen whatever else is switched on. `Bypassing` sends every such call inside
it here, so that a layer's own forward (padding modes, `output_size`, a weight computed on the fly) stays torch's or
the program's.
"""

from __future__ import annotations

import dataclasses
import operator
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from rocm_patch.conv import autograd
from rocm_patch.conv.call import Geometry, forward_spec, looks
from rocm_patch.conv.native import cudnn_enabled
from rocm_patch.conv.spec import DIRECTIONS, FORWARD, GRAD_INPUT, ConvSpec
from rocm_patch.fallback import Conv2dBypassConfig
from rocm_patch.overrides.layer_dispatch import dispatcher_of, is_overridden
from rocm_patch.overrides.layer_dispatch import dispatchers as dispatchers
from rocm_patch.routes import remember

_compiler = getattr(torch, "compiler", None)  # torch 2.x
_is_exporting: Callable[[], bool] = getattr(_compiler, "is_exporting", lambda: False)

# From what a call looks like to its spec in each direction; None where only aten can judge the call.
_SPECS: dict[tuple[Any, ...], dict[str, ConvSpec] | None] = {}

# Whether a transformation of torch 1.13's functorch is at work, which takes no autograd.Function.
_is_in_functorch_1: Callable[[], bool] = getattr(torch._C._functorch, "are_transforms_active", lambda: False)


def run(config: Conv2dBypassConfig, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A function's result with its convolutions served as `config` says.

    While it is traced or exported its convolutions stay aten's, as a program that is loaded elsewhere can hold no
    others. The override serves these.
    """
    if _compiler is not None and _compiler.is_compiling():
        # An export that dynamo has no part in runs the function as it is.
        if _is_exporting() or not _compiler.is_dynamo_compiling() or is_overridden(config):
            return function(*args, **kwargs)
        return _outside_of_graphs(config, function, args, kwargs)
    if _within.config is config or torch._C._get_tracing_state() or _is_in_functorch_1():
        return function(*args, **kwargs)
    return _in_mode(config, function, args, kwargs)


class _Within(threading.local):
    """What a layer's forward is served as on this thread; the methods of a layer call each other."""

    config: Conv2dBypassConfig | None = None


_within = _Within()


def _in_mode(
    config: Conv2dBypassConfig, function: Callable[..., torch.Tensor], args: Any, kwargs: Any
) -> torch.Tensor:
    before = _within.config
    _within.config = config
    try:
        with Bypassing(config):
            return function(*args, **kwargs)
    finally:
        _within.config = before


# dynamo breaks its graph here, as it does for optimizers; imports torch._dynamo on its first call only.
_outside_of_graphs: Callable[..., torch.Tensor] = getattr(torch, "_disable_dynamo", lambda function: function)(
    _in_mode
)


class Bypassing(TorchFunctionMode):
    """Inside it, calls of torch's functional convolutions are served as a config says.

    Args:
        config: how.
    """

    def __init__(self, config: Conv2dBypassConfig) -> None:
        super().__init__()
        self._config = config

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        by_us = _SERVED.get(function)
        result = None if by_us is None else by_us(self._config, *args, **kwargs)
        return function(*args, **kwargs) if result is None else result


# The functions below give None where aten's leads to the very same place, or has to say what is wrong.
def _conv(
    dims: int,
    config: Conv2dBypassConfig,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    if not _is_ours(dims, input, weight, bias):
        return None
    padded, amounts = input, padding
    steps, spread = _per_dimension(stride, dims), _per_dimension(dilation, dims)
    if padding == "valid":
        amounts = 0
    elif padding == "same" and steps == (1,) * dims and len(spread) == dims:
        totals = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
        amounts = [total // 2 for total in totals]
        if any(total % 2 for total in totals):  # an odd amount leaves one more on the right, as in aten
            padded = F.pad(input, [amount for total in reversed(totals) for amount in (0, total % 2)])
    elif isinstance(padding, str):
        return None
    geometry = Geometry(steps, _per_dimension(amounts, dims), spread, False, (0,) * dims, groups)
    return _served(config, padded, weight, bias, geometry)


def _conv_transpose(
    dims: int,
    config: Conv2dBypassConfig,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor | None:
    if not _is_ours(dims, input, weight, bias):
        return None
    steps, amounts, spread, extra = (
        _per_dimension(value, dims) for value in (stride, padding, dilation, output_padding)
    )
    return _served(config, input, weight, bias, Geometry(steps, amounts, spread, True, extra, groups))


def _convolution(
    config: Conv2dBypassConfig,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *flags: Any,
) -> torch.Tensor | None:
    """`torch.convolution` and `torch._convolution`, which take no unbatched input."""
    if not isinstance(input, torch.Tensor) or not _is_ours(input.dim() - 2, input, weight, bias):
        return None
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
    return _served(config, input, weight, bias, geometry)


_SERVED: dict[Any, Callable[..., torch.Tensor | None]] = {
    F.conv1d: partial(_conv, 1), F.conv2d: partial(_conv, 2), F.conv3d: partial(_conv, 3),
    F.conv_transpose1d: partial(_conv_transpose, 1), F.conv_transpose2d: partial(_conv_transpose, 2),
    F.conv_transpose3d: partial(_conv_transpose, 3),
    torch.convolution: _convolution, torch._convolution: _convolution,
}  # fmt: skip


def _is_ours(dims: int, input: Any, weight: Any, bias: Any) -> bool:
    """Whether these are tensors of memory on a device that is served: no proxies, fake or distributed ones."""
    return all(
        isinstance(operand, torch.Tensor)
        and operand.device.type in ("cuda", "cpu")
        and operand.layout is torch.strided
        and type(operand).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        for operand in ((input, weight) if bias is None else (input, weight, bias))
    ) and bool(weight.dim() == dims + 2)


def _per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        # One number for all dimensions; wrong lengths are for aten to judge.
        return tuple(map(operator.index, value)) * (dims if len(value) == 1 else 1)
    return (operator.index(value),) * dims


def _served(
    config: Conv2dBypassConfig,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor | None:
    if is_overridden(config, "CUDA" if input.is_cuda else "CPU"):
        return None
    half = _autocast_dtype(input.device.type)
    if half is not None:
        input, weight = _cast(input, half), _cast(weight, half)
        bias = None if bias is None else _cast(bias, half)
    unbatched = input.dim() == weight.dim() - 1
    image = input.unsqueeze(0) if unbatched else input
    by_us = _complex if image.is_complex() and weight.is_complex() else _real
    result = by_us(config, image, weight, bias, geometry)
    return result.squeeze(0) if unbatched and result is not None else result


def _real(
    config: Conv2dBypassConfig,
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor | None:
    of_bias = None if bias is None else (bias.shape, bias.dtype)
    key = (geometry, of_bias, *looks(image), *looks(weight), cudnn_enabled())
    try:
        specs = _SPECS[key]
    except KeyError:
        spec = forward_spec(image, weight, bias, geometry)
        known = None if spec is None else {d: dataclasses.replace(spec, direction=d) for d in DIRECTIONS}
        specs = remember(_SPECS, key, known)
    if specs is None:
        return None
    serve = dispatcher_of(config).serve

    def compute(direction: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        spec = specs[direction]
        if first.shape[0] != spec.batch:
            spec = dataclasses.replace(spec, image=(first.shape[0], *spec.image[1:]))
        return serve(spec, first, second)

    result = autograd.convolution(compute, image, weight, GRAD_INPUT if geometry.transposed else FORWARD)
    return result if bias is None else result + bias.view(-1, *[1] * (image.dim() - 2))


def _complex(
    config: Conv2dBypassConfig,
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor | None:
    """Three real convolutions, as aten does it: with a = x_r w_r, b = x_i w_i and c = (x_r + x_i)(w_r + w_i)."""
    if bias is not None and bias.dtype != image.dtype:
        return None
    parts = [
        _real(config, x, w, None, geometry)
        for x, w in (
            (image.real, weight.real),
            (image.imag, weight.imag),
            (image.real + image.imag, weight.real + weight.imag),
        )
    ]
    a, b, c = parts
    if a is None or b is None or c is None:
        return None
    result = torch.complex(a - b, c - a - b)
    return result if bias is None else result + bias.view(-1, *[1] * (image.dim() - 2))


def _cast(tensor: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """What autocast makes of an operand."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(half)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast runs convolutions on a device in; None where it is off."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cuda":  # torch before 2.4
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None

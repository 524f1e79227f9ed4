"""`F.conv1d` to `F.conv_transpose3d` through a dispatcher of one's own instead of aten's convolution.

For single layers that must not reach MIOpen whatever else is switched on. `Bypassing` sends every such call inside
it here, so that a layer's own forward (padding modes, `output_size`, a weight computed on the fly) stays torch's or
the program's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from rocm_patch import settings
from rocm_patch.conv import autograd
from rocm_patch.conv.call import Geometry, forward_spec
from rocm_patch.conv.spec import DIRECTIONS
from rocm_patch.dispatch import Dispatcher
from rocm_patch.fallback import Conv2dBypassConfig, meaning
from rocm_patch.overrides import guarding
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.routes import Routes
from rocm_patch.trust.choose import Chooser

# One dispatcher per way of being served, shared by all layers that ask for the same.
_DISPATCHERS: dict[tuple[Any, ...], Dispatcher] = {}


def dispatchers() -> list[Dispatcher]:
    """The dispatchers that single layers have used."""
    return list(_DISPATCHERS.values())


def run(config: Conv2dBypassConfig, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A function's result with its convolutions served as `config` says.

    While it is traced or transformed (torch.jit.trace, torch.func) its convolutions stay aten's: a trace can record,
    and a transformation can transform, aten's operators only. The override serves these.
    """
    if _is_compiling():
        if _override_serves(config):
            return function(*args, **kwargs)
        return _outside_of_graphs(config, function, args, kwargs)
    if torch._C._get_tracing_state() or _is_transformed():
        return function(*args, **kwargs)
    with Bypassing(config):
        return function(*args, **kwargs)


def _in_mode(
    config: Conv2dBypassConfig, function: Callable[..., torch.Tensor], args: Any, kwargs: Any
) -> torch.Tensor:
    with Bypassing(config):
        return function(*args, **kwargs)


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
        served = _SERVED.get(function)
        if served is None:
            return function(*args, **(kwargs or {}))
        return served(self._config, function, *args, **(kwargs or {}))


def _conv(
    config: Conv2dBypassConfig,
    function: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    dims = weight.dim() - 2
    padded, amounts = input, padding
    steps, spread = _per_dimension(stride, dims), _per_dimension(dilation, dims)
    if padding == "valid":
        amounts = 0
    elif padding == "same" and steps == (1,) * dims:  # an odd amount leaves one more on the right, as in aten
        totals = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
        amounts = [total // 2 for total in totals]
        if any(total % 2 for total in totals):
            padded = F.pad(input, [amount for total in reversed(totals) for amount in (0, total % 2)])
    elif isinstance(padding, str):
        return function(input, weight, bias, stride, padding, dilation, groups)  # an error, in aten's words
    geometry = Geometry(steps, _per_dimension(amounts, dims), spread, False, (0,) * dims, groups)
    result = _served(config, padded, weight, bias, geometry)
    if result is not None:
        return result
    return function(input, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(
    config: Conv2dBypassConfig,
    function: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor:
    dims = weight.dim() - 2
    steps, amounts, spread, extra = (
        _per_dimension(value, dims) for value in (stride, padding, dilation, output_padding)
    )
    result = _served(config, input, weight, bias, Geometry(steps, amounts, spread, True, extra, groups))
    if result is not None:
        return result
    return function(input, weight, bias, stride, padding, output_padding, groups, dilation)


_SERVED: dict[Any, Callable[..., torch.Tensor]] = {
    F.conv1d: _conv, F.conv2d: _conv, F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose, F.conv_transpose2d: _conv_transpose, F.conv_transpose3d: _conv_transpose,
}  # fmt: skip


def _per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _served(
    config: Conv2dBypassConfig,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor | None:
    """The result, or None where aten's function leads to the very same place, or has to say what is wrong."""
    if _override_serves(config, "CUDA" if input.is_cuda else "CPU"):
        return None
    half = _autocast_dtype(input)
    if half is not None:
        input, weight = input.to(half), weight.to(half)
        bias = None if bias is None else bias.to(half)
    unbatched = input.dim() == weight.dim() - 1
    image = input.unsqueeze(0) if unbatched else input
    if image.is_complex() and weight.is_complex():
        result = _complex(config, image, weight, bias, geometry)
    else:
        result = _real(config, image, weight, bias, geometry)
    return result.squeeze(0) if unbatched and result is not None else result


def _real(
    config: Conv2dBypassConfig,
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor | None:
    spec = forward_spec(image, weight, bias, geometry)
    if spec is None:
        return None
    specs = {direction: dataclasses.replace(spec, direction=direction) for direction in DIRECTIONS}
    serve = _dispatcher(config).serve

    def compute(direction: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return serve(specs[direction], first, second)

    result = autograd.convolution(compute, image, weight, spec.direction)
    return result if bias is None else result + bias.view(-1, *[1] * len(spec.kernel))


def _complex(
    config: Conv2dBypassConfig,
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor | None:
    """Three real convolutions, as aten does it: with a = x_r w_r, b = x_i w_i and c = (x_r + x_i)(w_r + w_i)."""
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


def _chooser(config: Conv2dBypassConfig) -> Chooser:
    policy, preferred, selective = meaning(config.strategy)
    policy = policy or "bypass"
    if policy == "guarded" and not config.gpu_unfold_fallback:
        policy = "native"
    return Chooser(policy, preferred, config.size_threshold if selective else None, exact=config.exact)


def _dispatcher(config: Conv2dBypassConfig) -> Dispatcher:
    chooser = _chooser(config)
    asked = settings.from_environ()
    key = (chooser.policy, chooser.preferred, chooser.native_up_to, chooser.exact, asked.workspace)
    found = _DISPATCHERS.get(key)
    if found is None:
        guard = guarding.guard_for(chooser, asked)
        found = _DISPATCHERS.setdefault(key, Dispatcher(Routes(chooser, guard, workspace=asked.workspace)))
    return found


def _override_serves(config: Conv2dBypassConfig, key: str | None = None) -> bool:
    """Whether the override serves all that aten gets just as the config says, on one device's key or on any."""
    wanted = _chooser(config)
    return any(
        dispatcher.routes.chooser == wanted for name, dispatcher in ACTIVE.items() if key is None or name == key
    )


def _is_compiling() -> bool:
    compiler = getattr(torch, "compiler", None)  # torch 2.x
    return compiler is not None and bool(compiler.is_compiling())


def _is_transformed() -> bool:
    """Whether this call runs inside vmap, grad or another transformation of torch.func (torch 2.x)."""
    stack_of = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return stack_of is not None and stack_of() is not None


def _autocast_dtype(input: torch.Tensor) -> torch.dtype | None:
    """The type that autocast runs convolutions of this input in, None when it leaves them alone."""
    if not input.is_floating_point() or input.dtype == torch.float64:
        return None
    if input.is_cuda:
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    try:
        enabled = torch.is_autocast_enabled("cpu")
    except TypeError:  # torch before 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_dtype("cpu") if enabled else None

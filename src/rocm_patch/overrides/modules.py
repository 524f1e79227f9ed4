"""SafeConv2d, and turning a model's Conv2d layers into it and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rocm_patch import settings
from rocm_patch.conv import autograd
from rocm_patch.conv.call import Geometry, forward_spec
from rocm_patch.conv.spec import DIRECTIONS
from rocm_patch.dispatch import Dispatcher
from rocm_patch.errors import NotAModuleError
from rocm_patch.fallback import Conv2dBypassConfig, meaning
from rocm_patch.overrides import guarding
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.overrides.ledger import LEDGER, Entry, replace
from rocm_patch.routes import Routes
from rocm_patch.settings import LOGGER
from rocm_patch.trust.choose import Chooser

PATCH_NN = "torch_nn"


# One dispatcher per way of being served, shared by all layers that ask for the same.
_DISPATCHERS: dict[tuple[Any, ...], Dispatcher] = {}
_config = Conv2dBypassConfig()


def get_config() -> Conv2dBypassConfig:
    """The configuration of layers that were given none."""
    return _config


def set_config(config: Conv2dBypassConfig) -> None:
    """Set the configuration of layers that were given none."""
    global _config
    _config = config


def dispatchers() -> list[Dispatcher]:
    """The dispatchers that SafeConv2d layers have used."""
    return list(_DISPATCHERS.values())


def _chooser(config: Conv2dBypassConfig) -> Chooser:
    policy, preferred, selective = meaning(config.strategy)
    policy = policy or "bypass"
    if policy == "guarded" and not config.gpu_unfold_fallback:
        policy = "native"
    return Chooser(policy, preferred, config.size_threshold if selective else None)


def _dispatcher(config: Conv2dBypassConfig) -> Dispatcher:
    chooser = _chooser(config)
    key = (chooser.policy, chooser.preferred, chooser.native_up_to)
    found = _DISPATCHERS.get(key)
    if found is None:
        guard = guarding.guard_for(chooser, settings.from_environ())
        found = _DISPATCHERS.setdefault(key, Dispatcher(Routes(chooser, guard)))
    return found


class _ServedAsSafe(type):
    """While patch_torch_nn() is in force every Conv2d layer is served as a SafeConv2d, and counts as one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls is SafeConv2d and LEDGER.applied(PATCH_NN) is not None:
            return isinstance(instance, nn.Conv2d)
        return super().__instancecheck__(instance)


class SafeConv2d(nn.Conv2d, metaclass=_ServedAsSafe):
    """`torch.nn.Conv2d` that does not go through MIOpen, on any device, whatever else is switched on.

    Takes the arguments of `torch.nn.Conv2d`, and:
        config: a `Conv2dBypassConfig`; None follows `get_config()`.

    Input (N, C, H, W) or (C, H, W); parameters, state_dict and results are those of `torch.nn.Conv2d`.
    """

    config: Conv2dBypassConfig | None = None

    def __init__(self, *args: Any, config: Conv2dBypassConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if config is not None:
            self.config = config

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _bypassed(self, input, weight, bias, self.config or get_config())


# Taken before anything can replace it.
_ATEN_CONV_FORWARD: Callable[..., torch.Tensor] = nn.Conv2d._conv_forward


def _bypassed(
    layer: nn.Conv2d,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: Conv2dBypassConfig,
) -> torch.Tensor:
    """What `layer._conv_forward` computes, through a dispatcher of its own instead of aten's."""
    override = ACTIVE.get("CUDA" if input.is_cuda else "CPU")
    if override is not None and override.routes.chooser == _chooser(config):
        return _ATEN_CONV_FORWARD(layer, input, weight, bias)  # aten leads to the very same place
    if torch._C._get_tracing_state() or _is_transformed():
        # A trace can record, and torch.func can transform, aten's operators only; the override serves them.
        return _ATEN_CONV_FORWARD(layer, input, weight, bias)
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        # nn.Conv2d keeps the amounts for F.pad, `same` resolved.
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0, 0)
    elif padding == "valid":
        padding = (0, 0)
    elif padding == "same":  # an odd amount leaves one more on the right, as in aten
        amounts = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(amount % 2 for amount in amounts):
            input = F.pad(input, [0, amounts[1] % 2, 0, amounts[0] % 2])
        padding = tuple(amount // 2 for amount in amounts)
    half = _autocast_dtype(input)
    if half is not None:
        input, weight = input.to(half), weight.to(half)
        bias = None if bias is None else bias.to(half)
    image = input.unsqueeze(0) if input.dim() == 3 else input
    geometry = Geometry(layer.stride, tuple(padding), layer.dilation, False, (0, 0), layer.groups)
    spec = forward_spec(image, weight, bias, geometry)
    if spec is None:  # an error, or nothing to do: aten's word on it
        return F.conv2d(input, weight, bias, layer.stride, tuple(padding), layer.dilation, layer.groups)
    specs = {direction: dataclasses.replace(spec, direction=direction) for direction in DIRECTIONS}
    serve = _dispatcher(config).serve
    result = autograd.convolution(lambda direction, *operands: serve(specs[direction], *operands), image, weight)
    if bias is not None:
        result = result + bias.view(-1, 1, 1)
    return result.squeeze(0) if input.dim() == 3 else result


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


@dataclass(frozen=True)
class ModelReport:
    """Which convolution layers of a model are SafeConv2d, and which are not and why. Names as in the model."""

    replaced: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers are SafeConv2d, {len(self.left)} convolution layers were left"]
        lines += [f"  {name or '(the model)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def model_report(model: nn.Module) -> ModelReport:
    """What patch_model() replaced in a model and what it left, read off the model itself."""
    _check_module(model)
    replaced, left = [], {}
    for name, module in model.named_modules():
        if type(module) is SafeConv2d:
            replaced.append(name)
        elif isinstance(module, _ConvNd):
            left[name] = _why_left(module)
        elif isinstance(module, torch.jit.ScriptModule):
            left[name] = "compiled by TorchScript"
    return ModelReport(tuple(replaced), left)


def _why_left(module: _ConvNd) -> str:
    kind: Any = type(module)
    if kind is nn.Conv2d:
        return "not patched"
    if not isinstance(module, nn.Conv2d):
        return f"{kind.__name__} is not a Conv2d"
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} has a forward of its own"
    return f"{kind.__name__} is a subclass of Conv2d, and would lose its class"


_HINT_LEFT = "enable_miopen_bypass() serves every convolution, whatever module it is called from"


def patch_model(model: nn.Module, config: Conv2dBypassConfig | None = None, recursive: bool = True) -> nn.Module:
    """Turn a model's Conv2d layers into SafeConv2d, in place.

    The layers stay the same objects and only change their class, so parameters, optimizers made earlier,
    hooks, names, mode, dtype, device and state_dict keys are untouched.

    Args:
        model: any module; itself a Conv2d, it is turned too.
        config: how the layers are served; None follows `get_config()`.
        recursive: False turns the model's direct children only.

    Returns:
        The model, as the original does. `model_report(model)` says what was replaced, what was left and why.

    Raises:
        NotAModuleError: `model` is not an `nn.Module`.
    """
    _check_module(model)
    modules = model.modules() if recursive else [model, *model.children()]
    for module in list(modules):
        if type(module) is nn.Conv2d:
            module.__class__ = SafeConv2d
            module.__dict__["_was_conv2d"] = True
        if type(module) is SafeConv2d and config is not None:
            module.config = config
    report = model_report(model)
    LOGGER.info("patch_model: %s", report)
    own = [name or "(the model)" for name, why in report.left.items() if "of its own" in why]
    if own:
        LOGGER.warning(
            "patch_model left %s: a subclass of Conv2d with a forward of its own\nhint: %s",
            ", ".join(own),
            _HINT_LEFT,
        )
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Turn the layers that patch_model() turned back into Conv2d, in place; returns the model.

    Layers that were made as SafeConv2d stay what they are.

    Raises:
        NotAModuleError: `model` is not an `nn.Module`.
    """
    _check_module(model)
    for module in model.modules():
        if type(module) is SafeConv2d and module.__dict__.pop("_was_conv2d", False):
            module.__dict__.pop("config", None)
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            "pass the model itself: patch_model(model), before or after model.cuda()",
        )


def patch_torch_nn(config: Conv2dBypassConfig | None = None) -> Entry:
    """Serve every `torch.nn.Conv2d` layer as SafeConv2d, those that exist already too.

    `torch.nn.Conv2d` stays the class it is, so pickles, type checks and subclasses keep working; layers with a
    forward of their own are not reached.
    """
    with LEDGER.lock:
        before = LEDGER.already(PATCH_NN, config)
        if before is not None:
            return before

        def rocm_patch_conv_forward(
            self: nn.Conv2d, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            return _bypassed(self, input, weight, bias, config or get_config())

        restore = replace(nn.Conv2d, "_conv_forward", rocm_patch_conv_forward)
        return LEDGER.record(PATCH_NN, config, Entry(True, "nn.Conv2d layers are served as SafeConv2d"), restore)


def restore_torch_nn() -> bool:
    """Take patch_torch_nn() back; False if it was not in force."""
    return LEDGER.revert(PATCH_NN)

"""Turning the convolution layers of a model into Safe ones, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rocm_patch.errors import NotAModuleError
from rocm_patch.fallback import Conv2dBypassConfig
from rocm_patch.overrides.layer_classes import forget, is_served, plain_class, served_class
from rocm_patch.overrides.layer_dispatch import PATCHED
from rocm_patch.overrides.modules import SAFE
from rocm_patch.settings import LOGGER

# Classes whose layers could not be turned, and why.
_UNTURNED: dict[type, str] = {}


@dataclass(frozen=True)
class ModelReport:
    """Which convolution layers of a model are Safe ones, and which are not and why; names as in the model."""

    replaced: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers are Safe ones, {len(self.left)} convolution layers were left"]
        lines += [f"  {name or '(the model)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def model_report(model: nn.Module) -> ModelReport:
    """What patch_model() replaced in a model and what it left, read off the model itself."""
    _check_module(model)
    replaced, left = [], {}
    for name, module in model.named_modules():
        if is_served(type(module)):
            replaced.append(name)
        elif isinstance(module, _ConvNd):
            left[name] = _why_left(module)
        elif _is_compiled_convolution(module):
            left[name] = "compiled by TorchScript"
    return ModelReport(tuple(replaced), left)


def _why_left(module: _ConvNd) -> str:
    if not isinstance(module, tuple(SAFE)):
        return f"{type(module).__name__} is none of torch.nn's convolutions"
    return _UNTURNED.get(type(module), "not patched")


def _is_compiled_convolution(module: nn.Module) -> bool:
    """Whether TorchScript has compiled it, from a convolution layer or with a convolution in its own code."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    if any(module.original_name.endswith(kind.__name__) for kind in SAFE):
        return True
    return "aten::conv" in str(module.graph) or "aten::_conv" in str(module.graph)


def patch_model(model: nn.Module, config: Conv2dBypassConfig | None = None, recursive: bool = True) -> nn.Module:
    """Turn a model's convolution layers into Safe ones, in place.

    The layers stay the same objects and only change their class, so parameters, optimizers made earlier, hooks,
    names, mode, dtype, device and state_dict keys are untouched. Subclasses stay instances of their class: their own
    forward runs, and the convolutions that it calls are served. Lazy layers become Safe ones when they learn their
    shape. A patched model is pickled as the plain one.

    Args:
        model: any module; itself a convolution, it is turned too.
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
        if isinstance(module, tuple(SAFE)) and not is_served(type(module)):
            _turn(module)
        if is_served(type(module)) and config is not None:
            _configure(module, config)
    LOGGER.info("patch_model: %s", model_report(model))
    return model


def _turn(module: nn.Module) -> None:
    kind = type(module)
    try:
        module.__class__ = served_class(kind)
    except TypeError as error:
        _UNTURNED[kind] = f"{kind.__name__} cannot have a subclass that is served: {error}"
        return
    module.__dict__[PATCHED] = None


def _configure(module: nn.Module, config: Conv2dBypassConfig) -> None:
    if isinstance(getattr(module, "config", None), (Conv2dBypassConfig, type(None))):
        setattr(module, "config", config)  # noqa: B010  (for nn.Module an attribute is a tensor or a module)
    else:  # the program's own
        module.__dict__[PATCHED] = config


def unpatch_model(model: nn.Module) -> nn.Module:
    """Turn the layers that patch_model() turned back into what they were, in place; returns the model.

    Layers that were made as Safe ones stay what they are.

    Raises:
        NotAModuleError: `model` is not an `nn.Module`.
    """
    _check_module(model)
    for module in model.modules():
        if PATCHED in module.__dict__:
            forget(module)
            module.__class__ = plain_class(type(module))
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            "pass the model itself: patch_model(model), before or after model.cuda()",
        )

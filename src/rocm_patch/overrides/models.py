"""Turning the convolution layers of a model into Safe ones, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from rocm_patch.errors import NotAModuleError
from rocm_patch.fallback import Conv2dBypassConfig
from rocm_patch.overrides import bypassed
from rocm_patch.overrides.modules import PATCHED, PLAIN, SAFE, config_of, copied, pickled
from rocm_patch.settings import LOGGER

# From a subclass of one of torch.nn's convolutions to the class that its patched layers have, and back.
_MADE: dict[type, type] = {}
_ORIGINAL: dict[type, type] = {}


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
        if _is_safe(type(module)):
            replaced.append(name)
        elif isinstance(module, _ConvNd):
            left[name] = _why_left(module)
        elif isinstance(module, torch.jit.ScriptModule):
            left[name] = "compiled by TorchScript"
    return ModelReport(tuple(replaced), left)


def _why_left(module: _ConvNd) -> str:
    if isinstance(module, tuple(SAFE)):
        return "not patched"
    return f"{type(module).__name__} is none of torch.nn's convolutions"


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
        if isinstance(module, tuple(SAFE)) and not _is_safe(type(module)):
            module.__class__ = _patched_class(type(module))
            module.__dict__[PATCHED] = True
        if _is_safe(type(module)) and config is not None:
            setattr(module, "config", config)  # noqa: B010  (for nn.Module an attribute is a tensor or a module)
    LOGGER.info("patch_model: %s", model_report(model))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Turn the layers that patch_model() turned back into what they were, in place; returns the model.

    Layers that were made as Safe ones stay what they are.

    Raises:
        NotAModuleError: `model` is not an `nn.Module`.
    """
    _check_module(model)
    for module in model.modules():
        if module.__dict__.pop(PATCHED, False):
            module.__dict__.pop("config", None)
            module.__class__ = plain_class(type(module))
    return model


def _is_safe(kind: type) -> bool:
    return any(base in PLAIN or base in _ORIGINAL for base in kind.__mro__)


def _patched_class(kind: type) -> type:
    if kind in SAFE:
        return SAFE[kind]  # type: ignore[no-any-return]
    if _is_parametrized(kind):
        return _rebuilt(kind, _patched_class(kind.__bases__[0]))
    if kind not in _MADE:
        _MADE[kind] = _subclass_of(kind)
        _ORIGINAL[_MADE[kind]] = kind
    return _MADE[kind]


def plain_class(kind: type) -> type:
    """The class that a patched layer had."""
    if kind in PLAIN:
        return PLAIN[kind]  # type: ignore[no-any-return]
    if _is_parametrized(kind):
        return _rebuilt(kind, plain_class(kind.__bases__[0]))
    return _ORIGINAL[kind]


def _is_parametrized(kind: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class for one layer, on top of its only base."""
    made_by = vars(kind).get("__getstate__")
    return kind.__name__.startswith("Parametrized") and getattr(made_by, "__module__", "") == parametrize.__name__


def _rebuilt(kind: type, base: type) -> type:
    """A class that parametrize made, on another base: removing the parametrization goes back to its base."""
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(base)(kind.__name__, (base,), body)


def _subclass_of(kind: Any) -> type:
    """A subclass whose forward is the class's own, with the convolutions in it served."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return bypassed.run(config_of(self), kind.forward, self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return pickled(self, kind.__reduce_ex__(self, protocol))

    body: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "config": None,
    }
    if not hasattr(kind, "__deepcopy__"):
        body["__deepcopy__"] = copied
    if getattr(kind, "cls_to_become", None) is not None:  # lazy
        body["cls_to_become"] = _patched_class(kind.cls_to_become)
    made: type = type(kind)(f"Safe{kind.__name__}", (kind,), body)
    return made


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            "pass the model itself: patch_model(model), before or after model.cuda()",
        )

"""The Safe layers: torch.nn's six convolutions, served without MIOpen whatever else is switched on."""

# No `from __future__ import annotations`: TorchScript reads the annotations of the methods below.

import copy
import copyreg
import types
from typing import Any, Callable, List, Optional  # noqa: UP035

import torch
from torch import nn

from rocm_patch.fallback import Conv2dBypassConfig
from rocm_patch.overrides import bypassed
from rocm_patch.overrides.ledger import LEDGER, Entry, replace

PATCH_NN = "torch_nn"
# Marks a layer that patch_model() has turned.
PATCHED = "_patched_by_rocm_patch"

# TorchScript drops the branch behind it; it reads no `type: ignore` in the functions that it compiles.
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined, unused-ignore]
_config = Conv2dBypassConfig()


def get_config() -> Conv2dBypassConfig:
    """The configuration of layers that were given none."""
    return _config


def set_config(config: Conv2dBypassConfig) -> None:
    """Set the configuration of layers that were given none."""
    global _config
    _config = config


def config_of(layer: nn.Module) -> Conv2dBypassConfig:
    """A layer's own configuration, or that of patch_torch_nn(), or the general one."""
    return getattr(layer, "config", None) or _of_torch_nn or _config


class _CountsAsSafe(type):
    """A layer that is served as a Safe one counts as one: after patch_torch_nn(), or turned by patch_model()."""

    def __instancecheck__(cls, instance: Any) -> bool:
        plain = PLAIN.get(cls)
        if plain is None or super().__instancecheck__(instance):
            return super().__instancecheck__(instance)
        return isinstance(instance, plain) and (
            LEDGER.applied(PATCH_NN) is not None or PATCHED in getattr(instance, "__dict__", {})
        )


class SafeLayer:
    """What the six have in common: a configuration, and how they are copied and pickled."""

    config: Optional[Conv2dBypassConfig] = None  # noqa: UP045

    def __init__(self, *args: Any, config: Optional[Conv2dBypassConfig] = None, **kwargs: Any) -> None:  # noqa: UP045
        super().__init__(*args, **kwargs)
        if config is not None:
            self.config = config

    def __deepcopy__(self, memo: Any) -> Any:
        return copied(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return pickled(self, super().__reduce_ex__(protocol))


def copied(layer: Any, memo: Any) -> Any:
    """A deep copy of the same class; pickling would give the plain one."""
    replica = layer.__new__(type(layer))
    memo[id(layer)] = replica
    replica.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return replica


def pickled(layer: Any, reduced: Any) -> Any:
    """A layer that patch_model() has turned is pickled as what it was, so that it loads where we are not."""
    if PATCHED not in layer.__dict__:
        return reduced
    from rocm_patch.overrides.models import plain_class

    own = {name: value for name, value in reduced[2].items() if name not in (PATCHED, "config")}
    # The usual copyreg.__newobj__ insists on the layer's own class.
    return copyreg._reconstructor, (plain_class(type(layer)), object, None), own  # type: ignore[attr-defined]


def _conv_forward(
    self: Any, input: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]  # noqa: UP045
) -> torch.Tensor:  # fmt: skip
    if _is_scripting():
        natively: torch.Tensor = self._native_conv_forward(input, weight, bias)
        return natively
    return bypassed.run(config_of(self), self._native_conv_forward, input, weight, bias)


def _transposed_forward(
    self: Any, input: torch.Tensor, output_size: Optional[List[int]] = None  # noqa: UP006, UP045
) -> torch.Tensor:  # fmt: skip
    if _is_scripting():
        natively: torch.Tensor = self._native_forward(input, output_size)
        return natively
    return bypassed.run(config_of(self), self._native_forward, input, output_size)


def _natively(function: Any, name: str) -> Any:
    """A method of torch's under another name: TorchScript compiles a method under its function's name."""
    code, closure = function.__code__, function.__closure__
    renamed = types.FunctionType(code, function.__globals__, name, function.__defaults__, closure)
    renamed.__annotations__ = function.__annotations__
    return renamed


class SafeConv1d(SafeLayer, nn.Conv1d, metaclass=_CountsAsSafe):
    """`torch.nn.Conv1d` that does not go through MIOpen; see `SafeConv2d`."""

    _native_conv_forward = _natively(nn.Conv1d._conv_forward, "_native_conv_forward")
    _conv_forward = _conv_forward


class SafeConv2d(SafeLayer, nn.Conv2d, metaclass=_CountsAsSafe):
    """`torch.nn.Conv2d` that does not go through MIOpen, on any device, whatever else is switched on.

    Takes the arguments of `torch.nn.Conv2d`, and:
        config: a `Conv2dBypassConfig`; None follows `get_config()`.

    Input (N, C, H, W) or (C, H, W); parameters, state_dict, results and errors are those of `torch.nn.Conv2d`.
    """

    _native_conv_forward = _natively(nn.Conv2d._conv_forward, "_native_conv_forward")
    _conv_forward = _conv_forward


class SafeConv3d(SafeLayer, nn.Conv3d, metaclass=_CountsAsSafe):
    """`torch.nn.Conv3d` that does not go through MIOpen; see `SafeConv2d`."""

    _native_conv_forward = _natively(nn.Conv3d._conv_forward, "_native_conv_forward")
    _conv_forward = _conv_forward


class SafeConvTranspose1d(SafeLayer, nn.ConvTranspose1d, metaclass=_CountsAsSafe):
    """`torch.nn.ConvTranspose1d` that does not go through MIOpen; see `SafeConv2d`."""

    _native_forward = _natively(nn.ConvTranspose1d.forward, "_native_forward")
    forward = _transposed_forward


class SafeConvTranspose2d(SafeLayer, nn.ConvTranspose2d, metaclass=_CountsAsSafe):
    """`torch.nn.ConvTranspose2d` that does not go through MIOpen; see `SafeConv2d`."""

    _native_forward = _natively(nn.ConvTranspose2d.forward, "_native_forward")
    forward = _transposed_forward


class SafeConvTranspose3d(SafeLayer, nn.ConvTranspose3d, metaclass=_CountsAsSafe):
    """`torch.nn.ConvTranspose3d` that does not go through MIOpen; see `SafeConv2d`."""

    _native_forward = _natively(nn.ConvTranspose3d.forward, "_native_forward")
    forward = _transposed_forward


PLAIN: dict[Any, Any] = {
    SafeConv1d: nn.Conv1d, SafeConv2d: nn.Conv2d, SafeConv3d: nn.Conv3d,
    SafeConvTranspose1d: nn.ConvTranspose1d, SafeConvTranspose2d: nn.ConvTranspose2d,
    SafeConvTranspose3d: nn.ConvTranspose3d,
}  # fmt: skip
SAFE: dict[Any, Any] = {plain: safe for safe, plain in PLAIN.items()}

_of_torch_nn: Optional[Conv2dBypassConfig] = None  # noqa: UP045


def patch_torch_nn(config: Optional[Conv2dBypassConfig] = None) -> Entry:  # noqa: UP045
    """Serve every convolution layer of torch.nn as a Safe one, those that exist already too.

    The classes stay what they are, so pickles, type checks and subclasses keep working; what a subclass computes in
    a forward of its own is not reached.
    """
    global _of_torch_nn
    with LEDGER.lock:
        before = LEDGER.already(PATCH_NN, config)
        if before is not None:
            return before
        undo: list[Callable[[], None]] = []
        for plain, safe in SAFE.items():
            method = "forward" if issubclass(plain, nn.modules.conv._ConvTransposeNd) else "_conv_forward"
            native = "_native" + (method if method.startswith("_") else f"_{method}")
            undo.append(replace(plain, native, vars(safe)[native]))
            undo.append(replace(plain, method, vars(safe)[method]))
        _of_torch_nn = config

        def forget() -> None:
            global _of_torch_nn
            _of_torch_nn = None

        why = "torch.nn's convolution layers are served as Safe ones"
        return LEDGER.record(PATCH_NN, config, Entry(True, why), forget, *undo)


def restore_torch_nn() -> bool:
    """Take patch_torch_nn() back; False if it was not in force."""
    return LEDGER.revert(PATCH_NN)

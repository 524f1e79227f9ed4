"""The Safe layers: torch.nn's six convolutions, served without MIOpen whatever else is switched on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rocm_patch.fallback import Conv2dBypassConfig
from rocm_patch.overrides.layer_classes import PLAIN, ServedLayer, enter, serving
from rocm_patch.overrides.layer_dispatch import (
    PATCHED,
    set_config_of_torch_nn,
)
from rocm_patch.overrides.layer_dispatch import get_config as get_config
from rocm_patch.overrides.layer_dispatch import set_config as set_config
from rocm_patch.overrides.ledger import LEDGER, Entry, replace

PATCH_NN = "torch_nn"


class _CountsAsSafe(type):
    """A layer that is served as a Safe one counts as one: after patch_torch_nn(), or turned by patch_model()."""

    def __instancecheck__(cls, instance: Any) -> bool:
        plain = PLAIN.get(cls)
        if plain is None or super().__instancecheck__(instance):
            return super().__instancecheck__(instance)
        return isinstance(instance, plain) and (
            LEDGER.applied(PATCH_NN) is not None or PATCHED in getattr(instance, "__dict__", {})
        )


class _SafeLayer(ServedLayer):
    """What the six have in common: a configuration."""

    config = None

    def __init__(self, *args: Any, config: Conv2dBypassConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if config is not None:
            setattr(self, "config", config)  # noqa: B010  (an annotation would hide torch.nn's from TorchScript)


class SafeConv1d(_SafeLayer, nn.Conv1d, metaclass=_CountsAsSafe):
    """`torch.nn.Conv1d` that does not go through MIOpen; see `SafeConv2d`."""

    _conv_forward = serving(nn.Conv1d._conv_forward)


class SafeConv2d(_SafeLayer, nn.Conv2d, metaclass=_CountsAsSafe):
    """`torch.nn.Conv2d` that does not go through MIOpen, on any device, whatever else is switched on.

    Takes the arguments of `torch.nn.Conv2d`, and:
        config: a `Conv2dBypassConfig`; None follows `get_config()`.

    Input (N, C, H, W) or (C, H, W); parameters, state_dict, results and errors are those of `torch.nn.Conv2d`.
    """

    _conv_forward = serving(nn.Conv2d._conv_forward)


class SafeConv3d(_SafeLayer, nn.Conv3d, metaclass=_CountsAsSafe):
    """`torch.nn.Conv3d` that does not go through MIOpen; see `SafeConv2d`."""

    _conv_forward = serving(nn.Conv3d._conv_forward)


class SafeConvTranspose1d(_SafeLayer, nn.ConvTranspose1d, metaclass=_CountsAsSafe):
    """`torch.nn.ConvTranspose1d` that does not go through MIOpen; see `SafeConv2d`."""

    forward = serving(nn.ConvTranspose1d.forward)


class SafeConvTranspose2d(_SafeLayer, nn.ConvTranspose2d, metaclass=_CountsAsSafe):
    """`torch.nn.ConvTranspose2d` that does not go through MIOpen; see `SafeConv2d`."""

    forward = serving(nn.ConvTranspose2d.forward)


class SafeConvTranspose3d(_SafeLayer, nn.ConvTranspose3d, metaclass=_CountsAsSafe):
    """`torch.nn.ConvTranspose3d` that does not go through MIOpen; see `SafeConv2d`."""

    forward = serving(nn.ConvTranspose3d.forward)


# The six, by the plain class.
SAFE: dict[Any, Any] = {
    nn.Conv1d: SafeConv1d, nn.Conv2d: SafeConv2d, nn.Conv3d: SafeConv3d,
    nn.ConvTranspose1d: SafeConvTranspose1d, nn.ConvTranspose2d: SafeConvTranspose2d,
    nn.ConvTranspose3d: SafeConvTranspose3d,
}  # fmt: skip
for _plain, _safe in SAFE.items():
    enter(_plain, _safe)


def patch_torch_nn(config: Conv2dBypassConfig | None = None) -> Entry:
    """Serve every convolution layer of torch.nn as a Safe one, those that exist already too.

    The classes stay what they are, so pickles, type checks and subclasses keep working; what a subclass computes in
    a forward of its own is not reached. What torch.compile has compiled is compiled anew.
    """
    with LEDGER.lock:
        before = LEDGER.already(PATCH_NN, config)
        if before is not None:
            return before
        undo: list[Callable[[], None]] = [_forget_compiled]
        for plain, safe in SAFE.items():
            method = "forward" if issubclass(plain, nn.modules.conv._ConvTransposeNd) else "_conv_forward"
            undo.append(replace(plain, method, vars(safe)[method]))
        set_config_of_torch_nn(config)
        _forget_compiled()
        undo.append(lambda: set_config_of_torch_nn(None))
        return LEDGER.record(
            PATCH_NN, config, Entry(True, "torch.nn's convolution layers are served as Safe ones"), *undo
        )


def restore_torch_nn() -> bool:
    """Take patch_torch_nn() back; False if it was not in force."""
    return LEDGER.revert(PATCH_NN)


def _forget_compiled() -> None:
    """dynamo takes it that the methods of torch.nn's classes stay what they are."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()

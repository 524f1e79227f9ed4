"""Puts the dispatcher's pair in the place of aten's convolution kernels for one device key.

Every forward route of PyTorch ends in `aten::_convolution` (`nn.ConvNd`, `F.convNd`, autocast, traced and
compiled graphs), every backward in `aten::convolution_backward`. Only the backend key is taken: autograd and
autocast stay aten's, so nothing above needs to know.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from rocm_patch.dispatch import Dispatcher
from rocm_patch.machine.backend import Activation
from rocm_patch.overrides import cudnn_flag, guarding, miopen_operators
from rocm_patch.overrides.ledger import LEDGER, Entry
from rocm_patch.routes import Routes
from rocm_patch.settings import Settings
from rocm_patch.trust import fault
from rocm_patch.trust.choose import Chooser
from rocm_patch.tuning import Tuner

PATCH = "miopen_bypass"

# The dispatchers in force, by key; read by reports and by SafeConv2d.
ACTIVE: dict[str, Dispatcher] = {}


def install(activation: Activation, settings: Settings, native_up_to: int | None = None) -> Entry:
    """Serve the convolutions of the activation's device; a second call with other choices replaces the first.

    Args:
        activation: where and under which policy.
        settings: of these, `fault`, `workspace`, `exact`, the limits and where hardware is read.
        native_up_to: see `Chooser.native_up_to`.
    """
    key = activation.dispatch_key
    if key is None:
        return LEDGER.refuse(PATCH, activation.why)
    arguments = (
        activation, native_up_to, settings.fault, settings.hang_limit, settings.busy_limit, settings.workspace,
        settings.exact,
    )  # fmt: skip
    chooser = Chooser(activation.policy, activation.strategy, native_up_to, activation.bypass_dtypes, settings.exact)
    injected = fault.parse(settings.fault)
    with LEDGER.lock:
        before = LEDGER.already(PATCH, arguments)
        if before is not None:
            return before
        chooser.is_clean = guarding.cleanliness_for(settings) or chooser.is_clean
        guard = guarding.guard_for(chooser, settings)
        tuner = Tuner(chooser, guard, guarding.timings_for(guard, settings))
        routes = Routes(chooser, guard, injected, guarding.recorder(os.environ), settings.workspace, tuner)
        dispatcher = Dispatcher(routes)
        # MIOpen's batch norm and RNNs are MIOpen too. Under other policies they are the program's affair.
        never_native = activation.policy == "bypass" and native_up_to is None
        kernels: dict[str, Callable[..., Any]] = {
            "_convolution": dispatcher.convolution,
            "convolution_backward": dispatcher.convolution_backward,
        }
        if never_native:
            kernels |= miopen_operators.kernels(dispatcher)
        try:
            libraries = _registered(key, kernels)
        except RuntimeError as error:
            return LEDGER.refuse(PATCH, f"another package has overridden aten's convolutions: {error}")
        ACTIVE[key] = dispatcher

        bring_back_flag = cudnn_flag.shield() if never_native else None

        def remove() -> None:
            del ACTIVE[key]
            _destroy(libraries)
            if bring_back_flag is not None:
                bring_back_flag()
            dispatcher.routes.take_back()

        chosen = activation.strategy or activation.policy
        if native_up_to is not None:
            chosen = f"native up to {native_up_to} pixels a side, {chosen} above"
        entry = Entry(True, f"{chosen} on {activation.backend}: {activation.why}")
        return LEDGER.record(PATCH, arguments, entry, remove)


def _registered(key: str, kernels: dict[str, Callable[..., Any]]) -> list[Any]:
    """One library per operator: destroying it is the only way to take a kernel back."""
    libraries: list[Any] = []
    with warnings.catch_warnings():
        # aten has a CUDA kernel for convolution_backward; that we replace it is the purpose.
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid.*previously registered kernel")
        for name, function in kernels.items():
            library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
            libraries.append(library)
            try:
                library.impl(name, function, key)  # type: ignore[no-untyped-call]
            except RuntimeError:
                _destroy(libraries)
                raise
    return libraries


def _destroy(libraries: list[Any]) -> None:
    while libraries:
        library = libraries.pop()
        if hasattr(library, "_destroy"):
            library._destroy()  # torch 1.13 has only the deletion below
        del library

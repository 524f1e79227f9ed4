"""PyTorch that works on AMD Radeon cards AMD does not support well.

    from rocm_patch import enable_all_patches
    print(enable_all_patches())

Importing this package imports no torch, prints nothing and changes nothing; names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rocm_patch._version import __version__

if TYPE_CHECKING:
    from rocm_patch.api import (
        bypass_report,
        disable_all_patches,
        enable_all_patches,
        enable_miopen_bypass,
        patch_dataloader,
        patch_status,
        print_bypass_report,
        setup_environment,
        setup_multiprocessing,
    )
    from rocm_patch.fallback import Conv2dBypassConfig, FallbackStrategy
    from rocm_patch.overrides.models import model_report, patch_model, unpatch_model
    from rocm_patch.overrides.modules import (
        SafeConv1d,
        SafeConv2d,
        SafeConv3d,
        SafeConvTranspose1d,
        SafeConvTranspose2d,
        SafeConvTranspose3d,
        get_config,
        patch_torch_nn,
        restore_torch_nn,
        set_config,
    )

# Where each public name lives. The last two modules import torch.
_HOMES = {
    "rocm_patch.api": (
        "enable_all_patches", "disable_all_patches", "patch_status", "setup_multiprocessing",
        "setup_environment", "patch_dataloader", "enable_miopen_bypass", "bypass_report", "print_bypass_report",
    ),
    "rocm_patch.fallback": ("FallbackStrategy", "Conv2dBypassConfig"),
    "rocm_patch.overrides.modules": (
        "SafeConv1d", "SafeConv2d", "SafeConv3d", "SafeConvTranspose1d", "SafeConvTranspose2d", "SafeConvTranspose3d",
        "patch_torch_nn", "restore_torch_nn", "get_config", "set_config",
    ),
    "rocm_patch.overrides.models": ("patch_model", "unpatch_model", "model_report"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Conv2dBypassConfig", "FallbackStrategy", "SafeConv1d", "SafeConv2d", "SafeConv3d",
    "SafeConvTranspose1d", "SafeConvTranspose2d", "SafeConvTranspose3d", "__version__", "bypass_report",
    "disable_all_patches", "enable_all_patches", "enable_miopen_bypass", "get_config", "model_report",
    "patch_dataloader", "patch_model", "patch_status", "patch_torch_nn", "print_bypass_report",
    "restore_torch_nn", "set_config", "setup_environment", "setup_multiprocessing", "unpatch_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""The original's package for the convolution bypass; its names live in `rocm_patch`."""

from __future__ import annotations

from typing import Any

_NAMES = (
    "SafeConv1d", "SafeConv2d", "SafeConv3d", "SafeConvTranspose1d", "SafeConvTranspose2d", "SafeConvTranspose3d",
    "Conv2dBypassConfig", "FallbackStrategy", "patch_model", "unpatch_model", "patch_torch_nn",
    "restore_torch_nn", "enable_miopen_bypass", "print_bypass_report", "get_config", "set_config",
)  # fmt: skip
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import rocm_patch

    return getattr(rocm_patch, name)


def __dir__() -> list[str]:
    return sorted(_NAMES)

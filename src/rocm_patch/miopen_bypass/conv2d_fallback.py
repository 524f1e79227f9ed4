"""The original's module path: `from rocm_patch.miopen_bypass.conv2d_fallback import SafeConv2d`."""

from __future__ import annotations

from rocm_patch.miopen_bypass import __all__
from rocm_patch.miopen_bypass import __dir__ as __dir__
from rocm_patch.miopen_bypass import __getattr__ as __getattr__

__all__ = list(__all__)

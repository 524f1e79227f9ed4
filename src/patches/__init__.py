"""The original's import name: everything here is `rocm_patch`'s, loaded on first use."""

from __future__ import annotations

from pkgutil import extend_path
from typing import Any

import rocm_patch
from rocm_patch import __version__ as __version__

# A program's own `patches/` folder keeps importing beside this package.
__path__ = extend_path(__path__, __name__)
__all__ = list(rocm_patch.__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(rocm_patch, name)


def __dir__() -> list[str]:
    return sorted(__all__)

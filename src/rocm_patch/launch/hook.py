"""An import hook that patches torch as soon as a program imports it.

Loaded by path or from a `.pth` line at the start of any Python process, so: standard library only, nothing
imported beyond what a starting interpreter has, and no way to break a program that never imports torch.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# Where `rocm-patch run` lies, for a program whose own Python has no rocm_patch (ours came by pipx).
SOURCE_VARIABLE = "_ROCM_PATCH_SOURCE"
_PACKAGES = ("rocm_patch", "patches", "cloudpickle", "tomli")  # tomli: the catalog needs it on Python 3.10


class _TorchFinder:
    """Lets the other finders find torch, and wraps the loader that they found.

    Args:
        source: where rocm_patch lies, for an interpreter that cannot import it.
    """

    def __init__(self, source: str | None) -> None:
        self._source = source
        self._searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch" or self._searching or path is not None:
            return None
        self._searching = True
        try:
            spec = _first_spec(self, name, path, target)
        finally:
            self._searching = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            _wrap(spec.loader, self._source)
        return spec


def _first_spec(ours: object, name: str, path: Any, target: Any) -> Any:
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if finder is not ours and find_spec is not None:
            spec = find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _wrap(loader: Any, source: str | None) -> None:
    """Run our two steps around the loader's exec_module; the loader stays the object it is."""
    original = loader.exec_module

    def exec_module(module: Any) -> None:
        del loader.exec_module
        attach = _attach_module(source)
        if attach is not None:
            attach.before_torch()
        original(module)
        if attach is not None:
            attach.after_torch()

    loader.exec_module = exec_module


def _attach_module(source: str | None) -> Any:
    """`rocm_patch.launch.attach`, or None where this interpreter cannot have rocm_patch."""
    try:
        return _import_attach()
    except ModuleNotFoundError as error:
        if error.name != "rocm_patch":
            raise
    if not source or not os.path.isdir(os.path.join(source, "rocm_patch")):  # noqa: PTH112, PTH118
        return None
    sys.meta_path.append(_SourceFinder(source))
    return _import_attach()


def _import_attach() -> Any:
    from rocm_patch.launch import attach

    return attach


class _SourceFinder:
    """Finds rocm_patch and what it needs where the launcher lies, and nothing else of what lies there."""

    def __init__(self, source: str) -> None:
        self._source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _PACKAGES:
            return None
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [self._source])


def install(source: str | None = None) -> None:
    """Put the finder first, once per process; does nothing under `ROCM_PATCH=0`.

    Args:
        source: the folder that rocm_patch lies in, for an interpreter that cannot import it.
    """
    if os.environ.get("ROCM_PATCH", "1").lower() in ("0", "off", "false", "no"):
        return
    # By name: a `.pth` line and a sitecustomize may have loaded two copies of this file.
    if not any(type(finder).__name__ == "_TorchFinder" for finder in sys.meta_path):
        finder = _TorchFinder(source or os.environ.get(SOURCE_VARIABLE))
        sys.meta_path.insert(0, finder)

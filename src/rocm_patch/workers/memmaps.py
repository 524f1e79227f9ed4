"""Arrays that are a file's memory: opened again in the worker, not read."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

from rocm_patch.workers.buffers import mappings


def reduced(array: Any) -> Any:
    """How a `numpy.memmap` is opened again by its file's name, as pickle takes it; None where it has to be copied."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(array) is not numpy.memmap or array.filename is None or array.dtype.hasobject:
        return None
    root = array
    while isinstance(root.base, numpy.memmap):
        root = root.base
    if root.mode not in ("r", "r+", "w+") or getattr(root, "_mmap", None) is None:
        return None
    if not _is_still_that_file(root):
        return None
    mode = "r" if root.mode == "r" else "r+"
    start = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    extent = (str(root.filename), mode, root.offset, root.nbytes)
    return _memmap, (extent, array.shape, array.dtype, start, array.strides, array.flags.writeable)


def _is_still_that_file(root: Any) -> bool:
    """Whether the name leads to the file that is mapped: by its inode, else by some of its pages.

    Overlay file systems show another inode in proc_pid_maps(5) than stat(2) does.
    """
    address = root.__array_interface__["data"][0]
    try:
        if os.stat(root.filename).st_ino in {mapping.inode for mapping in mappings(address, 1)}:  # noqa: PTH116
            return True
        with open(root.filename, "rb", buffering=0) as file:
            for start in {0, root.nbytes // 3, root.nbytes // 2, max(0, root.nbytes - _SAMPLE)}:
                sample = ctypes.string_at(address + start, min(_SAMPLE, root.nbytes - start))
                file.seek(root.offset + start)
                if file.read(len(sample)) != sample:
                    return False
    except OSError:
        return False
    return True


_SAMPLE = 4096


def _memmap(
    extent: tuple[str, str, int, int], shape: Any, dtype: Any, start: int, strides: Any, writeable: bool
) -> Any:
    import numpy

    filename, mode, offset, nbytes = extent
    root = _opened(filename, mode, offset, nbytes)
    array = numpy.ndarray(shape, dtype, root, start, strides).view(numpy.memmap)
    if not writeable:
        array.flags.writeable = False
    return array


@functools.cache
def _opened(filename: str, mode: Any, offset: int, nbytes: int) -> Any:
    import numpy

    return numpy.memmap(filename, numpy.uint8, mode, offset, (nbytes,))

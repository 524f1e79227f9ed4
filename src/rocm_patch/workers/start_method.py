"""How worker processes start."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from pathlib import Path

from rocm_patch.settings import START_METHODS, check


def in_force() -> str | None:
    """Python's start method as it was set, None while nothing has set or used it."""
    return multiprocessing.get_start_method(allow_none=True)


def set_start_method(method: str) -> None:
    """Make `method` Python's start method, whatever it was. Warns if torch is imported already.

    Raises:
        UsageError: this Python has no such start method.
    """
    check("start_method", method, START_METHODS)
    if "torch" in sys.modules and multiprocessing.parent_process() is None:  # a worker runs the program's lines again
        warnings.warn(
            f"torch is already imported: the start method is set to {method!r}, but workers, pools and queues "
            "that were made before keep theirs, and environment variables that the GPU libraries have read are "
            "not read again\n"
            "hint: call setup_multiprocessing() before `import torch`, or use: rocm-patch run script.py",
            RuntimeWarning,
            stacklevel=_callers_level(),
        )
    multiprocessing.set_start_method(method, force=True)


def _callers_level() -> int:
    """How far up the stack the first code is that is not ours, for `warnings.warn`."""
    package = str(Path(__file__).parents[1])
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level


def restore(method: str | None, *, if_still: str) -> None:
    """Put back what `in_force` returned, unless somebody has changed it from `if_still` since."""
    if in_force() == if_still:
        multiprocessing.set_start_method(method, force=True)

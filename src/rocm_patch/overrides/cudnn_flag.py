"""Aten's cudnn flag, MIOpen's on ROCm, held off while programs go on seeing and setting a value of their own.

Convolutions are served by `overrides.aten`; with the flag off, MIOpen's batch norms and RNNs are not used
either. Programs assert on `torch.backends.cudnn.enabled` and set it: they read what they wrote last, and MIOpen
stays off.

Put the shield up before the first compile: a compiled graph is not compiled again when aten's flag changes (the
flag is not among the global state that dynamo guards on), so graphs from before keep what they were compiled
with. A guard on `torch.backends.cudnn.enabled` follows the program's value, as it does without the shield.

What is not reached:

- A program that hands its own value to an operator, `torch.batch_norm(..., torch.backends.cudnn.enabled)`. In
  torch 1.13 this argument alone decides, so MIOpen's batch norm runs (aten/src/ATen/native/Normalization.cpp,
  `_batch_norm_impl_index`). Since `_select_batch_norm_backend` came into that file aten's flag has to be on too,
  and it does not run. The same goes for a TorchScript file that was traced elsewhere with the argument True; one
  traced here carries False to wherever it is loaded.
- C++ extensions, which see and set aten's flag itself, and functions taken from `torch._C` before the shield.
- `torch.backends.cudnn.is_acceptable` and scripted code (`torch.jit.script`) answer by aten's flag.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from rocm_patch.conv.native import cudnn_enabled
from rocm_patch.overrides.ledger import replace
from rocm_patch.settings import LOGGER

_GET: Any = cudnn_enabled
# Unwrapped: this module may be imported anew, under another name or after a reload, while a shield is up.
_SET: Any = inspect.unwrap(torch._C._set_cudnn_enabled)

_lock = threading.RLock()
# The program's value while the shield is up, else None. One for all threads, as aten's own.
_programs: bool | None = None


def real_flag() -> bool:
    """Whether aten may use cuDNN, or MIOpen on ROCm: its own flag, shield or not."""
    return bool(_GET())


def shield() -> Callable[[], None]:
    """Turn aten's flag off and give programs a value of their own, which starts as the flag was.

    Returns:
        What takes the shield down: the objects that were there are there again and aten's flag is what the
        program set last. Calling it again does nothing. A second shield over the first changes nothing, and nor
        does its undo.
    """
    global _programs
    with _lock:
        if _programs is not None:
            return lambda: None
        # Not _GET and _SET: a shield of another copy of this module may be there, and stays.
        before, set_before = torch._C._get_cudnn_enabled(), torch._C._set_cudnn_enabled
        restore = [replace(torch._C, "_get_cudnn_enabled", _get), replace(torch._C, "_set_cudnn_enabled", _set)]
        # It holds the two functions as they were when torch was imported.
        prop = vars(type(torch.backends.cudnn)).get("enabled")
        if {"getter", "setter"} <= getattr(prop, "__dict__", {}).keys():
            restore += [replace(prop, "getter", _get), replace(prop, "setter", _set)]
        else:
            LOGGER.debug("torch %s: torch.backends.cudnn.enabled is no ContextProp: left alone", torch.__version__)
        _programs = before
        _SET(False)

    def take_down() -> None:
        global _programs
        with _lock:
            if restore and _programs is not None:
                set_before(_programs)
                _programs = None
            while restore:
                restore.pop()()

    return take_down


@functools.wraps(_GET)
def _get() -> bool:
    value = _programs
    return real_flag() if value is None or _passes_it_on(_asker()) else value


@functools.wraps(_SET)
def _set(value: bool) -> None:
    global _programs
    with _lock:
        if _programs is None or not isinstance(value, bool):
            _SET(value)  # of anything but a bool it complains
        else:
            _programs = value


def _asker() -> FrameType | None:
    """The frame that reads the flag; None if C++ does with no Python beneath it."""
    try:
        frame: FrameType | None = sys._getframe(2)
    except ValueError:
        return None
    if frame is not None and frame.f_code.co_name == "__get__" and _module(frame) == "torch.backends":
        frame = frame.f_back
    return frame


def _passes_it_on(frame: FrameType | None) -> bool:
    """Whether the reader hands the flag to aten or decides by it for aten: such readers get aten's.

    Named one by one. Most of torch must get the program's value: `set_flags` puts back later what it read, and
    dynamo traces a program's read and evaluates the guard on it, from whatever frame calls the compiled code
    (`torch.nn.modules.module` for one). The two must agree or every call compiles anew.
    """
    if frame is None:
        return False
    module = _module(frame)
    if module == "torch.backends.cudnn":
        # Dynamo's rewritten functions have the original's name within theirs.
        return "is_acceptable" in frame.f_code.co_name
    # The norms' cudnn_enabled argument; scripting reads the attribute when it compiles the norms.
    return module == "torch.nn.functional" or module.startswith("torch.jit.")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))

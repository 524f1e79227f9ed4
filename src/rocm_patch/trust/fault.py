"""Failures on purpose: `ROCM_PATCH_FAULT=kind:direction[:after=N]`, for tests and for users who want to see.

The fault stands where MIOpen's would arise, around native convolutions, and it is real: the process does crash.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rocm_patch.conv.spec import DIRECTIONS
from rocm_patch.errors import UsageError

_USAGE = "ROCM_PATCH_FAULT=kind:direction[:after=N], or compile:direction[:after=N][:seconds=N]"
# More than the address space of any processor that torch runs on.
_TOO_MUCH_BYTES = 1 << 58
# Cycles of a GPU that counts at 2 GHz for 70 years.
_ENDLESS_CYCLES = 1 << 62


@dataclass
class Fault:
    """One failure that is waiting to happen.

    Attributes:
        kind: one of `KINDS`.
        direction: the direction that fails.
        after: how many calls in this direction still work.
        seconds: how long `compile` takes.
        met: how many calls in this direction the fault has met.
    """

    kind: str
    direction: str
    after: int = 0
    seconds: float = 5.0
    met: int = 0

    def around(self, direction: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `run` returns, or what becomes of it if this native call is one that fails.

        Raises:
            RuntimeError: the fault is one that torch would raise.
        """
        if direction != self.direction:
            return run()
        if self.after > 0:
            self.after -= 1
            return run()
        self.met += 1
        return _FAULTS[self.kind](self, run)


def parse(text: str | None) -> Fault | None:
    """The fault that the text names, None for no text.

    Raises:
        UsageError: the text names no fault.
    """
    if not text:
        return None
    kind, _, rest = text.partition(":")
    direction, *options = rest.split(":")
    named = dict(option.partition("=")[::2] for option in options)
    legal = {"after", "seconds"} if kind == "compile" else {"after"}
    if (
        kind not in KINDS
        or direction not in DIRECTIONS
        or len(named) < len(options)
        or not named.keys() <= legal
        or not all(value.isdecimal() for value in named.values())
    ):
        raise UsageError(
            f"unknown fault {text!r}",
            f"{_USAGE}; kind one of {', '.join(KINDS)}, direction one of {', '.join(DIRECTIONS)}",
        )
    return Fault(kind, direction, int(named.get("after", 0)), float(named.get("seconds", 5)))


_Run = Callable[[], torch.Tensor]


def _error(fault: Fault, run: _Run) -> torch.Tensor:
    # What MIOpen says through torch: known issue `miopen-stoul`.
    raise RuntimeError("miopenStatusUnknownError")


def _device(fault: Fault, run: _Run) -> torch.Tensor:
    # What HIP says through torch: known issue `invalid-device-function`.
    raise RuntimeError("HIP error: an illegal memory access was encountered")


def _segfault(fault: Fault, run: _Run) -> torch.Tensor:
    ctypes.string_at(0)
    raise AssertionError("address 0 can be read")


def _abort(fault: Fault, run: _Run) -> torch.Tensor:
    os.abort()


def _spin(fault: Fault, run: _Run) -> torch.Tensor:
    # C code that holds no lock of Python's, as the kernels of a library do: other threads go on, Ctrl-C does not
    # get through. One round takes many minutes.
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def _hang(fault: Fault, run: _Run) -> torch.Tensor:
    result = run()
    if result.is_cuda:  # the host goes on, and waits for ever at its next look at the GPU
        with torch.cuda.device(result.device):
            torch.cuda._sleep(_ENDLESS_CYCLES)  # type: ignore[no-untyped-call, unused-ignore]
        return result
    while True:
        time.sleep(0.05)


def _memory(fault: Fault, run: _Run) -> torch.Tensor:
    return torch.empty(_TOO_MUCH_BYTES, dtype=torch.uint8, device=run().device)


def _nan(fault: Fault, run: _Run) -> torch.Tensor:
    return torch.full_like(run(), float("nan"))


def _wrong(fault: Fault, run: _Run) -> torch.Tensor:
    return run() * 1.1


def _compile(fault: Fault, run: _Run) -> torch.Tensor:
    """Not a failure: a child under a compiler's name is busy for some seconds, as in MIOpen's first search."""
    with tempfile.TemporaryDirectory(prefix="rocm-patch-compile-") as folder:
        compiler = Path(folder, "clang")
        compiler.symlink_to("/bin/sh")
        # $PPID: it does not outlive us.
        command = ["sh", "-c", "while kill -0 $PPID; do :; done"]
        with subprocess.Popen(command, executable=compiler, stderr=subprocess.DEVNULL) as process:
            time.sleep(fault.seconds)
            process.kill()
    return run()


_FAULTS: dict[str, Callable[[Fault, _Run], torch.Tensor]] = {
    "error": _error,
    "device": _device,
    "segfault": _segfault,
    "abort": _abort,
    "spin": _spin,
    "hang": _hang,
    "memory": _memory,
    "nan": _nan,
    "wrong": _wrong,
    "compile": _compile,
}
KINDS = tuple(_FAULTS)

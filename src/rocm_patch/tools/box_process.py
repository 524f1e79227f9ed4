"""The process of one box of `rocm-patch verify`: what it knows of itself, and how it answers.

A box is a function that returns what it measured, or raises `NotRun`, `Failed` or whatever it meets.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocm_patch.machine import backend, hardware
from rocm_patch.machine.build import TorchBuild, find_build
from rocm_patch.settings import Settings, from_environ

STATES = TICKED, FAILED, NOT_RUN = "ticked", "failed", "not run"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# The id of the process that runs a box; None where this module came otherwise than by a fork of that process.
box_process: int | None = None
# The names of the environment variables that the launch has set for it.
launch_variables: frozenset[str] = frozenset()


class NotRun(Exception):
    """Why a box can say nothing on this machine."""


class Failed(Exception):
    """What a box found wrong."""


def answer(box: Callable[[], str], path: str, ours: Iterable[str]) -> None:
    """Run one box and write its state and detail to the file `path`, as JSON.

    Args:
        box: what to run.
        path: where the answer goes.
        ours: the names of the environment variables that the launch has set for this process.
    """
    global box_process, launch_variables
    box_process, launch_variables = os.getpid(), frozenset(ours)
    # Once `verify` is gone nobody waits for the answer, and nobody ends a box that hangs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        state, detail = TICKED, box()
    except NotRun as reason:
        state, detail = NOT_RUN, str(reason)
    except Failed as reason:
        state, detail = FAILED, str(reason)
    except Exception as error:  # noqa: BLE001  (whatever a box meets is its result)
        traceback.print_exc()
        state, detail = FAILED, f"{type(error).__name__}: {_one_line(str(error))}"
    Path(path).write_text(json.dumps({"state": state, "detail": detail}), encoding="utf-8")


def _one_line(text: str) -> str:
    """A message's first line and, where there are more, its last: torch puts the cause at either end."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ... ".join([*lines[:1], *lines[1:][-1:]])


def expect(condition: bool, otherwise: str) -> None:
    """Raise `Failed` unless the condition holds."""
    if not condition:
        raise Failed(otherwise)


def tolerances(computed: Any, exact: Any, rtol: float, what: str) -> float:
    """The relative error of `computed` in units of the tolerance; raises `Failed` above one, and for NaN."""
    error = float((computed.double() - exact).norm() / exact.norm()) / rtol
    expect(error <= 1, f"{what} is wrong: its relative error is {error:.3g} times the tolerance of {rtol:g}")
    return error


def trying(text: str) -> None:
    """Leave a word on stderr, where `verify` finds it if this process crashes or hangs next."""
    sys.stderr.write(f"trying {text}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Here:
    """This process as rocm_patch sees it, without an import of torch."""

    settings: Settings
    machine: hardware.Machine
    build: TorchBuild | None
    activation: backend.Activation

    @classmethod
    def read(cls) -> Here:
        """Read it from this process's environment and from the machine."""
        settings = from_environ()
        machine, build = hardware.read_machine(settings.sysfs_root), find_build()
        return cls(settings, machine, build, backend.decide(machine, build, settings, os.environ))

    def must_be_on(self) -> None:
        """Raise `NotRun` under `ROCM_PATCH=0`."""
        if not self.settings.enabled:
            raise NotRun("switched off by ROCM_PATCH=0")

    def must_want_gpu(self) -> None:
        """Raise `NotRun` where the user has asked for the CPU."""
        if self.activation.backend == "cpu":
            raise NotRun("the backend cpu was asked for")

    def device(self) -> str:
        """Where programs compute here: on the GPU that torch sees, unless the user has asked for the CPU."""
        import torch

        return "cuda" if self.activation.backend != "cpu" and torch.cuda.is_available() else "cpu"

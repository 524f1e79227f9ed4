"""One convolution on one strategy, tried where it can do no harm: in a process of its own.

What a trial is, and what its result is compared with, is in `trial.py`, the program of that process. Starts without
torch. Linux only.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rocm_patch.child import Child
from rocm_patch.settings import LOGGER
from rocm_patch.trust.progress import Limits, Patience, caches

# Signals that a process brings upon itself; any other is sent by somebody.
_CRASHES = {
    signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS,
}  # fmt: skip
_DOING = {
    "preparing": "while its operands were made",
    "calling": "in the call",
    "called": "after the call, waiting for the device",
    "judging": "while its result was judged",
}
_CALLS = ("calling", "called")


@dataclass(frozen=True)
class Trial:
    """What came of trying a strategy.

    Attributes:
        kind: `ok`, `error`, `crash`, `hang`, `wrong`, or `unknown`: nothing can be said.
        seconds: of one call, the first one left out if there are more; for a crash or hang all that it took.
        error: relative to float64, ||computed - exact|| / ||exact||.
        calls: how many calls came back.
        evidence: one line; empty for `ok`.
    """

    kind: str
    seconds: float = 0.0
    error: float = math.nan
    calls: int = 0
    evidence: str = ""


class _End(NamedTuple):
    """A trial, and whether it left its process dead or doubtful, by its own doing or by an earlier trial's."""

    trial: Trial
    harmed: bool


class Sandbox:
    """A child process that tries convolutions; started at the first trial, and again when one has ended it.

    Args:
        device: torch's name of the device, `cuda:0` for example.
        limits: how long a call may take.
        environ: the environment to try them in; this process's by default.
        python: the interpreter that has torch.
        cool_down: seconds to leave the device alone after a crash or hang, before a new child tries whether it still
            computes; by default 5 for a GPU, and 0 for the CPU, which needs no such check.
        start_seconds: how long the child may take to import torch and compute something simple on the device.
        kill_seconds: how long to wait until a killed child is gone.

    Attributes:
        device_usable: False once the child does not start any more; then every trial is `unknown`.
        left_behind: ids of processes that SIGKILL did not end.
    """

    def __init__(
        self,
        device: str,
        limits: Limits,
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
        cool_down: float | None = None,
        start_seconds: float = 60.0,
        kill_seconds: float = 5.0,
    ) -> None:
        self.device_usable = True
        self.left_behind: list[int] = []
        self._device, self._limits, self._python = device, limits, python
        given = os.environ if environ is None else environ
        # Our own hook stays out; a fault on purpose (ROCM_PATCH_FAULT) is the trial's own affair.
        self._environ = {**given, "ROCM_PATCH": "0", "PYTHONFAULTHANDLER": "1"}
        self._cool_down = (5.0 if device.startswith("cuda") else 0.0) if cool_down is None else cool_down
        self._start_seconds, self._kill_seconds = start_seconds, kill_seconds
        self._why_unusable = ""
        self._child: Child | None = None
        self._served = 0
        self._harmed = False
        self._forget()

    def prove(self, spec: str, strategy: str, calls: int = 1, seconds: float = 2.0) -> Trial:
        """Try a strategy.

        A trial that ends its process is a verdict only if it was that process's first: otherwise it is tried once
        more in a fresh one, so that no trial is charged with the damage of an earlier one.

        Args:
            spec: the convolution, by `ConvSpec.to_json`.
            strategy: a strategy's name.
            calls: how often to call it.
            seconds: after which no further call begins.
        """
        if self._owner != os.getpid():
            self._forget()
        request = {"spec": spec, "strategy": strategy, "calls": calls, "seconds": seconds}
        with self._lock:
            is_first = self._child is None or self._served == 0
            end = self._try(request)
            if end.harmed and not is_first:
                before, end = end.trial, self._try(request)
                if end.trial.kind == "unknown":
                    evidence = f"{end.trial.evidence}; before that: {before.kind}, {before.evidence}"
                    end = end._replace(trial=replace(end.trial, evidence=evidence))
            if end.harmed and self._cool_down and self._ready() is None:
                return replace(end.trial, evidence=f"{end.trial.evidence}; afterwards: {self._why_unusable}")
            return end.trial

    def close(self) -> None:
        """End the child. A later trial starts another."""
        if self._owner != os.getpid():
            return  # a fork of the process that it belongs to
        with self._lock:
            self._end_child()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        """Begin anew, in a fork too: the lock may be held and the child is the parent's."""
        self._owner, self._lock, self._child = os.getpid(), threading.Lock(), None

    def _try(self, request: Mapping[str, Any]) -> _End:
        try:
            child = self._ready()
            if child is None:
                return _End(Trial("unknown", evidence=self._why_unusable), harmed=False)
            self._served += 1
            end = self._run(child, request)
        except BaseException:  # Ctrl-C above all
            self._end_child()
            raise
        self._harmed = end.harmed
        return end

    def _ready(self) -> Child | None:
        """A child that has just come up or served well, None where none comes up."""
        if self._child is not None and self._child.is_over():  # by itself, between two trials
            self._end_child()
        if self._child is None and self.device_usable:
            if self._harmed:
                time.sleep(self._cool_down)
            self._why_unusable = self._start()
            self._harmed = False
        return self._child

    def _start(self) -> str:
        """Why no child came up; empty if one did."""
        try:
            self._child = child = Child(self._python, "rocm_patch.trust.trial", [self._device], self._environ)
        except OSError as error:
            self.device_usable = False
            return f"cannot start {self._python}: {error.strerror}"
        self._served = 0
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            is_over = child.is_over()
            line = child.line()
            if line is not None and line["phase"] == "ready":
                return ""
            if line is not None:
                self._end_child()
                self.device_usable = not line["lasts"]
                return f"{self._device} cannot be used: {line['evidence']}"
            if is_over:
                words = child.last_words()
                code = self._end_child()
                self.device_usable = _is_killed_by_others(code)
                return f"a process for {self._device} does not start: {_join(_ending(code), words)}"
        child.ask_for_stack()
        words = child.last_words()
        self._end_child()
        self.device_usable = False
        return _join(f"no sign of life from {self._device} within {self._start_seconds:g} s", words)

    def _run(self, child: Child, request: Mapping[str, Any]) -> _End:
        patience = Patience(self._limits, child.pid, caches(self._environ))
        phase, calls, began = "preparing", 0, time.monotonic()
        look = began
        child.send(request)
        while True:
            is_over = child.is_over()
            line = child.line()
            if line is not None and line["phase"] == "result":
                if line["lost"]:  # the child has nothing to compute on any more
                    self._end_child()
                trial = Trial(line["kind"], line["seconds"], line["error"], line["calls"], line["evidence"])
                return _End(trial, line["lost"])
            if line is not None:
                phase = line["phase"]
                calls += phase == "called"
                patience.restart()
                continue
            took = time.monotonic() - began
            if is_over:
                words = child.last_words()
                code = self._end_child()
                is_own = not _is_killed_by_others(code)
                kind = "crash" if is_own and phase in _CALLS else "unknown"
                evidence = _join(f"{_ending(code)} {_DOING[phase]}", words)
                return _End(Trial(kind, took, calls=calls, evidence=evidence), is_own)
            if time.monotonic() < look:
                continue
            look = time.monotonic() + min(1.0, self._limits.still / 8)
            why = patience.lost(waits_for_gpu=phase == "called")
            if why is not None:
                child.ask_for_stack()
                words = child.last_words()
                if self._end_child() is None:
                    why += ", and cannot be killed: the kernel holds it"
                kind = "hang" if phase in _CALLS else "unknown"
                return _End(Trial(kind, took, calls=calls, evidence=_join(f"{why} {_DOING[phase]}", words)), True)

    def _end_child(self) -> int | None:
        """Kill the child with all that it started; its return code, None if it is still there."""
        child, self._child = self._child, None
        if child is None:
            return None
        code = child.end(self._kill_seconds)
        if code is None:
            self.left_behind.append(child.pid)
            LOGGER.warning(
                "process %d cannot be killed: the kernel holds it, as it does when a GPU hangs\n"
                "hint: it goes when the driver lets go of it, or when the machine is started again",
                child.pid,
            )
        return code


def _is_killed_by_others(code: int | None) -> bool:
    """Whether a return code is that of a signal from outside: out of memory, a scheduler, a person."""
    return code is not None and code < 0 and -code not in _CRASHES


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"killed by {name}" + (" from outside" if _is_killed_by_others(code) else "")


def _join(what: str, words: str) -> str:
    return f"{what}: {words}" if words else what

"""The first run of a strategy for a spec in the user's own process, and what is remembered of it.

A crash guard as browsers have for graphics drivers: what is about to be tried is on disk before it is tried.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

import torch

from rocm_patch.conv import NATIVE, Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.settings import LOGGER
from rocm_patch.trust import reference
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.remains import settle
from rocm_patch.trust.store import Verdict
from rocm_patch.trust.verdicts import UNPROVEN, Verdicts
from rocm_patch.trust.witness import Witness

if TYPE_CHECKING:
    from rocm_patch.trust.sandbox import Sandbox

# How often the sandbox repeats a call on a machine that has crashed or hung before, and the seconds that it may take.
THOROUGH = 128
THOROUGH_SECONDS = 10.0
# After so many crashes and hangs of a machine native convolutions are not tried any more, in the sandbox either.
GIVE_UP = 3
# After so many runs whose results say nothing (NaN in the operands) a call is no longer held up.
_UNKNOWN_RUNS = 3
# Seconds without a new convolution after which the sandbox is let go: it holds memory of the GPU.
_SANDBOX_IDLE = 20.0
# Marks an error that showed before the convolution began.
_EARLIER = "_rocm_patch_earlier"


class Guard:
    """Lets proven strategies pass, and tries the others.

    Args:
        verdicts: what is known.
        folder: where journals lie; None for a guard that keeps verdicts and tries nothing.
        limits: how long a call may take.
        guards_ours: whether our own strategies need proof on a device: on an AMD card, where the BLAS library may
            run another chip's code too.
        inside: code objects of the functions that proven calls run in, for the watchdog.
        environ: the environment; says whether the program runs under `rocm-patch run --restart`.

    Attributes:
        verdicts: as given.
        witness: the record of which convolution this process is in.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        folder: Path | None = None,
        limits: Limits | None = None,
        guards_ours: Callable[[str], bool] = lambda device: False,
        inside: frozenset[CodeType] = frozenset(),
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.verdicts = verdicts
        self._limits = limits or Limits()
        self._guards_ours, self._environ = guards_ours, environ
        self._lock = threading.RLock()
        self._sandboxes: dict[str, Sandbox] = {}
        self._used = 0.0
        self._unknown: dict[tuple[ConvSpec, str], int] = {}
        if folder is not None and verdicts.store is not None:
            settle(verdicts.store, folder)
        self.witness = Witness(verdicts, folder, self._limits, inside, environ)
        self.witness.on_idle = self._on_idle
        self.witness.on_fork.append(self._forget)

    def trusts(self, spec: ConvSpec, strategy: Strategy) -> bool:
        """Whether this strategy may run for this spec without more ado."""
        if not self.witness.looks or (strategy is not NATIVE and not self._guards_ours(spec.device)):
            return True
        known = self.verdicts.of(spec, strategy.name)
        if known is None or known.is_bad or self.verdicts.suspicion(spec, strategy.name) is not None:
            return False
        return known.calls >= THOROUGH or not self.verdicts.hard(spec, strategy.name)

    def number(self, *pairs: tuple[ConvSpec, Strategy]) -> int:
        """The number that stands for a proven call, or for several that are made as one."""
        return self.witness.number(*((spec, strategy.name) for spec, strategy in pairs))

    def first_call(
        self,
        spec: ConvSpec,
        strategy: Strategy,
        run: Callable[[], torch.Tensor],
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> tuple[Verdict, torch.Tensor | None]:
        """Run an unproven strategy and judge it.

        Args:
            spec: the convolution.
            strategy: how it is computed.
            run: does it, in the user's own process.
            first: operand, as `Strategy.run` takes them.
            second: likewise.
            bias: what `run` adds to dimension 1.

        Returns:
            The verdict, and the result where it is good. A verdict of 0 calls proves nothing yet.

        Raises:
            RuntimeError: whatever `run` raises; nothing has been entered then.
        """
        with self._lock, self.witness.away():
            known = self.verdicts.of(spec, strategy.name)
            if known is not None and known.is_bad:  # another thread has just tried it
                return known, None
            tried = self._from_sandbox(spec, strategy)
            if tried is not None and tried.is_bad:
                return tried, None
            result, seconds = self._run(spec, strategy, run, first)
            # Ours get the tolerance of native too: the program may have allowed its matrix products less precision.
            rtol = max(strategy.rtol[spec.dtype], NATIVE.rtol[spec.dtype])
            try:
                judged = reference.judge(spec, first, second, result, rtol, bias)
            except RuntimeError as error:  # no memory left to compare with, for one: that is not the strategy's fault
                return self._put_off(spec, strategy, f"could not be compared: {error}"), result
            if judged.kind == "unknown":
                return self._put_off(spec, strategy, judged.detail), result
            if judged.kind == "ok":
                verdict = Verdict("ok", seconds, judged.error, 1 if tried is None else tried.calls)
            else:
                verdict = Verdict("wrong", seconds, judged.error, evidence=judged.detail)
            self.verdicts.enter(spec, strategy.name, verdict)
            return verdict, None if verdict.is_bad else result

    def convict(self, spec: ConvSpec, strategy: Strategy, kind: str, evidence: str) -> Verdict:
        """Enter a bad verdict on what has been seen to fail."""
        verdict = Verdict(kind, evidence=evidence)
        self.verdicts.enter(spec, strategy.name, verdict)
        if verdict.is_hard:
            self.witness.ask_for_restart(f"{kind}: {strategy.name} of {spec}")
        return verdict

    def _run(
        self, spec: ConvSpec, strategy: Strategy, run: Callable[[], torch.Tensor], operand: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The call between two synchronisations, so that no earlier kernel's fault is put down to it."""
        try:
            _synchronize(operand)
        except RuntimeError as error:
            setattr(error, _EARLIER, True)
            raise
        with self.witness.attempt(spec, strategy.name) as now_waiting:
            start = time.perf_counter()
            result = run()
            now_waiting()
            _synchronize(operand)
            return result, time.perf_counter() - start

    def _put_off(self, spec: ConvSpec, strategy: Strategy, why: str) -> Verdict:
        """Nothing could be said of this run: the next one is watched as well, but not for ever."""
        key = (spec, strategy.name)
        if len(self._unknown) > 1000:
            self._unknown.clear()
        self._unknown[key] = self._unknown.get(key, 0) + 1
        LOGGER.debug("%s of %s goes on unproven: %s", strategy.name, spec, why)
        return Verdict("ok", calls=0 if self._unknown[key] < _UNKNOWN_RUNS else 1, evidence=why)

    def _from_sandbox(self, spec: ConvSpec, strategy: Strategy) -> Verdict | None:
        """What the sandbox says of a call that has to go there first; None for one that need not."""
        suspicion = self.verdicts.suspicion(spec, strategy.name)
        hard = self.verdicts.hard(spec, strategy.name)
        if suspicion is None and not hard:
            return None
        if strategy is NATIVE and hard >= GIVE_UP and suspicion is None:
            verdict = Verdict(UNPROVEN, evidence=f"is not tried: {hard} others have crashed or hung on this machine")
            self.verdicts.enter(spec, strategy.name, verdict)
            return verdict
        why = suspicion.splitlines()[0] if suspicion else f"{hard} convolutions have crashed or hung on this machine"
        LOGGER.warning("trying %s of %s in a process of its own first: %s", strategy.name, spec, why)
        from rocm_patch.trust.sandbox import Sandbox  # POSIX only, and rarely needed

        sandbox = self._sandboxes.get(spec.device)
        if sandbox is None:
            sandbox = self._sandboxes[spec.device] = Sandbox(spec.device, self._limits, self._environ)
        trial = sandbox.prove(spec.to_json(), strategy.name, THOROUGH, THOROUGH_SECONDS)
        self._used = time.monotonic()
        if trial.kind == "unknown":
            why = f"could not be tried in a process of its own: {trial.evidence}"
            verdict = Verdict(UNPROVEN, evidence=why)
        else:
            # Within its seconds a slow call comes to fewer repetitions; it has been as thorough as it gets.
            calls = THOROUGH if trial.kind == "ok" else trial.calls
            verdict = Verdict(trial.kind, trial.seconds, trial.error, calls, evidence=trial.evidence)
        self.verdicts.enter(spec, strategy.name, verdict)
        return verdict

    def _on_idle(self) -> None:
        if self._sandboxes and time.monotonic() - self._used > _SANDBOX_IDLE and self._lock.acquire(blocking=False):
            try:
                self._close_sandboxes()
            finally:
                self._lock.release()

    def _close_sandboxes(self) -> None:
        while self._sandboxes:
            self._sandboxes.popitem()[1].close()

    def close(self) -> None:
        """Let go of processes, threads and files; all of it comes again when it is needed."""
        self._close_sandboxes()
        self.witness.close()

    def _forget(self) -> None:
        """In a forked child: the sandbox is the parent's."""
        self._lock = threading.RLock()
        self._sandboxes = {}


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def is_earlier_fault(error: RuntimeError) -> bool:
    """Whether a failed call of the GPU's runtime showed before the convolution began."""
    return bool(getattr(error, _EARLIER, False))


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured: then nothing may synchronise, and nothing be tried."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

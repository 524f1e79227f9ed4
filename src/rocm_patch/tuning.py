"""Times the strategies of a convolution against each other, once, on the program's own operands.

Asked for in torch's own way, `torch.backends.cudnn.benchmark = True`, or by `rocm-patch tune`. ROCm builds of torch
up to 2.6 start with that flag on, which asks for nothing; there it counts once the program has switched it on itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from rocm_patch.conv import Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.settings import LOGGER
from rocm_patch.trust import reference
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.guard import Guard
from rocm_patch.trust.native_errors import blame
from rocm_patch.trust.timings import Timings

TUNE_VARIABLE = "ROCM_PATCH_TUNE"
# Slower by estimate than the best by so much, a strategy is not tried; the estimates are not that far off.
_WORTH_TRYING = 6.0
_REPEATS = 5
_AHEAD_MS, _CYCLES = 1.0, 100_000
# One that took so much longer than the best at its first call is not called again.
_HOPELESS = 3.0
# A program with ever new shapes is not timed for ever.
_MOST_TUNED = 1024

Run = Callable[[Strategy], torch.Tensor]


class Tuner:
    """Decides by the clock.

    Args:
        chooser: whose ranking it improves.
        guard: under which what is unproven runs for the first time.
        timings: where the seconds are kept.
    """

    def __init__(self, chooser: Chooser, guard: Guard, timings: Timings) -> None:
        self._chooser, self._guard, self.timings = chooser, guard, timings
        self._is_asked = os.environ.get(TUNE_VARIABLE, "0").lower() not in ("", "0", "off", "false", "no")
        # Where it is on from the start it asks for nothing until the program has set it itself.
        if _starts_on() and torch._C._get_cudnn_benchmark() and chooser.policy == "bypass":
            torch._C._set_cudnn_benchmark(False)
        self._tuned = 0

    def is_wanted(self) -> bool:
        """Whether the program asks for it now. Deterministic programs are not to hang on the clock."""
        if not (self._is_asked or torch._C._get_cudnn_benchmark()):
            return False
        return self._chooser.policy == "bypass" and not torch._C._get_deterministic_algorithms()

    def tune(
        self, spec: ConvSpec, run: Run, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None = None
    ) -> dict[str, float]:
        """Time what is likely to be fast for a spec, and keep it.

        Args:
            spec: the convolution.
            run: computes it by a strategy, with the bias.
            first: operand, as `Strategy.run` takes them.
            second: likewise.
            bias: what `run` adds.

        Returns:
            Seconds by strategy, of those that computed it rightly; empty where enough has been timed.

        Raises:
            RuntimeError: the GPU is lost.
        """
        if self._tuned >= _MOST_TUNED:
            return {}
        self._tuned += 1
        ranked = self._chooser.ranked(spec)
        worth = _WORTH_TRYING * min(strategy.seconds(spec) for strategy in ranked)
        candidates = [
            strategy
            for strategy in ranked
            if strategy.seconds(spec) <= worth or strategy.name == self._chooser.preferred
        ]
        # All are asked before one is waited for, so that they are compiled side by side.
        for strategy in candidates:
            strategy.is_ready(spec, False)
        seconds: dict[str, float] = {}
        for strategy in candidates:
            if not strategy.is_ready(spec, True):
                continue
            try:
                taken = self._time(spec, strategy, run, (first, second, bias), min(seconds.values(), default=None))
            except RuntimeError as error:
                if blame(error) == "device":
                    raise
                LOGGER.info("%s of %s was not timed: %s", strategy.name, spec, error)
                continue
            if taken is not None:
                seconds[strategy.name] = taken
        if seconds:
            self.timings.enter(spec, seconds)
            fastest = min(seconds, key=lambda name: seconds[name])
            LOGGER.info("%s: %s is the fastest of %d, %.3g ms", spec, fastest, len(seconds), 1e3 * seconds[fastest])
        return seconds

    def _time(
        self,
        spec: ConvSpec,
        strategy: Strategy,
        run: Run,
        operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        best: float | None,
    ) -> float | None:
        """The median of some calls, None for a wrong result: correctness goes before speed."""
        first, second, bias = operands
        known = self._guard.verdicts.of(spec, strategy.name)
        if known is not None and known.is_bad:
            return None
        if not self._guard.trusts(spec, strategy):
            verdict, result = self._guard.first_call(spec, strategy, lambda: run(strategy), first, second, bias)
            if result is None or verdict.is_bad:
                return None
        else:
            judged = reference.judge(spec, first, second, run(strategy), strategy.rtol[spec.dtype], bias)
            if judged.kind not in ("ok", "unknown"):
                LOGGER.warning("%s of %s is left out, its result is wrong: %s", strategy.name, spec, judged.detail)
                return None
        taken = [_once(strategy, run, first)]
        if best is None or taken[0] < _HOPELESS * best:
            taken = [_once(strategy, run, first) for _ in range(_REPEATS)]
        return sorted(taken)[len(taken) // 2]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]


def _once(strategy: Strategy, run: Run, operand: torch.Tensor) -> float:
    """Seconds of one call: the device's own where there is one, which other work of the host does not change."""
    if not operand.is_cuda:
        start = time.perf_counter()
        run(strategy)
        return time.perf_counter() - start
    with torch.cuda.device(operand.device):
        # Until the host has started the call the device is kept busy.
        torch.cuda._sleep(int(_AHEAD_MS * _cycles_a_ms(operand.device)))  # type: ignore[no-untyped-call, unused-ignore]
        begin, end = _event(), _event()
        begin.record()
        run(strategy)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@cache
def _cycles_a_ms(device: torch.device) -> float:
    """What `torch.cuda._sleep` counts differs from GPU to GPU."""
    taken = []
    for _ in range(3):
        begin, end = _event(), _event()
        begin.record()
        torch.cuda._sleep(_CYCLES)  # type: ignore[no-untyped-call, unused-ignore]
        end.record()
        end.synchronize()
        taken.append(float(begin.elapsed_time(end)))
    return _CYCLES / max(min(taken), 1e-3)


def _starts_on() -> bool:
    """Whether this build of torch starts with the flag on (`benchmark_cudnn` in aten's Context.h)."""
    if torch.version.hip is None:
        return False
    numbers = torch.__version__.split("+")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdecimal()) <= (2, 6)

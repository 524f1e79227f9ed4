"""The sandbox's child process: runs a strategy on random operands and judges the result.

Says by a pipe what it is at, one line of JSON each: `ready`; for each request `calling` and `called` per call,
`judging`, and `result`. What it is at when it dies or stops says whom to blame.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rocm_patch import settings
from rocm_patch.conv import GROUPED, IM2COL, NATIVE, STRATEGIES, Strategy
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, ConvSpec
from rocm_patch.conv.strategy import workspace_budget
from rocm_patch.trust import fault, reference
from rocm_patch.trust.native_errors import blame

# Multiply-adds in float64 that take the CPU a few seconds, and a GPU that does 0.4 TFLOPS in float64 (RX 5600 XT).
_MOST_ON_CPU, _MOST_ON_GPU = 2e9, 1e12
# Share of the free memory that a reference may take, and share of all memory that has to be free for a device to
# count as empty: a desktop takes some.
_SHARE = 0.8
_EMPTY_SHARE = 0.75
# The result of a float64 convolution may be this far from samples computed one by one.
_REFERENCE_RTOL = 1e-10

_Tell = Callable[..., None]


@dataclass(frozen=True)
class _Answer:
    """The fields of a `Trial`, and whether this process has lost its device."""

    kind: str
    evidence: str = ""
    seconds: float = 0.0
    error: float = math.nan
    calls: int = 0
    lost: bool = False


def main(requests: int, answers: int, device: str) -> None:
    """Serve requests until nobody asks any more, or the device is lost.

    Args:
        requests: descriptor to read from.
        answers: descriptor to write to.
        device: torch's name of the device to try strategies on.
    """

    def tell(phase: str, **fields: Any) -> None:
        os.write(answers, json.dumps({"phase": phase, **fields}).encode() + b"\n")

    # Some of torch's functions want a number.
    device = "cuda:0" if device == "cuda" else device
    failure = fault.parse(os.environ.get("ROCM_PATCH_FAULT"))
    try:
        _control(device)
    except RuntimeError as error:
        tell("unusable", evidence=_first_line(error), lasts=blame(error) != "memory")
        return
    tell("ready")
    with open(requests, encoding="utf-8") as lines:
        for line in lines:
            with torch.no_grad():
                answer = _try(json.loads(line), device, failure, tell)
            tell("result", **vars(answer))
            if answer.lost:
                return
            if device.startswith("cuda"):
                torch.cuda.empty_cache()


def _control(device: str) -> None:
    """Compute what any device can that works, with no library's help."""
    odd = torch.arange(4096, device=device) * 2 + 1
    if int(odd.sum()) != 4096**2:
        raise RuntimeError(f"1 + 3 + 5 + ... is {int(odd.sum())} on it, not {4096**2}")


def _try(request: Mapping[str, Any], device: str, failure: fault.Fault | None, tell: _Tell) -> _Answer:
    named = {strategy.name: strategy for strategy in (NATIVE, *STRATEGIES)}
    strategy = named.get(request["strategy"])
    if strategy is None:
        return _Answer("unknown", f"no strategy is called {request['strategy']!r}")
    try:
        spec = ConvSpec.from_json(request["spec"], device)
        refusal = strategy.rejects(spec)
        if refusal is not None:
            return _Answer("unknown", f"{strategy.name} does not serve it: {refusal}")
        if not strategy.is_ready(spec, True):
            return _Answer("unknown", f"{strategy.name} cannot be compiled: {strategy.rejects(spec)}")
        if spec.dtype not in strategy.rtol:
            return _Answer("unknown", f"{strategy.name} promises no accuracy for {spec.dtype}")
        needed, free = _bytes(spec), _free(device)
        if needed > free:
            return _Answer("unknown", f"takes {needed / 2**30:.3g} GiB of memory, {free / 2**30:.3g} GiB are free")
        is_empty = device == "cpu" or free > _EMPTY_SHARE * torch.cuda.mem_get_info(device)[1]
        first, second = _operands(spec)
        _synchronize(device)
    except Exception as error:  # noqa: BLE001  (no operands, no trial: whatever it is, it is said in the answer)
        return _Answer("unknown", f"no operands: {_first_line(error)}", lost=_is_lost(error))
    run = partial(strategy.run, spec, first, second, _budget(first.device))
    if failure is not None and strategy is NATIVE:
        run = partial(failure.around, spec.direction, run)
    try:
        earliest, latest, times = _run(run, device, request["calls"], request["seconds"], tell)
    except Exception as error:  # noqa: BLE001  (what a strategy raises is the answer)
        return _raised(error, is_empty)
    tell("judging")
    seconds, calls = statistics.median(times[1:] or times), len(times)
    try:
        judged = _judge(spec, strategy, first, second, [r for r in (earliest, latest) if r is not None])
    except Exception as error:  # noqa: BLE001  (no reference, no verdict: whatever it is, it is said in the answer)
        judged = _Answer("unknown", f"no reference: {_first_line(error)}", lost=_is_lost(error))
    return replace(judged, seconds=seconds, calls=calls)


def _run(
    run: Callable[[], torch.Tensor], device: str, calls: int, seconds: float, tell: _Tell
) -> tuple[torch.Tensor | None, torch.Tensor, list[float]]:
    """The first result, on the CPU, where there is more than one; the last one; the seconds of each call."""
    earliest: torch.Tensor | None = None
    times: list[float] = []
    end = time.monotonic() + seconds
    while True:
        tell("calling")
        start = time.perf_counter()
        result = run()
        tell("called")
        _synchronize(device)
        times.append(time.perf_counter() - start)
        if len(times) >= calls or time.monotonic() >= end:
            return earliest, result, times
        if earliest is None:
            earliest = result.cpu()
        del result  # the next call finds the memory that the first one found


def _raised(error: Exception, is_empty: bool) -> _Answer:
    """What an exception of a strategy says of it."""
    culprit = blame(error) if isinstance(error, RuntimeError) else "caller"
    text = f"{type(error).__name__}: {_first_line(error)}"
    if culprit == "memory" and not is_empty:
        return _Answer("unknown", f"{text}; others hold memory of the device")
    return _Answer("crash" if culprit == "device" else "error", text, lost=culprit == "device")


def _is_lost(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and blame(error) == "device"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _judge(
    spec: ConvSpec, strategy: Strategy, first: torch.Tensor, second: torch.Tensor, results: list[torch.Tensor]
) -> _Answer:
    """Compare with our own convolution in float64, or samples of it where that takes too much."""
    bound, worst = strategy.rtol[spec.dtype], 0.0
    exact: torch.Tensor | None = None
    for index, result in enumerate(results):
        # Finds wrong shapes, and NaN for which there is no reason.
        sampled = reference.judge(spec, first, second, result, bound)
        if sampled.kind != "ok":
            return _Answer(sampled.kind, sampled.detail, error=sampled.error)
        if index == 0:
            exact = _exact(spec, first, second)
        error = sampled.error if exact is None else _relative_error(result, exact)
        if exact is not None and not error <= bound:
            return _accuse(spec, first, second, exact, error, bound)
        worst = max(worst, error)
    return _Answer("ok", error=worst)


def _accuse(
    spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, exact: torch.Tensor, error: float, bound: float
) -> _Answer:
    """`wrong`, provided that the reference is right: on a GPU it comes from a library that is on trial as well."""
    wide = replace(spec, dtype="float64")
    checked = reference.judge(wide, first.double(), second.double(), exact, _REFERENCE_RTOL)
    if checked.kind != "ok":
        return _Answer("unknown", f"float64 is wrong on this device: {checked.detail}")
    return _Answer("wrong", f"relative error {error:.2g} over all elements (bound {bound:.2g})", error=error)


def _budget(device: torch.device) -> int:
    return settings.from_environ().workspace or workspace_budget(device)


def _exact(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """The result in float64, on the CPU if it is small enough, else on the device; None where it has no place.

    No float64 convolution of torch's uses MIOpen, and this one uses products of matrices only.
    """
    products = math.prod(spec.grad) * spec.weight[1] * spec.taps
    device = torch.device("cpu") if products <= _MOST_ON_CPU else first.device
    if products > (_MOST_ON_CPU if device.type == "cpu" else _MOST_ON_GPU):
        return None
    wide = replace(spec, dtype="float64", device=str(device), channels_last=False)
    budget = _budget(device)
    strategy = IM2COL if spec.groups == 1 else GROUPED
    result_bytes = 8 * math.prod(spec.result)
    # The result of the trial is made float64 too, and subtracted.
    needed = _bytes(wide) + 2 * result_bytes + strategy.workspace_bytes(wide, budget)
    if needed > _SHARE * _free(str(device)):
        return None
    try:
        operands = [operand.to(device, torch.float64).contiguous() for operand in (first, second)]
        return strategy.run(wide, operands[0], operands[1], budget)
    except RuntimeError as error:
        if blame(error) == "memory":
            return None
        raise


def _relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """||result - exact|| / ||exact||, Frobenius; an exact zero has to be met exactly."""
    difference = float((result.to(exact.device, torch.float64) - exact).norm())
    norm = float(exact.norm())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def _operands(spec: ConvSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The same ones for the same spec."""
    shapes = {
        FORWARD: (spec.image, spec.weight),
        GRAD_INPUT: (spec.grad, spec.weight),
    }.get(spec.direction, (spec.image, spec.grad))
    generator = torch.Generator(device=spec.device)
    generator.manual_seed(zlib.crc32(spec.to_json().encode()))
    return _random(spec, shapes[0], generator), _random(spec, shapes[1], generator)


def _random(spec: ConvSpec, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    wanted = getattr(torch, spec.dtype)
    # torch 1.13 draws no half types on the CPU.
    drawn = torch.float32 if spec.device == "cpu" and spec.itemsize == 2 else wanted
    values = torch.randn(shape, generator=generator, dtype=drawn, device=spec.device).to(wanted)
    if spec.channels_last and len(shape) in (4, 5):
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=memory_format)
    return values


def _bytes(spec: ConvSpec) -> int:
    """What operands and result take."""
    return spec.itemsize * sum(map(math.prod, (spec.image, spec.weight, spec.grad)))


def _free(device: str) -> int:
    """Bytes of memory that can be had."""
    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)

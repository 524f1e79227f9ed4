"""`rocm-patch demo --faults`: watch injected failures being survived, remembered and avoided.

A small training program runs with a failure in its native convolutions, under `rocm-patch run --restart`, twice. The
first run meets the failure and ends right all the same; the second does not go near it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import RocmPatchError
from rocm_patch.trust.store import Store

SCHEMA_VERSION = 1
PROGRAM = Path(__file__).with_name("demo_program.py")
# Each kind, the number of calls that work first, and the verdict that has to come of it.
FAULTS: dict[str, tuple[int, str]] = {
    "error": (0, "error"),
    "segfault": (0, "crash"),
    "abort": (0, "crash"),
    "spin": (0, "hang"),
    "hang": (0, "hang"),
    "hang-after-100": (100, "hang"),
    "segfault-after-100": (100, "crash"),
    "memory": (0, "error"),
    "nan": (0, "wrong"),
    "wrong": (0, "wrong"),
}
DIRECTIONS = ("forward", "grad_input", "grad_weight")
_LIMITS = {"ROCM_PATCH_HANG_LIMIT": "2", "ROCM_PATCH_BUSY_LIMIT": "5"}
_STEPS = 60  # two convolutions a step: more than 100 calls in each direction
_TIMEOUT = 240.0
# Losses of native and bypassed training part by rounding.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """What came of one failure.

    Attributes:
        fault: its name in `FAULTS`.
        direction: where it was.
        first: how the first run went, in words.
        verdicts: the kinds of bad verdicts that stand after both runs, in alphabetical order.
        first_exit: its exit code.
        restarts: how often the program was started again.
        second_faults: how often the second run met the failure.
        second_exit: its exit code.
        loss_error: largest relative difference of the two runs' losses from a run without failures.
        seconds: what both runs took.
    """

    fault: str
    direction: str
    first: str
    verdicts: tuple[str, ...]
    first_exit: int
    restarts: int
    second_faults: int
    second_exit: int
    loss_error: float
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether both runs ended right, the failure was remembered, and the second run did not meet it."""
        ended = self.first_exit == self.second_exit == 0 and self.loss_error <= _TOLERANCE
        return ended and self.second_faults == 0 and FAULTS[self.fault][1] in self.verdicts


def run(
    backend: str,
    faults: Sequence[str] = tuple(FAULTS),
    directions: Sequence[str] = DIRECTIONS,
    jobs: int = 1,
    on_outcome: Callable[[Outcome], None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Try every failure in every direction.

    Args:
        backend: `cpu`, `cuda` or `hip`.
        faults: names in `FAULTS`.
        directions: of convolutions.
        jobs: how many are tried at once.
        on_outcome: called with each outcome when it is there.
        environ: the environment to start from; this process's by default.

    Raises:
        RocmPatchError: the program does not even run without a failure.
    """
    environ = dict(os.environ if environ is None else environ)
    right = _right_loss(backend, environ)
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        pairs = [(fault, direction) for fault in faults for direction in directions]
        for outcome in pool.map(lambda pair: _try(pair[0], pair[1], backend, right, environ), pairs):
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome)
    return outcomes


def _right_loss(backend: str, environ: Mapping[str, str]) -> float:
    with tempfile.TemporaryDirectory(prefix="rocm-patch-demo-") as cache:
        done = _program(backend, cache, environ, None)
        if done.returncode != 0:
            raise RocmPatchError(
                f"the demonstration does not run on {backend} without any failure:\n{done.stderr.strip()}",
                "rocm-patch doctor",
            )
        return float(_answer(done)["loss"])


def _try(fault: str, direction: str, backend: str, right: float, environ: Mapping[str, str]) -> Outcome:
    start = time.perf_counter()
    kind = fault.partition("-after-")[0]
    injected = f"{kind}:{direction}:after={FAULTS[fault][0]}"
    with tempfile.TemporaryDirectory(prefix="rocm-patch-demo-") as cache:
        # A GPU that stands still is a suspicion at first; the second run's sandbox makes a verdict of it.
        first, second = (_program(backend, cache, environ, injected) for _ in range(2))
        kinds = {row.verdict.kind for row in Store(Path(cache)).rows() if row.verdict.is_bad}
    restarts = first.stderr.count("starting it again on the bypass")
    losses = [float(_answer(done)["loss"]) for done in (first, second)]
    errors = [abs(loss - right) / abs(right) if math.isfinite(loss) else math.inf for loss in losses]
    return Outcome(
        fault, direction, _in_words(first, restarts), tuple(sorted(kinds)), first.returncode, restarts,
        int(_answer(second)["faults"]), second.returncode, max(errors), round(time.perf_counter() - start, 1),
    )  # fmt: skip


def _in_words(done: subprocess.CompletedProcess[str], restarts: int) -> str:
    if done.returncode != 0:
        return f"ended with exit code {done.returncode}"
    return f"started again {'once' if restarts == 1 else f'{restarts} times'}" if restarts else "went on"


def _program(
    backend: str, cache: str, environ: Mapping[str, str], fault: str | None
) -> subprocess.CompletedProcess[str]:
    device = "cpu" if backend == "cpu" else "cuda"
    command = [sys.executable, "-m", "rocm_patch", "run", "--restart", "--backend", backend, "--conv", "guarded"]
    child = {**environ, **_LIMITS, "ROCM_PATCH_CACHE_DIR": cache, "VIRTUAL_ENV": sys.prefix}
    if fault is not None:
        child["ROCM_PATCH_FAULT"] = fault
    return subprocess.run(
        [*command, str(PROGRAM), str(_STEPS), device],
        env=child, capture_output=True, text=True, timeout=_TIMEOUT, check=False,
    )  # fmt: skip


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"loss": math.nan, "faults": -1, "calls": {}}
    return answer


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table in Markdown, without what differs from run to run."""
    lines = ["| failure | direction | first run | remembered as | second run |", "| --- | --- | --- | --- | --- |"]
    for row in outcomes:
        second = "ended right" if row.second_exit == 0 else f"ended with exit code {row.second_exit}"
        second += f", met it {row.second_faults} times" if row.second_faults else ", never met it"
        first = row.first + (", ended right" if row.first_exit == 0 else "")
        lines.append(f"| {row.fault} | {row.direction} | {first} | {', '.join(row.verdicts)} | {second} |")
    return "\n".join(lines)


def document(outcomes: Sequence[Outcome], backend: str) -> dict[str, Any]:
    """The outcomes as the JSON document of the command line."""
    rows = [{**asdict(outcome), "is_right": outcome.is_right} for outcome in outcomes]
    return {"schema_version": SCHEMA_VERSION, "backend": backend, "rows": rows}

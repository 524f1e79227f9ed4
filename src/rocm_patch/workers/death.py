"""What ended a worker, in words."""

from __future__ import annotations

import contextlib
import resource
import signal
from typing import Any


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since the machine started; None where it does not say."""
    with contextlib.suppress(OSError), open("/proc/vmstat", encoding="ascii") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    return None


def described(worker: Any, oom_kills_before: int | None) -> str:
    """One sentence about a worker process that has ended.

    Args:
        worker: the `multiprocessing` process.
        oom_kills_before: what `oom_kills` returned when it was alive.
    """
    code = worker.exitcode
    who = f"DataLoader worker (pid {worker.pid})"
    if code is None or code >= 0:
        return f"{who} ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    text = f"{who} was killed by {name}"
    peak = getattr(getattr(worker, "_popen", None), "peak_bytes", None)
    if peak is None:  # forked by this process: of all its children, the largest
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    now = oom_kills()
    if -code == signal.SIGKILL and now is not None and oom_kills_before is not None and now > oom_kills_before:
        return (
            f"{text}: the machine or its container ran out of memory, and the worker had {peak / 2**20:,.0f} MiB\n"
            "hint: fewer workers (num_workers), a smaller prefetch_factor, or less held by the dataset"
        )
    if -code == signal.SIGBUS:
        return f"{text}: shared memory or a mapped file gave out\nhint: df -h /dev/shm; docker run --shm-size=8g"
    return f"{text} (it had {peak / 2**20:,.0f} MiB at most)"

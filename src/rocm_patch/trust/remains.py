"""What processes that are gone have left: verdicts where there is evidence, suspicions where there is none."""

from __future__ import annotations

from pathlib import Path

from rocm_patch.trust.journal import Remains, host_and_boot, left_behind
from rocm_patch.trust.store import Store, Verdict

# Frames that faulthandler writes for a crash inside a convolution: aten's called from us, or an algorithm of ours.
_INSIDE = ("rocm_patch/conv/", "rocm_patch/trust/fault.py")
# Of a process that has made ever new shapes, so many of its last ones.
MOST_SUSPECTS = 256


def _enter(store: Store, remains: Remains) -> None:
    """What a process that is gone has left, as verdicts where there is evidence and as suspicions where not.

    Evidence is a stack, written at the fatal signal, that lies inside the convolution; or a restart of the machine
    while an unproven call was in flight. All else, the OOM killer and a scheduler's SIGKILL among it, looks like a
    crash and need not be one: the sandbox will tell.
    """
    host, boot = host_and_boot()
    stack = [line.strip() for line in remains.stack.splitlines() if line.strip()]
    top = [line for line in stack if line.startswith("File ")][:3]
    calls = remains.attempt or remains.proven
    # Of two directions that are one call to aten, either may have been the one.
    crashed_inside = len(calls) == 1 and any(part in line for line in top for part in _INSIDE)
    restarted = bool(remains.attempt and remains.host and remains.host == host and remains.boot != boot)
    how = "was running" if remains.attempt else "was started last"
    if stack and not remains.attempt and not crashed_inside:
        # A fault of the GPU shows later than it is made: any of them may have been the one.
        calls, how = remains.listed[-MOST_SUSPECTS:], "had been made"
    for call in calls:
        if crashed_inside or restarted:
            why = "the process died in this call" if crashed_inside else "the machine went down while this call ran"
            verdict = Verdict("crash", evidence="\n".join([why, *stack[:8]]))
            store.put(call.machine, call.spec, call.label, call.strategy, verdict)
        else:
            why = f"this call {how} when its process disappeared"
            store.suspect(call.machine, call.spec, call.label, call.strategy, "\n".join([why, *stack[:8]]))


def settle(store: Store, folder: Path) -> list[Remains]:
    """Enter all that lies in a folder of journals, and remove it from there; it is returned."""
    found = []
    for remains in left_behind(folder):
        _enter(store, remains)
        found.append(remains)
    return found

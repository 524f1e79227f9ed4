"""What processes that are gone have left: verdicts where there is evidence, suspicions where there is none."""

from __future__ import annotations

from pathlib import Path

from rocm_patch.trust.journal import Remains, host_and_boot, left_behind
from rocm_patch.trust.store import Store, Verdict

# Frames that faulthandler writes for a crash inside a convolution: aten's called from us, or an algorithm of ours.
_INSIDE = ("rocm_patch/conv/", "rocm_patch/trust/fault.py")


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
    for call in calls:
        if crashed_inside:
            evidence = "\n".join(["the process died in this call", *stack[:8]])
        elif restarted:
            evidence = "the machine went down while this call was running"
        else:
            how = "was started last" if not remains.attempt else "was running"
            store.suspect(
                call.machine, call.spec, call.label, call.strategy,
                "\n".join([f"this call {how} when its process disappeared", *stack[:8]]),
            )  # fmt: skip
            continue
        verdict = Verdict("crash", evidence=evidence)
        store.put(call.machine, call.spec, call.label, call.strategy, verdict)


def settle(store: Store, folder: Path) -> list[Remains]:
    """Enter all that lies in a folder of journals, and remove it from there; it is returned."""
    found = []
    for remains in left_behind(folder):
        _enter(store, remains)
        found.append(remains)
    return found

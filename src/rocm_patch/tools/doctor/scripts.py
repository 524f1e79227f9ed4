"""Settings that a Python script makes too late: ROCm reads its variables once, when torch starts it."""

from __future__ import annotations

import shlex

from rocm_patch.tools.check import files, late
from rocm_patch.tools.check.flow import steps
from rocm_patch.tools.check.names import Names
from rocm_patch.tools.doctor.finding import Finding


def late_settings(text: str, name: str) -> list[Finding]:
    """Variables of ROCm, MIOpen or torch that a script sets after it imports torch.

    Args:
        text: the script.
        name: its path, for the findings.
    """
    try:
        names = Names(files.parse(text.encode()).tree)
        found = list(late.variables(steps(names), names))
    except (files.UnreadableError, RecursionError) as error:
        return [
            Finding(
                "late_settings",
                "failure",
                f"{name} is not a Python script: {error}",
                fix=f"python -m py_compile {name}",
            )
        ]
    return [_finding(entry, name) for entry in found] or [
        Finding("late_settings", "ok", f"{name} sets no variable too late")
    ]


def _finding(entry: late.Late, name: str) -> Finding:
    line = getattr(entry.node, "lineno", 1)
    return Finding(
        "late_settings",
        "warning",
        f"{name}, line {line}: {entry.name} is set after torch is imported (line {entry.imported})",
        f"{late.readers(entry)} when torch is imported or first uses the GPU, so it may have no effect there; set it "
        "before the import, or in the shell",
        f"rocm-patch check {shlex.quote(name)}",
        "; ".join(entry.known.sources[:2]) if entry.known else "",
    )

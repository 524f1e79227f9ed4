"""Settings that a Python script makes too late: ROCm reads its variables once, when torch starts it."""

from __future__ import annotations

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
    reader = entry.known.component if entry.known else "the library that knows it"
    return Finding(
        "late_settings",
        "warning",
        f"{name}, line {line}: {entry.name} is set after torch is imported (line {entry.imported})",
        f"{reader} reads it once, so it has no effect there; set it before "
        "the import, or start the script by rocm-patch run",
        f"rocm-patch run {name}",
        "; ".join(entry.known.sources[:2]) if entry.known else "",
    )

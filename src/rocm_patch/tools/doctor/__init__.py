"""`rocm-patch doctor`: what this machine is, what would be on, and what is in the way.

Each check is a function from a `Context` to findings, in the file of its subject; a check that itself fails is a
finding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rocm_patch.errors import RocmPatchError
from rocm_patch.launch.run import program_build
from rocm_patch.machine import catalog, hardware
from rocm_patch.settings import Settings
from rocm_patch.tools import logs
from rocm_patch.tools.doctor import code, driver, patches, scripts, software, system
from rocm_patch.tools.doctor.finding import Check, Context, Finding

SCHEMA_VERSION = 1
CHECKS: tuple[Check, ...] = (*driver.CHECKS, *software.CHECKS, *code.CHECKS, *system.CHECKS, *patches.CHECKS)


def examine(settings: Settings, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Run every check."""
    environ = os.environ if environ is None else environ
    machine = hardware.read_machine(settings.sysfs_root, environ.get("HOME"))
    python, build = program_build(environ)
    context = Context(machine, python, build, settings, environ)
    return [finding for check in CHECKS for finding in _findings(check, context)]


def _findings(check: Check, context: Context) -> list[Finding]:
    try:
        return [dataclasses.replace(finding, check=check.__name__) for finding in check(context)]
    except (OSError, ValueError, LookupError, RocmPatchError) as error:
        return [
            Finding(check.__name__, "warning", f"this check failed: {type(error).__name__}: {error}",
                    "please report it", "rocm-patch report --json -o report.json")
        ]  # fmt: skip


def examine_log(path: Path | None, settings: Settings) -> list[Finding]:
    """The known issues that a log or traceback shows, and what a Python script sets too late.

    Args:
        path: the file; None or `-` for standard input.
        settings: `sysfs_root` says which machine's chips count where the text names none.

    Raises:
        UsageError: the file cannot be read.
    """
    text = logs.read_log(path)
    if path is not None and path.suffix == ".py":
        return scripts.late_settings(text, str(path))
    chips = [gpu.gfx for gpu in hardware.read_machine(settings.sysfs_root).gpus]
    found = logs.match(text, chips)
    if not found:
        summary = f"none of the {len(catalog.issues())} known issues is in this log"
        return [Finding("log", "ok", summary)]
    return [
        Finding(match.issue.id, "warning", f"line {match.line_number}: {match.line}",
                f"{match.issue.title}. {match.issue.cause} {match.issue.workaround}".strip(),
                match.issue.fix, "; ".join(match.issue.sources))
        for match in found
    ]  # fmt: skip


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as the JSON document of the command line."""
    return {"schema_version": SCHEMA_VERSION, "findings": [dataclasses.asdict(finding) for finding in findings]}

"""`rocm-patch scan`: what GPU code files carry, and what of it this card cannot run safely."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rocm_patch.errors import UsageError
from rocm_patch.launch.run import program_build
from rocm_patch.machine import catalog, fit, hardware
from rocm_patch.machine.build import TorchBuild
from rocm_patch.machine.environment import plan
from rocm_patch.machine.scan import hazards, places, scanning
from rocm_patch.machine.scan.scanning import Library, Progress, Question, Scan
from rocm_patch.machine.visibility import visible_gpus
from rocm_patch.settings import Settings
from rocm_patch.trust.fingerprint import override_for

SCHEMA_VERSION = 1
NO_OVERRIDE = "none"


def question_of(
    settings: Settings, environ: Mapping[str, str], build: TorchBuild | None, card: str = "", override: str = ""
) -> Question:
    """For which card, and under which override: those named, else this machine's.

    Args:
        settings: `sysfs_root` stands for `/`.
        environ: the user's environment, whose override counts.
        build: the torch that would run, for the override that the plan would set.
        card: a chip, `gfx1010`; empty for the first card of this machine that programs see.
        override: `10.3.0`; `none` for none; empty for the one in force or planned.

    Raises:
        UsageError: the card is not known, or the override is no value that the driver understands.
    """
    if card and catalog.arch(card) is None:
        known = ", ".join(row.gfx for row in catalog.archs())
        raise UsageError(f"unknown card {card!r}; known are {known}", "rocm-patch scan --card gfx1010")
    if override and override != NO_OVERRIDE and not fit.override_target(override):
        raise UsageError(f"{override!r} is no override", f"--override 10.3.0, or --override {NO_OVERRIDE}")
    machine = hardware.read_machine(settings.sysfs_root)
    gpus = sorted(visible_gpus(machine.gpus, environ), key=lambda gpu: gpu.integrated)
    gpu = next((gpu for gpu in gpus if not card or gpu.gfx == card), None)
    chip = card or (gpu.gfx if gpu else "")
    if override or not chip:
        return Question(chip, "" if override == NO_OVERRIDE else override)
    if gpu is None:  # a card that is not here: what it would need
        known_card = catalog.arch(chip)
        return Question(chip, known_card.override if known_card else "")
    wanted = dict(environ)
    wanted |= {c.name: c.value for c in plan(machine, build, settings, environ).changes if c.changes}
    return Question(chip, override_for(gpu, wanted))


def run(
    paths: Sequence[Path],
    settings: Settings,
    environ: Mapping[str, str],
    card: str = "",
    override: str = "",
    again: bool = False,
    jobs: int = 0,
    progress: Progress | None = None,
) -> Scan:
    """Scan what is named, else the installed torch, ROCm's libraries and the caches of compiled kernels.

    Raises:
        UsageError: a path is not there, or the card or the override is none.
    """
    gone = [path for path in paths if not os.path.lexists(path)]
    if gone:
        raise UsageError(f"cannot scan {gone[0]}: no such file or folder", "rocm-patch scan PATH, or scan alone")
    build = program_build(environ)[1]
    question = question_of(settings, environ, build, card, override)
    where = paths or places.default_places(build.folder if build else None, environ, settings.sysfs_root)
    return scanning.scan(where, question, environ, progress, again, jobs)


def document(scan: Scan) -> dict[str, Any]:
    """The scan as the JSON document of the command line."""
    question = scan.question
    rules = [row for row in catalog.hazards() if question.card in row.archs]
    return {
        "schema_version": SCHEMA_VERSION,
        "card": question.card or None,
        "override": question.override or None,
        "reported": question.reported or None,
        "bytes": scan.bytes,
        "libraries": [_row(library, question) for library in scan.libraries],
        "rules": [asdict(row) for row in rules],
    }


def _row(library: Library, question: Question) -> dict[str, Any]:
    content = library.content
    found = library.harm(question)
    answer = library.answer(question) if question.card else None
    return {
        "name": library.name,
        "path": str(library.folder),
        "files": library.files,
        "answer": answer.kind if answer else None,
        "summary": answer.words if answer else None,
        "targets": {target: asdict(amount) for target, amount in sorted(content.targets.items())},
        "hazards": None if not found.examined else _hazards(found),
        "notes": content.notes,
    }


def _hazards(found: hazards.Examination) -> dict[str, Any]:
    fields = asdict(found)
    worst = sorted(found.kernels, key=lambda kernel: kernel.rank)
    return {**fields, "clean": found.clean, "kernels": [asdict(kernel) for kernel in worst]}

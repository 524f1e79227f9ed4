"""A check's result, and what every check is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rocm_patch.machine import environment, fit
from rocm_patch.machine.build import Libraries, TorchBuild, find_libraries
from rocm_patch.machine.fit import Fit
from rocm_patch.machine.hardware import Machine
from rocm_patch.machine.visibility import visible_gpus
from rocm_patch.settings import Settings


@dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
        check: the check's name.
        level: `ok`, `warning` or `failure`.
        summary: what is so.
        why: what follows from it.
        fix: the shell command that mends it.
        source: where that is known from.
    """

    check: str
    level: str
    summary: str
    why: str = ""
    fix: str = ""
    source: str = ""


def ok(summary: str, why: str = "", fix: str = "", source: str = "") -> Finding:
    """Something is as it should be. Which check says so, `examine` puts in."""
    return Finding("", "ok", summary, why, fix, source)


def warning(summary: str, why: str, fix: str, source: str = "") -> Finding:
    """Something may go wrong, or is worse than it could be."""
    return Finding("", "warning", summary, why, fix, source)


def failure(summary: str, why: str, fix: str, source: str = "") -> Finding:
    """The GPU cannot be used like this."""
    return Finding("", "failure", summary, why, fix, source)


@dataclass(frozen=True)
class Context:
    """What the checks look at.

    Attributes:
        machine: the hardware.
        python: the program's Python.
        build: the torch that this Python would import.
        settings: the user's choices; `sysfs_root` stands for `/` in every check.
        environ: the user's environment.
    """

    machine: Machine
    python: str
    build: TorchBuild | None
    settings: Settings
    environ: Mapping[str, str]

    @property
    def root(self) -> Path:
        """The folder that stands for `/`."""
        return Path(self.settings.sysfs_root)

    @property
    def has_card(self) -> bool:
        """Whether an AMD GPU is here that programs should use, whether or not a driver has it.

        An integrated one beside an NVIDIA card is not: it drives the display. Which kind a device is that the
        compute driver does not list cannot be told.
        """
        machine = self.machine
        has_discrete = any(not gpu.integrated for gpu in machine.gpus)
        has_any = bool(machine.gpus or machine.unlisted or machine.dxg)
        return has_discrete or (has_any and not machine.has_nvidia)

    @cached_property
    def fits(self) -> list[Fit]:
        """How the build fits each GPU that is visible; empty without a HIP build."""
        if self.build is None or self.build.kind != "hip":
            return []
        return [fit.fit(gpu, self.build) for gpu in visible_gpus(self.machine.gpus, self.environ)]

    @cached_property
    def planned(self) -> Mapping[str, str]:
        """The environment that programs get under rocm-patch run."""
        plan = environment.plan(self.machine, self.build, self.settings, self.environ)
        return {**self.environ, **{change.name: change.value for change in plan.changes if change.changes}}

    @cached_property
    def used(self) -> list[Fit]:
        """Those of them that programs see under rocm-patch run; all where the plan hides none."""
        shown = visible_gpus(self.machine.gpus, self.planned)
        return [entry for entry in self.fits if entry.gpu in shown] or self.fits

    @cached_property
    def libraries(self) -> Libraries:
        """The data files of rocBLAS and MIOpen that the build would use."""
        return find_libraries(self.build, self.settings.sysfs_root)

    @cached_property
    def groups(self) -> dict[int, tuple[str, list[str]]]:
        """The system's groups: number to name and members, from `/etc/group`."""
        found: dict[int, tuple[str, list[str]]] = {}
        for words in _table(self.root / "etc/group"):
            if len(words) > 3 and words[2].isdecimal():
                found[int(words[2])] = (words[0], [name for name in words[3].split(",") if name])
        return found

    @cached_property
    def user(self) -> str:
        """The user's name from `/etc/passwd`, the number where there is none."""
        uid = str(os.getuid())
        return next((words[0] for words in _table(self.root / "etc/passwd") if words[2:3] == [uid]), uid)


Check = Callable[[Context], Iterable[Finding]]


def _table(path: Path) -> list[list[str]]:
    try:
        return [line.split(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return []

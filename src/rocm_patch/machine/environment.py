"""Which environment variables this machine needs: plan() is pure, apply() is trivial, the user's values win."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from rocm_patch.machine.build import TorchBuild, version_numbers
from rocm_patch.machine.hardware import Machine
from rocm_patch.settings import Settings

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
NATIVE_WHEEL_HINT = (
    "install a torch build with native code for this card: AMD's own wheel index has torch for gfx1010 to "
    "gfx1012 (https://github.com/ROCm/TheRock/blob/main/RELEASES.md)"
)


@dataclass(frozen=True)
class EnvChange:
    """One variable of the plan.

    Attributes:
        name: the variable.
        value: the value that the plan wants.
        why: what it does here, in words.
        source: where the fact comes from.
        found: the value that was there before, None if unset. A value of the user's is kept.
    """

    name: str
    value: str
    why: str
    source: str
    found: str | None = None

    @property
    def changes(self) -> bool:
        """Whether applying sets anything: False where the variable has a value already."""
        return self.found is None

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.name}={self.value} set: {self.why}"
        if self.found == self.value:
            return f"{self.name}={self.value} was set already: {self.why}"
        return f"{self.name}={self.found} kept, the plan's value is {self.value}: {self.why}"


@dataclass(frozen=True)
class Plan:
    """The variables for one machine and build, and what the user must know beside them."""

    changes: tuple[EnvChange, ...]
    notices: tuple[str, ...] = ()


# The four variables of docs/PATCHES_V1.1_SUMMARY.md, each with what its own source code says of it.
_DOCUMENT = (
    EnvChange(
        "MIOPEN_DEBUG_CONV_IMPLICIT_GEMM",
        "1",
        "leaves MIOpen's implicit GEMM solvers on, which is MIOpen's default; only 0 changes anything",
        "MIOpen rocm-5.2.0 src/ocl/convolutionocl.cpp, src/include/miopen/env.hpp",
    ),
    EnvChange(
        OVERRIDE,
        "10.3.0",
        "makes the card pass for gfx1030, the nearest chip that torch 1.13.1+rocm5.2 carries code for; that code "
        "lacks the work-arounds for gfx101x hardware bugs, so a native build is better where there is one",
        "ROCR-Runtime isa.cpp; LLVM AMDGPU features of gfx1010 and gfx1030",
    ),
    EnvChange(
        "HSA_USE_SVM",
        "0",
        "asks for no shared virtual memory; ROCm knows this variable from 6.1 on, before that it is inert",
        "ROCm/ROCT-Thunk-Interface commit 7eaddcb; absent at rocm-5.2.0",
    ),
    EnvChange(
        "HSA_XNACK",
        "0",
        "asks for no retryable page faults; unset leaves the driver's default",
        "ROCR-Runtime core/util/flag.h, docs/data/env_variables.rst",
    ),
)
# The override is known to work up to this pair only (pytorch#106728, ROCm#2527).
_LAST_OVERRIDE_TORCH = (1, 13, 1)
_LAST_OVERRIDE_HIP = (5, 2)


def plan(machine: Machine, build: TorchBuild | None, settings: Settings, environ: Mapping[str, str]) -> Plan:
    """The variables to set for this machine and build. Reads its arguments only; changes nothing."""
    wanted, notices = _wanted(machine, build, settings)
    return Plan(
        tuple(dataclasses.replace(change, found=environ.get(change.name)) for change in wanted),
        tuple(notices),
    )


def _wanted(
    machine: Machine, build: TorchBuild | None, settings: Settings
) -> tuple[tuple[EnvChange, ...], list[str]]:
    if settings.profile == "none" or not settings.enabled:
        return (), []
    if settings.profile == "document" or not machine.can_have_amd_gpu:
        return _DOCUMENT, []
    if not machine.has_rdna1:
        return (), []
    without_override = tuple(change for change in _DOCUMENT if change.name != OVERRIDE)
    if build is None:
        return without_override, []
    chips = sorted({gpu.gfx for gpu in machine.gpus if gpu.is_rdna1})
    if build.kind == "hip" and all(build.carries(gfx) for gfx in chips):
        return without_override, []
    is_old_enough = (
        build.kind == "hip"
        and version_numbers(build.version)[:3] <= _LAST_OVERRIDE_TORCH
        and version_numbers(build.hip)[:2] <= _LAST_OVERRIDE_HIP
    )
    if is_old_enough:
        return _DOCUMENT, []
    notice = (
        f"torch {build.version} ({build.kind} build) shows no native code for {', '.join(chips)}, and "
        f"{OVERRIDE}=10.3.0 is known to work up to torch 1.13.1+rocm5.2 only; it is not set\n"
        f"hint: {NATIVE_WHEEL_HINT}"
    )
    return without_override, [notice]


def apply(changes: tuple[EnvChange, ...], environ: MutableMapping[str, str]) -> None:
    """Set what the plan sets; values that are there already stay."""
    for change in changes:
        if change.changes:
            environ[change.name] = change.value

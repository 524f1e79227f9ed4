"""`rocm-patch doctor`: what this machine is, what would be on, and what is in the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import RocmPatchError
from rocm_patch.launch import activate
from rocm_patch.launch.run import program_build
from rocm_patch.machine import backend, environment, hardware
from rocm_patch.machine.build import TorchBuild
from rocm_patch.machine.hardware import Machine
from rocm_patch.settings import Settings

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """One check's result: `level` is `ok`, `warning` or `failure`; `fix` the command that mends it."""

    check: str
    level: str
    summary: str
    why: str = ""
    fix: str = ""
    source: str = ""


@dataclass(frozen=True)
class _Context:
    machine: Machine
    python: str
    build: TorchBuild | None
    settings: Settings
    environ: Mapping[str, str]


def examine(settings: Settings, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Run every check. A check that itself fails is a finding."""
    machine = hardware.read_machine(settings.sysfs_root)
    environ = os.environ if environ is None else environ
    context = _Context(machine, *program_build(environ), settings, environ)
    findings: list[Finding] = []
    for check in _CHECKS:
        name = check.__name__.removeprefix("_check_")
        try:
            findings += check(context)
        except (OSError, ValueError, RocmPatchError) as error:
            findings.append(Finding(name, "warning", f"this check failed: {error}", fix="rocm-patch doctor --json"))
    return findings


def document(findings: list[Finding]) -> dict[str, Any]:
    """The findings as the JSON document of the command line."""
    return {"schema_version": SCHEMA_VERSION, "findings": [asdict(finding) for finding in findings]}


def _check_gpus(context: _Context) -> list[Finding]:
    machine = context.machine
    if machine.gpus:
        return [
            Finding("gpus", "ok", f"node {gpu.node}: {gpu.gfx}, {gpu.compute_units} compute units")
            for gpu in machine.gpus
        ]
    if machine.dxg:
        return [Finding("gpus", "ok", "WSL: the GPU is behind /dev/dxg, its chip cannot be read from here")]
    if machine.kfd:
        return [
            Finding("gpus", "failure", "/dev/kfd is here, but the driver lists no AMD GPU",
                    "the card is not supported by the kernel driver, or hidden from this container",
                    "sudo dmesg | grep -i kfd")
        ]  # fmt: skip
    return [Finding("gpus", "ok", "no AMD GPU: neither /dev/kfd nor /dev/dxg is here")]


def _check_kfd_access(context: _Context) -> list[Finding]:
    device = Path(context.settings.sysfs_root) / "dev/kfd"
    if not context.machine.kfd or os.access(device, os.R_OK | os.W_OK):
        return []
    return [
        Finding("kfd_access", "failure", f"{device} cannot be opened by this user",
                "ROCm programs see no GPU without it", "sudo usermod -aG render,video $USER, then log in again",
                "ROCm/TheRock docs/environment_setup_guide.md")
    ]  # fmt: skip


def _check_torch(context: _Context) -> list[Finding]:
    build = context.build
    if build is None:
        return [
            Finding("torch", "warning", f"{context.python} has no torch",
                    "the active environment's Python is looked at, else the first on PATH",
                    "activate the environment that has torch, then run rocm-patch doctor again")
        ]  # fmt: skip
    if build.kind != "hip" and context.machine.gpus:
        return [
            Finding("torch", "failure", f"torch {build.version} is a {build.kind} build on a machine with an AMD GPU",
                    "only a ROCm build can use the card", environment.NATIVE_WHEEL_HINT)
        ]  # fmt: skip
    return [Finding("torch", "ok", f"torch {build.version}, a {build.kind} build")]


def _check_convolutions(context: _Context) -> list[Finding]:
    activation = backend.decide(context.machine, context.build, context.settings)
    if activation.backend is None:
        return [Finding("convolutions", "ok", f"native: {activation.why}")]
    served = activation.strategy or activation.policy
    return [Finding("convolutions", "ok", f"{served} on {activation.backend}: {activation.why}")]


def _check_environment(context: _Context) -> list[Finding]:
    plan = environment.plan(context.machine, context.build, context.settings, context.environ)
    findings = [
        Finding("environment", "ok", str(change).partition(":")[0], change.why, source=change.source)
        for change in plan.changes
    ]
    for notice in plan.notices:
        summary, _, fix = notice.partition("\nhint: ")
        findings.append(Finding("environment", "warning", summary, fix=fix))
    return findings


def _check_activation(context: _Context) -> list[Finding]:
    try:
        venv = activate.environment_of(None, context.environ)
    except RocmPatchError:
        return []
    if not activate.is_active(venv):
        return [Finding("activation", "ok", f"{venv} is not activated: programs are patched by rocm-patch run")]
    off = "" if context.settings.enabled else ", switched off by ROCM_PATCH=0"
    return [
        Finding("activation", "ok", f"{venv} is activated: every program of it is patched{off}",
                fix="rocm-patch deactivate takes it back")
    ]  # fmt: skip


_CHECKS: tuple[Callable[[_Context], list[Finding]], ...] = (
    _check_gpus,
    _check_kfd_access,
    _check_torch,
    _check_convolutions,
    _check_environment,
    _check_activation,
)

"""What the user's own environment variables do to this machine and build: the harmful, the void and the forgotten.

The user's values win over the plan; this says what they cost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rocm_patch.machine import catalog
from rocm_patch.machine.build import TorchBuild, version_numbers
from rocm_patch.machine.fit import OVERRIDE, fit, native_torch_command, override_target
from rocm_patch.machine.hardware import Gpu, Machine
from rocm_patch.machine.visibility import VISIBILITY_VARIABLES, cut_off, kept_by_rocr, visible_gpus


@dataclass(frozen=True)
class Notice:
    """Something the user must know: what is so, why it matters, the command that mends it.

    Attributes:
        name: the variable, or `native_code`.
        level: `warning`, `failure` for what is reported to crash, `ok` for what does no harm.
    """

    name: str
    summary: str
    why: str
    fix: str
    source: str
    level: str = "warning"

    def __str__(self) -> str:
        return f"{self.summary}: {self.why}\nhint: {self.fix}"


def conflicts(machine: Machine, build: TorchBuild | None, environ: Mapping[str, str]) -> list[Notice]:
    """What is wrong with the variables that are set already, the most harmful first."""
    found: list[Notice] = []
    shown = visible_gpus(machine.gpus, environ)
    for name, value in sorted(environ.items()):
        stem, _, node = name.rpartition("_")
        is_per_node = stem == OVERRIDE and node.isdecimal()
        if name == OVERRIDE or is_per_node:
            gpus = [gpu for gpu in shown if not is_per_node or gpu.thunk_node == int(node)]
            found += _override(name, value, gpus, build)
        if name not in VISIBILITY_VARIABLES and (override_target(value) or OVERRIDE not in (name, stem)):
            found += _value(name, value, build)
    return found + (_visibility(machine, environ) if build is not None and build.kind == "hip" else [])


def _override(name: str, value: str, gpus: list[Gpu], build: TorchBuild | None) -> list[Notice]:
    fix = f"unset {name}"
    variable = catalog.variable(OVERRIDE)
    source = "; ".join(variable.sources[:2]) if variable else ""
    pretended = override_target(value)
    if not pretended:
        why = "the driver library refuses it and leaves the GPU out; it must be three numbers such as 10.3.0"
        return [Notice(name, f"{name}={value} is malformed", why, fix, source)]
    found = []
    for gpu in gpus:
        known = catalog.arch(gpu.gfx)
        if known is None or pretended == gpu.gfx:
            continue
        cited = "; ".join(known.sources[:2])
        entry = fit(gpu, build) if build is not None and build.kind == "hip" else None
        summary = f"{name}={value} on {gpu.gfx} ({gpu.name})"
        if value in known.harmful_overrides:
            why = f"reported to crash or hang this chip. {known.override_note}"
            found.append(Notice(name, summary, why, fix, cited, "failure"))
        elif entry and entry.kind == "native":
            why = f"not needed, {entry.why}; with it the card runs code for {pretended} instead"
            found.append(Notice(name, summary, why, fix, source))
        elif entry and not entry.is_usable and known.override:
            found.append(Notice(name, summary, entry.why, native_torch_command(gpu.gfx), cited))
        elif value != known.override:
            advice = f"{known.override} is what users report to work" if known.override else "none is known to work"
            found.append(Notice(name, summary, f"no report of it on this chip; {advice}", fix, cited))
    return found


def _value(name: str, value: str, build: TorchBuild | None) -> list[Notice]:
    """What the catalog says of one variable's value."""
    known = catalog.variable(name)
    if known is None:
        return []
    fix = f"unset {name}"
    source = "; ".join(known.sources[:2])
    if known.legal and not re.fullmatch(known.legal, value):
        why = f"{known.component} does not know this value. {known.meaning}"
        return [Notice(name, f"{name}={value} is not understood", why, fix, source)]
    if known.debugging and value not in ("", "0"):
        return [Notice(name, f"{name}={value} is left set", known.debugging, fix, source)]
    if (name, value) in _DOCUMENTED:
        return []
    if known.inert and re.fullmatch(known.inert, value):
        why = f"it is what holds without it ({known.default})"
        return [Notice(name, f"{name}={value} changes nothing", why, fix, source, "ok")]
    if build is None or build.kind != "hip":
        return []
    for component, version, since in (
        ("ROCm", build.hip, known.since_rocm),
        ("torch", build.version, known.since_torch),
    ):
        if since and version_numbers(version)[:2] < version_numbers(since)[:2]:
            why = f"this {component} does not know the variable, {component} {since} is the first that does"
            return [Notice(name, f"{name}={value} does nothing here", why, fix, source)]
    return []


# Inert where they are, but what the document sets; `env --explain` says what they do.
_DOCUMENTED = (("MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "1"), ("HSA_USE_SVM", "0"), ("HSA_XNACK", "0"))


def _visibility(machine: Machine, environ: Mapping[str, str]) -> list[Notice]:
    found = []
    counts = {
        "ROCR_VISIBLE_DEVICES": len(kept_by_rocr(machine.gpus, {})),
        "HIP_VISIBLE_DEVICES": len(kept_by_rocr(machine.gpus, environ)),
        "CUDA_VISIBLE_DEVICES": len(kept_by_rocr(machine.gpus, environ)),
    }
    for name, count in counts.items():
        value = environ.get(name)
        is_read = name != "CUDA_VISIBLE_DEVICES" or not environ.get("HIP_VISIBLE_DEVICES")
        if not value or not machine.gpus or not is_read:
            continue
        wrong = cut_off(value, count)
        if wrong is not None:
            left = [entry.strip() for entry in value.split(",")].index(wrong)
            among = (
                " that ROCR_VISIBLE_DEVICES leaves" if name[0] != "R" and "ROCR_VISIBLE_DEVICES" in environ else ""
            )
            why = f"{wrong!r} names none of the {count} GPUs{among}; it and the rest are dropped, {left} stay visible"
            variable = catalog.variable(name)
            source = "; ".join(variable.sources[:2]) if variable else ""
            found.append(Notice(name, f"{name}={value}", why, f"unset {name}", source))
    return found

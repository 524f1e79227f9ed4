"""What rocm-patch itself would do here: the environment plan, the user's own variables, convolutions, activation."""

from __future__ import annotations

from collections.abc import Iterable

from rocm_patch.errors import RocmPatchError
from rocm_patch.launch import activate
from rocm_patch.machine import backend, fit
from rocm_patch.machine import environment as plans
from rocm_patch.machine.folders import cache_folder
from rocm_patch.tools.doctor.finding import Context, Finding, ok
from rocm_patch.trust.store import Row, Store


def environment(context: Context) -> Iterable[Finding]:
    """The variables of the plan, and what the user's own do."""
    plan = plans.plan(context.machine, context.build, context.settings, context.environ)
    for change in plan.changes:
        kept = f"{change.name}={change.found} is set already" + (
            f", the plan's value is {change.value}" if change.found != change.value else ""
        )
        summary = f"rocm-patch run sets {change.name}={change.value}" if change.changes else kept
        yield ok(summary, change.why, source=change.source)
    for notice in plan.notices:
        # Cards without code have a finding of their own.
        if notice.name != "native_code":
            yield Finding("", notice.level, notice.summary, notice.why, notice.fix, notice.source)


def convolutions(context: Context) -> Iterable[Finding]:
    """Who would serve convolutions."""
    activation = backend.decide(context.machine, context.build, context.settings, context.environ)
    served = activation.strategy or activation.policy
    where = f"{served} on {activation.backend}" if activation.backend else "native"
    yield ok(f"{where}: {activation.why}")


def recorded_failures(context: Context) -> Iterable[Finding]:
    """The convolutions that have failed on this machine, with this torch and this kernel."""
    version = context.build.version if context.build else ""
    bad = [
        row
        for row in Store(cache_folder(context.environ)).rows()
        if row.verdict.is_bad and (row.machine.torch, row.machine.kernel) == (version, context.machine.kernel)
    ]
    native = [row for row in bad if row.strategy == "native"]
    ours = [row for row in bad if row.strategy != "native"]
    if native:
        yield ok(
            f"{_counted(native)}: they are served without MIOpen here",
            "recorded when they were first tried, and never run natively again",
            fix="rocm-patch cache show",
        )
    if ours:
        # Nothing is left to fall back to where plain matrix products fail: the build's BLAS library is wrong here.
        command = fit.torch_command(context.machine.gpus)
        yield Finding(
            "", "failure", f"torch {version} cannot run here: {_counted(ours)} of rocm-patch's own",
            f"these are matrix products of the BLAS library, and {ours[0].strategy} of {ours[0].label} ended as "
            f"{ours[0].verdict.kind}; a build with native code for this card would run them",
            command,
        )  # fmt: skip


def _counted(rows: list[Row]) -> str:
    kinds = sorted({row.verdict.kind for row in rows})
    found = [f"{sum(row.verdict.kind == kind for row in rows)} {kind}" for kind in kinds]
    return f"{len(rows)} recorded failures of convolutions ({', '.join(found)})"


def activation(context: Context) -> Iterable[Finding]:
    """Whether the active virtual environment is activated."""
    try:
        venv = activate.environment_of(None, context.environ)
    except RocmPatchError:  # no virtual environment is active, so there is nothing to say
        return
    if not activate.is_active(venv):
        yield ok(f"{venv} is not activated: programs are patched by rocm-patch run")
    else:
        off = "" if context.settings.enabled else ", switched off by ROCM_PATCH=0"
        yield ok(f"{venv} is activated: every program of it is patched{off}", fix="rocm-patch deactivate")


CHECKS = (environment, convolutions, recorded_failures, activation)

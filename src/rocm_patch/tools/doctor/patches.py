"""What rocm-patch itself would do here: the environment plan, the user's own variables, convolutions, activation."""

from __future__ import annotations

from collections.abc import Iterable

from rocm_patch.errors import RocmPatchError
from rocm_patch.launch import activate
from rocm_patch.machine import backend
from rocm_patch.machine import environment as plans
from rocm_patch.tools.doctor.finding import Context, Finding, ok


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


CHECKS = (environment, convolutions, activation)

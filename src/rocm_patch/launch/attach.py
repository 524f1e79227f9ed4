"""What the import hook does around a program's `import torch`.

A program under the launcher has not asked for anything in code, so it gets less than `enable_all_patches()`:
Python's own start method and the loaders' lifetime stay its own affair. Nothing in here may end the program.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from rocm_patch.errors import RocmPatchError
from rocm_patch.launch.variables import LAUNCHED
from rocm_patch.machine import backend, build, environment, hardware
from rocm_patch.overrides.ledger import LEDGER, Entry
from rocm_patch.settings import LOGGER, from_environ, show_log


def before_torch() -> None:
    """Set the environment that the machine needs; the launcher has done so for all processes below it."""
    _surviving(_set_environment)


def after_torch() -> None:
    """Patch the torch that has just been imported."""
    _surviving(_patch)


def _set_environment() -> None:
    settings = from_environ()
    if os.environ.get(LAUNCHED):
        LEDGER.record(
            "environment", settings.profile, Entry(True, "set by rocm-patch run before the program started")
        )
        return
    machine = hardware.read_machine(settings.sysfs_root)
    plan = environment.plan(machine, build.find_build(), settings, os.environ)
    environment.apply(plan.changes, os.environ)
    if plan.changes:
        why = "set before torch was imported, by the environment's activation"
        LEDGER.record("environment", settings.profile, Entry(True, why, tuple(map(str, plan.changes))))
    for warning in plan.warnings:
        LOGGER.warning("%s", warning)


def _patch() -> None:
    settings = from_environ()
    if settings.log:
        show_log(settings.log)
    if settings.start_method and settings.start_method != "auto":
        import multiprocessing

        multiprocessing.set_start_method(settings.start_method, force=True)
    machine = hardware.read_machine(settings.sysfs_root)
    activation = backend.decide(machine, build.find_build(), settings, os.environ)
    if activation.backend is None and not settings.start_method:
        LOGGER.debug("off: %s", activation.why)
        return
    from rocm_patch.overrides import aten, dataloader

    aten.install(activation, settings)
    dataloader.install(settings.start_method or "auto", persistent=False)


def _surviving(step: Callable[[], None]) -> None:
    """A program that works without us goes on without us."""
    try:
        step()
    except RocmPatchError as error:
        LOGGER.warning("not applied: %s", error)
    except Exception:  # noqa: BLE001  (whatever it is, it is ours and must not become the program's)
        LOGGER.warning(
            "could not patch torch; the program goes on unpatched\n"
            "hint: report this with the lines below; ROCM_PATCH=0 silences it",
            exc_info=True,
        )

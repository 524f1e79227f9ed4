"""The original API: one call that does everything, its parts, and the way back.

Every function is idempotent; a second call with other arguments warns and takes effect. Nothing here needs
torch to be imported first, and importing this module does not import it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from rocm_patch import settings as settings_module
from rocm_patch.errors import TorchMissingError
from rocm_patch.fallback import FallbackStrategy, meaning
from rocm_patch.machine import backend, build, environment, hardware
from rocm_patch.overrides.ledger import LEDGER, Entry, Status
from rocm_patch.settings import LOGGER, Settings
from rocm_patch.workers import start_method as start_methods

_MULTIPROCESSING = "multiprocessing"
_ENVIRONMENT = "environment"
_OFF = "switched off by ROCM_PATCH=0"
_TORCH_HINT = (
    "install the torch build for this machine first; rocm-patch never brings one, since pip would put a CUDA "
    "build over a ROCm build"
)


def setup_multiprocessing(start_method: str | None = None) -> bool:
    """Make Python start worker processes with `spawn`.

    Call it before torch is imported; afterwards it still takes effect and warns (RuntimeWarning).

    Args:
        start_method: another start method, `forkserver` for example; None means `ROCM_PATCH_START_METHOD`, else
            `spawn`.

    Returns:
        Whether that start method is in force.

    Raises:
        UsageError: unknown start method.
    """
    settings = settings_module.from_environ().replaced(start_method=start_method)
    method = "spawn" if settings.start_method in (None, "auto") else str(settings.start_method)
    if not settings.enabled:
        LEDGER.refuse(_MULTIPROCESSING, _OFF)
        return start_methods.in_force() == method
    with LEDGER.lock:
        if LEDGER.already(_MULTIPROCESSING, method) and start_methods.in_force() == method:
            return True
        LEDGER.revert(_MULTIPROCESSING)  # the program has changed it since
        original = start_methods.in_force()
        start_methods.set_start_method(method)
        LEDGER.record(
            _MULTIPROCESSING,
            method,
            Entry(True, f"Python starts worker processes with {method}"),
            lambda: start_methods.restore(original, if_still=method),
        )
    return start_methods.in_force() == method


def setup_environment(profile: str | None = None) -> tuple[environment.EnvChange, ...]:
    """Set the environment variables that this machine needs; what the user has set wins.

    Args:
        profile: `auto` (by the card found; the default), `document` (the four variables of
            docs/PATCHES_V1.1_SUMMARY.md on any machine) or `none`.

    Returns:
        One record per variable of the plan: name, value, why, source, and the value found before, if any.

    Raises:
        UsageError: unknown profile.
    """
    settings = settings_module.from_environ().replaced(profile=profile)
    if not settings.enabled:
        LEDGER.refuse(_ENVIRONMENT, _OFF)
        return ()
    with LEDGER.lock:
        before = LEDGER.already(_ENVIRONMENT, settings.profile)
        plan = _plan(settings)
        if before is not None:
            return plan.changes
        for notice in plan.notices:
            LOGGER.warning("%s", notice)
        environment.apply(plan.changes, os.environ)
        made = {change.name: change.value for change in plan.changes if change.changes}
        if made and "torch" in sys.modules:
            LOGGER.warning(
                "torch is already imported: %s may have been read before\n"
                "hint: call setup_environment() before `import torch`, or use: rocm-patch run script.py",
                ", ".join(made),
            )

        def restore() -> None:
            for name, value in made.items():
                if os.environ.get(name) == value:
                    del os.environ[name]

        if plan.changes:
            why = f"{len(made)} variables set, {len(plan.changes) - len(made)} were set before"
            entry = Entry(True, why, tuple(map(str, plan.changes)))
            LEDGER.record(_ENVIRONMENT, settings.profile, entry, restore)
        else:
            LEDGER.refuse(_ENVIRONMENT, f"this machine needs no variable (profile {settings.profile})")
        return plan.changes


def _plan(settings: Settings) -> environment.Plan:
    machine = hardware.read_machine(settings.sysfs_root)
    return environment.plan(machine, build.find_build(), settings, os.environ)


def patch_dataloader(start_method: str | None = None) -> bool:
    """Give DataLoaders that use workers `multiprocessing_context='spawn'` and `persistent_workers=True`.

    Each only where the caller did not give that one. Imports torch.

    Args:
        start_method: another start method for the workers; None means `ROCM_PATCH_START_METHOD`, else `spawn`.

    Returns:
        Whether the patch is in force: True unless `ROCM_PATCH=0`.

    Raises:
        TorchMissingError: torch cannot be imported.
        UsageError: unknown start method.
    """
    settings = settings_module.from_environ().replaced(start_method=start_method)
    _need_torch("patch DataLoader")
    from rocm_patch.overrides import dataloader

    if not settings.enabled:
        return bool(LEDGER.refuse(dataloader.PATCH, _OFF))
    return bool(dataloader.install(settings.start_method or "spawn"))


def enable_miopen_bypass(
    strategy: FallbackStrategy | str | None = None,
    verbose: bool | None = None,
    *,
    backend: str | None = None,
    size_threshold: int = 42,
    workspace: int | str | None = None,
    exact: bool | None = None,
) -> Entry:
    """Serve convolutions without MIOpen where this machine needs it. Imports torch.

    Args:
        strategy: a `FallbackStrategy` or its value, a policy (`bypass`, `guarded`, `native`), or an algorithm's
            name; None and AUTO mean what is best for the card found.
        verbose: say once per convolution which route served it.
        backend: `hip`, `cuda` or `cpu` switches the override on there whatever the machine is.
        size_threshold: for SELECTIVE, the longest side that native convolutions are trusted with.
        workspace: memory that one convolution may take beyond its operands and result, in bytes or as `512M`; the
            default is the smaller of 1 GiB and a tenth of the device's memory.
        exact: leave out Winograd's algorithms, which round more than a matrix product.

    Returns:
        The patch's entry: true if it is in force, with the reason.

    Raises:
        TorchMissingError: torch cannot be imported.
        UsageError: unknown strategy or backend.
    """
    settings = settings_module.from_environ().replaced(
        backend=backend, exact=exact, workspace=None if workspace is None else settings_module.parse_bytes(workspace)
    )
    _need_torch("bypass MIOpen")
    from rocm_patch.overrides import aten

    policy, preferred, selective = meaning(strategy)
    settings = settings.replaced(conv=preferred or policy)
    if verbose or settings.log:
        settings_module.show_log("info" if verbose else settings.log or "info")
    return aten.install(_decide(settings), settings, size_threshold if selective else None)


def _decide(settings: Settings) -> backend.Activation:
    return backend.decide(hardware.read_machine(settings.sysfs_root), build.find_build(), settings, os.environ)


def enable_all_patches(
    miopen_strategy: FallbackStrategy | str | None = None,
    *,
    backend: str | None = None,
    conv: str | None = None,
    start_method: str | None = None,
    profile: str | None = None,
    verbose: bool | None = None,
    workspace: int | str | None = None,
    exact: bool | None = None,
) -> Status:
    """Apply all patches in the order that works: start method, environment, torch, loaders, convolutions.

    Args:
        miopen_strategy: see `enable_miopen_bypass`.
        backend: likewise.
        conv: a policy or an algorithm's name, as `ROCM_PATCH_CONV`; `miopen_strategy` wins.
        start_method: how worker processes start; `spawn` by default.
        profile: see `setup_environment`.
        verbose: say once per convolution which route served it.
        workspace: see `enable_miopen_bypass`.
        exact: likewise.

    Returns:
        One entry per patch (applied or not, and why): a mapping that prints as a table.

    Raises:
        UsageError: an argument that rocm-patch does not know; nothing has been applied then.
    """
    settings = settings_module.from_environ().replaced(
        backend=backend, conv=conv, start_method=start_method, profile=profile, exact=exact,
        workspace=None if workspace is None else settings_module.parse_bytes(workspace),
    )  # fmt: skip
    if not settings.enabled:
        return _refused(_OFF)
    if sys.modules.get("torch") is None and importlib.util.find_spec("torch") is None:
        LOGGER.warning("torch is not installed for %s; no patch was applied\nhint: %s", sys.executable, _TORCH_HINT)
        return _refused("torch is not installed")
    meaning(miopen_strategy)  # raises before anything is applied
    setup_multiprocessing(settings.start_method)
    setup_environment(settings.profile)
    patch_dataloader(settings.start_method or "auto")
    enable_miopen_bypass(
        miopen_strategy or settings.conv,
        verbose,
        backend=settings.backend,
        workspace=settings.workspace,
        exact=settings.exact,
    )
    return patch_status()


def _refused(why: str) -> Status:
    for patch in LEDGER.status():
        LEDGER.refuse(patch, why)
    return patch_status()


def disable_all_patches() -> Status:
    """Take back every patch in reverse order; the very objects that were there before are there again."""
    with LEDGER.lock:
        for patch in reversed(LEDGER.in_force()):
            LEDGER.revert(patch)
    return patch_status()


def patch_status() -> Status:
    """One entry per patch: in force or not, and why."""
    return LEDGER.status()


def bypass_report() -> str:
    """The routes that convolutions took in this process: calls, strategy, convolution and reason."""
    if "torch" not in sys.modules:
        return "torch is not imported: no convolution was served in this process"
    from rocm_patch.dispatch import report
    from rocm_patch.overrides import aten, bypassed

    return report([*aten.ACTIVE.values(), *bypassed.dispatchers()])


def print_bypass_report(model: Any = None) -> None:
    """Print `bypass_report()`, and for a model which of its layers are Safe ones."""
    lines = [bypass_report()]
    if model is not None:
        from rocm_patch.overrides.models import model_report

        lines.insert(0, str(model_report(model)))
    sys.stdout.write("\n".join(lines) + "\n")


def _need_torch(purpose: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise TorchMissingError(
            f"cannot {purpose}: torch cannot be imported by {sys.executable} ({error})", _TORCH_HINT
        ) from error

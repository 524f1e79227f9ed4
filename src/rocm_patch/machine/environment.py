"""Which environment variables this machine needs: plan() is pure, apply() is trivial, the user's values win."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.machine import catalog, fit
from rocm_patch.machine.build import TorchBuild, version_numbers
from rocm_patch.machine.conflicts import Notice, conflicts
from rocm_patch.machine.fit import OVERRIDE, Fit
from rocm_patch.machine.hardware import Gpu, Machine
from rocm_patch.machine.visibility import chosen, visible_gpus
from rocm_patch.settings import LOGGER, Settings

# The four variables of docs/PATCHES_V1.1_SUMMARY.md; the catalog has what each of them does.
DOCUMENT = (
    ("MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "1"),
    (OVERRIDE, "10.3.0"),
    ("HSA_USE_SVM", "0"),
    ("HSA_XNACK", "0"),
)
# The per-node form of the override is in libhsakmt from here on (ROCT-Thunk-Interface commit cf4935353e33).
_PER_NODE_OVERRIDE = (6, 3)


@dataclass(frozen=True)
class EnvChange:
    """One variable of the plan.

    Attributes:
        name: the variable.
        value: the value that the plan wants.
        why: what it does here, in words.
        source: where the fact comes from.
        found: the value that was there before, None if unset. A value of the user's is kept.
        is_folder: whether the value names a folder that must exist and belong to this user.
    """

    name: str
    value: str
    why: str
    source: str
    found: str | None = None
    is_folder: bool = False

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
    notices: tuple[Notice, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """The notices that every program should hear of, in words."""
        return [str(notice) for notice in self.notices if notice.level != "ok"]


def plan(machine: Machine, build: TorchBuild | None, settings: Settings, environ: Mapping[str, str]) -> Plan:
    """The variables to set for this machine and build. Reads its arguments only; changes nothing."""
    if settings.profile == "none" or not settings.enabled:
        return Plan(())
    notices: list[Notice] = []
    has_gpu = machine.can_have_amd_gpu or machine.gpus or machine.unlisted
    if settings.profile == "document" or not has_gpu:
        wanted = _document(with_override=True)
    else:
        wanted, notices = _for_cards(machine, build, environ)
        wanted += _folders(machine, build)
        notices += conflicts(machine, build, environ)
    changes = (dataclasses.replace(change, found=_found(change.name, environ)) for change in wanted)
    return Plan(tuple(changes), tuple(notices))


def _found(name: str, environ: Mapping[str, str]) -> str | None:
    # HIP takes an empty list for none given.
    return environ.get(name) or None if name == "HIP_VISIBLE_DEVICES" else environ.get(name)


def _document(*, with_override: bool) -> list[EnvChange]:
    changes = []
    for name, value in DOCUMENT:
        known = catalog.variable(name)
        if known and (with_override or name != OVERRIDE):
            changes.append(EnvChange(name, value, known.meaning, "; ".join(known.sources[:2])))
    return changes


def _for_cards(
    machine: Machine, build: TorchBuild | None, environ: Mapping[str, str]
) -> tuple[list[EnvChange], list[Notice]]:
    if build is None or build.kind != "hip":
        # Nothing runs on the card with this torch; the document's settings wait for one that does.
        has_rdna1 = any(gpu.generation == "RDNA1" for gpu in machine.gpus)
        cards = [gpu for gpu in machine.gpus if not gpu.integrated]
        notices = [_no_rocm(cards, build)] if cards and build and not machine.has_nvidia else []
        return (_document(with_override=False) if has_rdna1 else []), notices
    fits = [fit.fit(gpu, build) for gpu in visible_gpus(machine.gpus, environ)]
    # The user's own override holds for every GPU as they want it; before ROCm 6.3 the plan's does so too.
    per_node = version_numbers(build.hip)[:2] >= _PER_NODE_OVERRIDE and OVERRIDE not in environ
    shown, why, source = list(fits), "", ""
    if not chosen(environ):
        shown, why, source = _shown(fits, one_for_all=not per_node and OVERRIDE not in environ)
    changes = _overrides(machine, shown, per_node=per_node)
    if len(shown) < len(fits):
        # An override for all lets an old ROCm see chips that it does not know; without one it leaves them out.
        is_global = OVERRIDE in environ or any(change.name == OVERRIDE for change in changes)
        listed = [entry for entry in fits if is_global or fit.is_listed(entry.gpu, build)]
        places = [str(place) for place, entry in enumerate(listed) if entry in shown]
        if len(places) < len(listed):
            changes.insert(0, EnvChange("HIP_VISIBLE_DEVICES", ",".join(places), why, source))
    if any(entry.gpu.generation == "RDNA1" and entry.kind != "native" for entry in shown):
        changes += _document(with_override=False)
    return changes, [_no_code(entry, build) for entry in fits if not entry.is_usable and _matters(entry, fits)]


def _shown(fits: Sequence[Fit], *, one_for_all: bool) -> tuple[list[Fit], str, str]:
    """The GPUs to leave visible, and why the others are hidden.

    Where a card can be used, GPUs that cannot be are hidden, and so is an integrated one that comes before the card,
    so that a program's first device is the card, or that the build has no native code for: an override for its
    sake would hit the card too. Where an override holds for every GPU, those that it does not fit are hidden.
    """
    cards = [place for place, entry in enumerate(fits) if not entry.gpu.integrated and entry.is_usable]
    if not cards:
        return list(fits), "", ""
    kept = [
        entry
        for place, entry in enumerate(fits)
        if entry.is_usable and (not entry.gpu.integrated or (place > cards[0] and entry.kind == "native"))
    ]
    value = _common_value(kept)
    alike = [entry for entry in kept if not one_for_all or _fits_with(entry, value)]
    if len(alike) < len(kept):
        why = f"before ROCm 6.3 an override holds for every GPU; these run with {value or 'none'}"
        return alike, why, "ROCm/ROCT-Thunk-Interface commit cf4935353e33"
    chips = ", ".join(entry.gpu.gfx for entry in fits if entry not in kept)
    why = f"hides {chips}, which programs would take for the card or fail on"
    return kept, why, "https://github.com/ROCm/legacy-rocm-build/issues/4380"


def _overrides(machine: Machine, shown: Sequence[Fit], *, per_node: bool) -> list[EnvChange]:
    """The override for the GPUs in use: one for all, one for each node, or none."""
    needing = [entry for entry in shown if entry.kind == "override"]
    are_alike = len({entry.value for entry in needing}) == 1 and len(needing) == len(machine.gpus)
    if per_node and not are_alike:
        return [
            EnvChange(f"{OVERRIDE}_{entry.gpu.thunk_node}", entry.value, entry.why, entry.source) for entry in needing
        ] + _beside(needing)
    value = _common_value(shown)
    served = [entry for entry in needing if entry.value == value]
    if not served:
        return []
    return [EnvChange(OVERRIDE, value, served[0].why, served[0].source), *_beside(served)]


def _common_value(fits: Sequence[Fit]) -> str:
    """The override that the largest GPU can live with: its own, or one to the very chip that it is."""
    usable = [entry for entry in fits if entry.is_usable]
    if not usable:
        return ""
    best = max(usable, key=lambda entry: (not entry.gpu.integrated, entry.gpu.compute_units))
    if best.kind == "override":
        return best.value
    return next((entry.value for entry in usable if entry.value and _fits_with(best, entry.value)), "")


def _fits_with(entry: Fit, value: str) -> bool:
    return entry.value == value or (entry.kind == "native" and fit.override_target(value) == entry.gpu.gfx)


def _matters(entry: Fit, fits: Sequence[Fit]) -> bool:
    """Whether a GPU without code is worth a word: an integrated one beside a card that works is not."""
    return not entry.gpu.integrated or not any(other.is_usable and not other.gpu.integrated for other in fits)


def _beside(entries: Sequence[Fit]) -> list[EnvChange]:
    """The variables that reports set together with an override."""
    changes = []
    for entry in entries:
        known = catalog.arch(entry.gpu.gfx)
        for assignment in known.override_with if known else ():
            name, _, value = assignment.partition("=")
            variable = catalog.variable(name)
            why = f"reported to be needed beside the override on {entry.gpu.gfx}"
            changes.append(EnvChange(name, value, f"{why}: {variable.meaning}" if variable else why, entry.source))
    return changes


def _no_code(entry: Fit, build: TorchBuild) -> Notice:
    gpu = entry.gpu
    return Notice(
        "native_code",
        f"torch {build.version} has no native code for {gpu.gfx} ({gpu.name}); {entry.why}",
        "programs that use this GPU fail with an invalid device function, or worse",
        fit.native_torch_command(gpu.gfx),
        f"{fit.WHEELS_SOURCE}; {entry.source}",
    )


def _no_rocm(gpus: Sequence[Gpu], build: TorchBuild) -> Notice:
    return Notice(
        "native_code",
        f"torch {build.version} is a {build.kind} build, which cannot use {gpus[0].gfx} ({gpus[0].name})",
        "programs run on the CPU, or not at all",
        fit.torch_command(gpus),
        fit.WHEELS_SOURCE,
    )


def _folders(machine: Machine, build: TorchBuild | None) -> list[EnvChange]:
    """MIOpen's databases, moved off a home that they do not survive on."""
    home = machine.home
    if build is None or build.kind != "hip" or not (home.is_network or not home.is_writable):
        return []
    what = f"the home folder lies on {home.file_system}" if home.is_network else "the home folder cannot be written"
    base = f"/var/tmp/rocm-patch-{os.getuid()}/miopen"
    rows = (("MIOPEN_USER_DB_PATH", f"{base}/db"), ("MIOPEN_CUSTOM_CACHE_DIR", f"{base}/cache"))
    source = "ROCm/MIOpen@2d1fd997:src/db_path.cpp.in, src/binary_cache.cpp"
    return [
        EnvChange(name, value, f"{what}; MIOpen keeps its files here", source, None, True) for name, value in rows
    ]


def apply(changes: Sequence[EnvChange], environ: MutableMapping[str, str]) -> None:
    """Set what the plan sets; values that are there already stay.

    A folder is made first, for this user alone; one that is another user's is left out with a warning, since MIOpen
    would run the kernels that it finds there.
    """
    for change in changes:
        if change.changes and may_set(change):
            environ[change.name] = change.value


def may_set(change: EnvChange) -> bool:
    """Whether a change is safe to make: a folder is made now, and must be this user's alone."""
    return not change.is_folder or _is_ours(Path(change.value))


def _is_ours(folder: Path) -> bool:
    # The part below the shared folder is what another user could have made before us.
    private = folder.parents[1]
    try:
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = private.lstat()
        if status.st_uid != os.getuid() or private.is_symlink() or status.st_mode & 0o022:
            LOGGER.warning(
                "%s belongs to another user or can be written by others; MIOpen's files stay at home", private
            )
            return False
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        LOGGER.warning("cannot make %s (%s); MIOpen's files stay at home", folder, error)
        return False
    return True

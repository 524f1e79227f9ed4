"""The guard that this process's convolutions run under, and the store behind it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rocm_patch.conv import Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.dispatch import INSIDE
from rocm_patch.machine import build, folders, hardware
from rocm_patch.settings import LOGGER, Settings
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.fingerprint import Fingerprint, fingerprint
from rocm_patch.trust.guard import Guard
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.store import Store
from rocm_patch.trust.timings import Timings
from rocm_patch.trust.verdicts import Verdicts

# Where `rocm-patch probe SCRIPT` finds the convolutions of a script.
RECORD_VARIABLE = "_ROCM_PATCH_RECORD"

# One per process and choice of limits and folder: a process has one journal.
_WATCHING: dict[tuple[Limits, Path], Guard] = {}
_TIMED: dict[Path, Verdicts] = {}


def guard_for(chooser: Chooser, settings: Settings) -> Guard:
    """The guard for a way of choosing: one that watches where anything unproven may run, else one that does not.

    Off AMD cards our own strategies are trusted: they are torch's matrix products, which the whole program rests on.
    """
    is_hip = torch.version.hip is not None
    runs_native = chooser.policy == "guarded" or chooser.native_up_to is not None
    fingerprints = machine_of(settings)
    can_guard = sys.platform == "linux"
    if not can_guard and (runs_native or is_hip):
        LOGGER.info("nothing is guarded on %s: failures are remembered as long as this process lives", sys.platform)
    if chooser.policy == "native" or not (runs_native or is_hip) or not can_guard:
        return Guard(Verdicts(None, fingerprints))
    limits = Limits(settings.hang_limit, settings.busy_limit)
    # Absolute: a program may change its folder.
    folder = folders.cache_folder(os.environ).absolute()
    guard = _WATCHING.get((limits, folder))
    if guard is None:
        verdicts = Verdicts(Store(folder), fingerprints)
        guard = Guard(
            verdicts, folder / "runs", limits, guards_ours=lambda device: is_hip and device != "cpu", inside=INSIDE
        )
        _WATCHING[limits, folder] = guard
    return guard


def timings_for(guard: Guard, settings: Settings) -> Timings:
    """The timings of this machine: with the guard's verdicts, or in the same store where nothing is guarded."""
    if guard.verdicts.store is not None:
        return Timings(guard.verdicts)
    folder = folders.cache_folder(os.environ).absolute()
    verdicts = _TIMED.get(folder)
    if verdicts is None:
        verdicts = _TIMED[folder] = Verdicts(Store(folder), machine_of(settings))
    return Timings(verdicts)


def cleanliness_for(settings: Settings) -> Callable[[ConvSpec, Strategy], bool | None] | None:
    """What is known of the strategies' machine code on AMD cards; None elsewhere."""
    if torch.version.hip is None:
        return None
    from rocm_patch.trust.cleanliness import Cleanliness  # here: it brings the decoder of machine code

    found = build.find_build()
    return Cleanliness(machine_of(settings), found, os.environ, settings.sysfs_root).of


def machine_of(settings: Settings) -> Callable[[str], Fingerprint]:
    """From torch's name of a device to the fingerprint that its verdicts are kept under."""

    def of_device(device: str) -> Fingerprint:
        kind, _, index = device.partition(":")
        found = build.find_build()
        machine = hardware.read_machine(settings.sysfs_root)
        name = ""
        if kind == "cuda":
            kind = "hip" if torch.version.hip else "cuda"
            name = torch.cuda.get_device_name(device)
        return fingerprint(kind, int(index or 0), machine, found, os.environ, name)

    return of_device


def recorder(environ: Mapping[str, str]) -> Callable[[ConvSpec], None] | None:
    """Writes each new convolution into the file that `rocm-patch probe` has named, if it has."""
    path = environ.get(RECORD_VARIABLE)
    if not path:
        return None

    def record(spec: ConvSpec) -> None:
        try:
            # One write, so that lines of several processes do not mix.
            with open(path, "ab", buffering=0) as file:
                file.write(spec.to_json().encode() + b"\n")
        except OSError as error:
            LOGGER.warning("cannot record a convolution in %s: %s", path, error)

    return record

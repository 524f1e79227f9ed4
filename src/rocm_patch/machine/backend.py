"""Where the convolution override is on: the table of the design, in code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rocm_patch.machine import catalog
from rocm_patch.machine.build import TorchBuild
from rocm_patch.machine.hardware import Machine
from rocm_patch.machine.visibility import visible_gpus
from rocm_patch.settings import POLICIES, Settings

# ROCm tensors carry the CUDA key in PyTorch's dispatcher.
DISPATCH_KEYS = {"hip": "CUDA", "cuda": "CUDA", "cpu": "CPU"}


@dataclass(frozen=True)
class Activation:
    """Whether and how convolutions are served by us.

    Attributes:
        backend: `hip`, `cuda`, `cpu`, or None for off.
        policy: `bypass`, `guarded` or `native`.
        strategy: a strategy's name that the user asked for.
        why: the reason, in words.
        bypass_dtypes: under `guarded`, the types that are bypassed all the same: their native convolutions are
            known to crash on a card of this machine, which no guard in the process can catch.
    """

    backend: str | None
    policy: str
    strategy: str | None
    why: str
    bypass_dtypes: tuple[str, ...] = ()

    @property
    def dispatch_key(self) -> str | None:
        """The key of PyTorch's dispatcher that the override goes to."""
        return None if self.backend is None else DISPATCH_KEYS[self.backend]


def decide(
    machine: Machine, build: TorchBuild | None, settings: Settings, environ: Mapping[str, str] | None = None
) -> Activation:
    """The activation for one machine, build and user.

    Args:
        machine: the hardware.
        build: the torch that is meant.
        settings: the user's choices.
        environ: the environment that the program runs in; says which GPUs it sees.
    """
    archs = _archs(machine, environ or {})
    backend, default_policy, why = _backend(machine, build, settings, archs)
    if settings.conv is None or settings.conv in POLICIES:
        dtypes = {dtype for row in archs for dtype in row.bypass_dtypes} if backend == "hip" else ()
        return Activation(backend, settings.conv or default_policy, None, why, tuple(sorted(dtypes)))
    return Activation(backend, "bypass", settings.conv, why)


def _backend(
    machine: Machine, build: TorchBuild | None, settings: Settings, archs: list[catalog.Arch]
) -> tuple[str | None, str, str]:
    if not settings.enabled:
        return None, "native", "switched off by ROCM_PATCH=0"
    if build is None:
        return None, "native", "torch is not installed here"
    if settings.backend != "auto":
        asked = settings.backend
        # A CUDA build's tensors live on `cuda` and on the CPU, a HIP build's on `hip` and on the CPU.
        if asked != "cpu" and asked != build.kind:
            return (
                None,
                "native",
                f"backend {asked} asked for, but torch {build.version} is a {build.kind} build",
            )
        default = "bypass" if asked != "hip" else _policy(archs)[0]
        return asked, default, f"backend {asked} asked for"
    if build.kind != "hip":
        return None, "native", f"torch {build.version} is a {build.kind} build, MIOpen is not in it"
    if not machine.can_have_amd_gpu:
        return None, "native", "neither /dev/kfd nor /dev/dxg is here: no AMD GPU can be used"
    return "hip", *_policy(archs)


def _policy(archs: list[catalog.Arch]) -> tuple[str, str]:
    """The policy for every card that programs see, the most careful one of them, and why."""
    for row in archs:
        if row.policy == "bypass":
            return "bypass", f"{row.generation} card ({row.gfx}): {row.policy_note}"
    return "guarded", "AMD card: native convolutions with fallback"


def _archs(machine: Machine, environ: Mapping[str, str]) -> list[catalog.Arch]:
    """Of the cards that programs see; of an integrated GPU where there is no card beside it."""
    shown = visible_gpus(machine.gpus, environ)
    cards = [gpu for gpu in shown if not gpu.integrated] or shown
    known = (catalog.arch(gpu.gfx) for gpu in cards)
    return [row for row in known if row is not None]

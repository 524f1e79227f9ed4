"""Where the convolution override is on: the table of the design, in code."""

from __future__ import annotations

from dataclasses import dataclass

from rocm_patch.machine.build import TorchBuild
from rocm_patch.machine.hardware import Machine
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
    """

    backend: str | None
    policy: str
    strategy: str | None
    why: str

    @property
    def dispatch_key(self) -> str | None:
        """The key of PyTorch's dispatcher that the override goes to."""
        return None if self.backend is None else DISPATCH_KEYS[self.backend]


def decide(machine: Machine, build: TorchBuild | None, settings: Settings) -> Activation:
    """The activation for one machine, build and user."""
    backend, default_policy, why = _backend(machine, build, settings)
    if settings.conv is None:
        return Activation(backend, default_policy, None, why)
    if settings.conv in POLICIES:
        return Activation(backend, settings.conv, None, why)
    return Activation(backend, "bypass", settings.conv, why)


def _backend(machine: Machine, build: TorchBuild | None, settings: Settings) -> tuple[str | None, str, str]:
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
        default = "bypass" if asked != "hip" or machine.has_rdna1 else "guarded"
        return asked, default, f"backend {asked} asked for"
    if build.kind != "hip":
        return None, "native", f"torch {build.version} is a {build.kind} build, MIOpen is not in it"
    if not machine.can_have_amd_gpu:
        return None, "native", "neither /dev/kfd nor /dev/dxg is here: no AMD GPU can be used"
    if machine.has_rdna1:
        return "hip", "bypass", "RDNA1 card: MIOpen convolutions are known to hang"
    return "hip", "guarded", "AMD card: native convolutions with fallback"

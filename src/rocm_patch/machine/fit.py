"""How a torch build fits a GPU: native code, code of a neighbouring chip under an override, or neither."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rocm_patch.machine import catalog
from rocm_patch.machine.build import TorchBuild, version_numbers
from rocm_patch.machine.hardware import Gpu, gfx_name

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
# AMD's multi-arch wheel index and the form of its extras (ROCm/TheRock RELEASES.md, "install extras").
_NATIVE_INDEX = "https://repo.amd.com/rocm/whl-multi-arch/"
_OFFICIAL_INDEX = "https://download.pytorch.org/whl"
WHEELS_SOURCE = (
    "https://pytorch.org/get-started/previous-versions/; https://github.com/ROCm/TheRock/blob/main/RELEASES.md"
)


@dataclass(frozen=True)
class Fit:
    """What a build can do on one GPU.

    Attributes:
        gpu: the GPU.
        kind: `native`, `override` (with `value`), or `none`.
        value: the value of the override.
        why: the reason, in words.
        source: where the fact comes from.
    """

    gpu: Gpu
    kind: str
    value: str
    why: str
    source: str

    @property
    def is_usable(self) -> bool:
        """Whether torch can be expected to run on this GPU at all."""
        return self.kind != "none"


def fit(gpu: Gpu, build: TorchBuild) -> Fit:
    """How a HIP build fits a GPU.

    A chip that the catalog does not know is taken as native, and so is a build of the user's own whose code cannot
    be read: there is nothing that could be advised.
    """
    carried = build.carries(gpu.gfx)
    known = catalog.arch(gpu.gfx)
    if carried is None and known is not None:
        carried = _official_wheel_carries(build, known)
    if carried and not is_listed(gpu, build):
        since = known.since_rocm if known else ""
        why = f"the ROCm of torch {build.version} does not know {gpu.gfx}, {since} is the first that does"
        return Fit(gpu, "none", "", why, "; ".join(known.sources[:2]) if known else "")
    if carried:
        return Fit(gpu, "native", "", f"torch {build.version} has native code for {gpu.gfx}", "read from its files")
    if known is None or carried is None:
        return Fit(gpu, "native", "", f"nothing is known against torch {build.version} on {gpu.gfx}", "")
    source = "; ".join(known.sources[:2])
    if not known.override:
        return Fit(gpu, "none", "", f"no override is known to work for {gpu.gfx}: {known.override_note}", source)
    pretended = override_target(known.override)
    if not _is_at_most(build, known):
        until = f"torch {known.override_max_torch} and ROCm {known.override_max_rocm}"
        why = f"{OVERRIDE}={known.override} is known to work for {gpu.gfx} up to {until} only"
        return Fit(gpu, "none", "", why, source)
    if build.carries(pretended) is False:
        why = f"{OVERRIDE}={known.override} needs code for {pretended}, which torch {build.version} has not either"
        return Fit(gpu, "none", "", why, source)
    harm = build.harm(gpu.gfx, pretended, os.environ) if has_native_wheel(gpu.gfx) else None
    if harm is not None and harm.harmful:
        why = (
            f"rocm-patch scan has found that {harm.harmful} of its {harm.examined} kernels for {pretended} "
            f"cannot run safely on {gpu.gfx}, which has native wheels; {OVERRIDE}={known.override} is yours to set"
        )
        return Fit(gpu, "none", "", why, source)
    why = f"makes {gpu.gfx} pass for {pretended}, for which torch {build.version} has code. {known.override_note}"
    return Fit(gpu, "override", known.override, why.strip(), source)


def is_listed(gpu: Gpu, build: TorchBuild) -> bool:
    """Whether the build's ROCm lists this chip as itself; an unknown one it leaves out, and HIP's numbers move up."""
    known = catalog.arch(gpu.gfx)
    return known is None or version_numbers(build.hip)[:2] >= version_numbers(known.since_rocm)


def override_target(value: str) -> str:
    """The chip that an override pretends: `10.3.0` is gfx1030; empty for a value that libhsakmt would refuse."""
    variable = catalog.variable(OVERRIDE)
    numbers = value.split(".")
    # The limits are libhsakmt's: major 63, minor and stepping 255 (topology.c).
    if len(numbers) != 3 or not all(
        number.isascii() and number.isdecimal() and len(number) < 4 for number in numbers
    ):
        return ""
    major, minor, stepping = map(int, numbers)
    if variable is None or major > 63 or minor > 255 or stepping > 255:
        return ""
    return gfx_name(major * 10000 + minor * 100 + stepping)


_UNINSTALL = "python -m pip uninstall -y torch torchvision torchaudio && "


def native_torch_command(gfx: str) -> str:
    """The command that gets a torch that runs on a chip.

    The newest of pytorch.org's wheels that carry it, else AMD's own, else the newest wheel that it runs under an
    override, else a build. What is installed goes first: pip takes a build of the same version for good enough. We
    have run none of these on an AMD machine.
    """
    known = catalog.arch(gfx)
    if release := _newest_with(gfx):
        return _official_command(release)
    if has_native_wheel(gfx):
        packages = f'"torch[device-{gfx}]" "torchvision[device-{gfx}]"'
        return f"{_UNINSTALL}python -m pip install --index-url {_NATIVE_INDEX} {packages}"
    stands_in = known.override if known and not known.override_max_torch else ""
    if stands_in and (release := _newest_with(override_target(stands_in))):
        return _official_command(release)
    clone = "git clone --recursive https://github.com/pytorch/pytorch && cd pytorch"
    return f"{clone} && PYTORCH_ROCM_ARCH={gfx} python -m pip install --no-build-isolation ."


def _newest_with(gfx: str) -> catalog.Release | None:
    return next((row for row in reversed(catalog.releases()) if gfx in row.archs), None)


def _official_command(release: catalog.Release) -> str:
    torch = "torch" if release is catalog.releases()[-1] else f"'torch=={release.torch}.*'"
    index = f"{_OFFICIAL_INDEX}/rocm{release.rocm[-1]}"
    return f"{_UNINSTALL}python -m pip install {torch} torchvision --index-url {index}"


def torch_command(gpus: Sequence[Gpu]) -> str:
    """The command that installs a torch for a machine's first card."""
    cards = sorted(gpus, key=lambda gpu: gpu.integrated)
    return native_torch_command(cards[0].gfx) if cards else _official_command(catalog.releases()[-1])


def has_native_wheel(gfx: str) -> bool:
    """Whether pytorch.org or AMD's own index has torch wheels for a chip."""
    known = catalog.arch(gfx)
    return (known is not None and known.native_index != "no") or any(gfx in row.archs for row in catalog.releases())


def _official_wheel_carries(build: TorchBuild, known: catalog.Arch) -> bool | None:
    """What the catalog says of pytorch.org's wheels, for a build whose files could not be read."""
    if "+rocm" not in build.version:  # a distribution's or the user's own
        return None
    release = version_numbers(build.version)[:2]
    if not known.wheels_from or release < version_numbers(known.wheels_from)[:2]:
        return False
    return not known.wheels_until or release <= version_numbers(known.wheels_until)[:2]


def _is_at_most(build: TorchBuild, known: catalog.Arch) -> bool:
    limits = ((build.version, known.override_max_torch), (build.hip, known.override_max_rocm))
    for version, limit in limits:
        numbers = version_numbers(limit)
        if limit and version_numbers(version)[: len(numbers)] > numbers:
            return False
    return True

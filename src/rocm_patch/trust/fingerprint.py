"""What a verdict holds for: the chip, and every version that could change how a convolution runs on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from rocm_patch.machine import sysfs
from rocm_patch.machine.build import TorchBuild
from rocm_patch.machine.fit import OVERRIDE, is_listed
from rocm_patch.machine.hardware import Gpu, Machine
from rocm_patch.machine.visibility import visible_gpus


@dataclass(frozen=True)
class Fingerprint:
    """One device and the software that drives it. Verdicts are good for equal fingerprints only.

    Attributes:
        device: the real chip's gfx target for AMD, the product's name for NVIDIA, `cpu`, or `unknown`.
        override: the value of HSA_OVERRIDE_GFX_VERSION that holds for it, empty without one.
        torch: version, `1.13.1+rocm5.2`.
        runtime: `hip 5.2.2` or `cuda 13.0`; empty on the CPU.
        driver: version of the kernel's GPU driver, empty if unknown and on the CPU.
        kernel: its release.
    """

    device: str
    override: str
    torch: str
    runtime: str
    driver: str
    kernel: str

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that stand for all of it."""
        return hashlib.sha256(self.to_json().encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def to_json(self) -> str:
        """One line of JSON, the same for equal fingerprints."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Fingerprint:
        """The fingerprint that `to_json` wrote.

        Raises:
            ValueError: the text is no such line.
        """
        try:
            fields = {name: value for name, value in json.loads(text).items() if isinstance(value, str)}
            return Fingerprint(**fields)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a fingerprint: {text!r}") from error

    def __str__(self) -> str:
        """One line for people."""
        device = f"{self.device} under {OVERRIDE}={self.override}" if self.override else self.device
        parts = [device, f"torch {self.torch or 'unknown'}", self.runtime]
        parts += [f"driver {self.driver}" if self.driver else "", f"kernel {self.kernel or 'unknown'}"]
        return ", ".join(part for part in parts if part)


def fingerprint(
    backend: str,
    index: int,
    machine: Machine,
    build: TorchBuild | None,
    environ: Mapping[str, str],
    device_name: str = "",
    root: str = "/",
) -> Fingerprint:
    """The fingerprint of one device of this process.

    Args:
        backend: `hip`, `cuda` or `cpu`.
        index: the device's number among those that the process sees.
        machine: the hardware.
        build: the torch that runs.
        environ: the environment that the GPU's runtime has read.
        device_name: torch's name of the device; names an NVIDIA GPU, and an AMD one that the kernel does not.
        root: a folder that stands for `/`, for the version of NVIDIA's driver.
    """
    torch = build.version if build else ""
    if backend == "hip":
        gpu = _gpu(index, machine, build, environ)
        device = gpu.gfx if gpu else f"unknown {device_name}".strip()
        runtime = f"hip {build.hip}" if build and build.hip else ""
        return Fingerprint(device, override_for(gpu, environ), torch, runtime, machine.driver, machine.kernel)
    if backend == "cuda":
        runtime = f"cuda {build.cuda}" if build and build.cuda else ""
        driver = sysfs.text(Path(root) / "sys/module/nvidia/version")
        return Fingerprint(device_name or "unknown", "", torch, runtime, driver, machine.kernel)
    return Fingerprint("cpu", "", torch, "", "", machine.kernel)


def override_for(gpu: Gpu | None, environ: Mapping[str, str]) -> str:
    """The override that holds for a GPU; the one for its node comes first (libhsakmt, topology.c).

    Args:
        gpu: None for one that is not known, for which only the general one can be told.
        environ: the environment that the GPU's runtime has read.
    """
    if gpu is not None and gpu.thunk_node is not None:
        own = environ.get(f"{OVERRIDE}_{gpu.thunk_node}")
        if own is not None:
            return own
    return environ.get(OVERRIDE, "")


def _gpu(index: int, machine: Machine, build: TorchBuild | None, environ: Mapping[str, str]) -> Gpu | None:
    # A ROCm that does not know a chip leaves it out, and the numbers of those behind it move up.
    listed = [gpu for gpu in machine.gpus if build is None or override_for(gpu, environ) or is_listed(gpu, build)]
    shown = visible_gpus(listed, environ)
    return shown[index] if 0 <= index < len(shown) else None

"""GPUs as the kernel driver describes them: no ROCm, no torch, no GPU touched.

The KFD driver lists every compute node under `/sys/class/kfd/kfd/topology/nodes/<n>/`; it names the real chip,
whatever `HSA_OVERRIDE_GFX_VERSION` says. One unreadable node never loses the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_AMD = 0x1002  # PCI vendor id


@dataclass(frozen=True)
class Gpu:
    """One AMD GPU.

    Attributes:
        node: number of its KFD topology node (CPU sockets are counted too).
        gfx: the real chip's LLVM target, `gfx1010` for example.
        device_id: PCI device id.
        compute_units: number of compute units.
        render_minor: number of `/dev/dri/renderD<n>`; 0 when unknown.
    """

    node: int
    gfx: str
    device_id: int
    compute_units: int
    render_minor: int

    @property
    def is_rdna1(self) -> bool:
        """Whether this is a gfx101x chip: Navi 10, 12, 14 and the BC-250."""
        return self.gfx.startswith("gfx101")


@dataclass(frozen=True)
class Machine:
    """The part of a computer that decides what a ROCm program can do.

    Attributes:
        gpus: the AMD GPUs, in the order of their nodes.
        kfd: whether the kernel's compute driver is there (`/dev/kfd`).
        dxg: whether this is WSL with GPU access (`/dev/dxg`), where no topology can be read.
    """

    gpus: tuple[Gpu, ...]
    kfd: bool
    dxg: bool

    @property
    def can_have_amd_gpu(self) -> bool:
        """False where no ROCm program could reach a GPU."""
        return self.kfd or self.dxg

    @property
    def has_rdna1(self) -> bool:
        """Whether any GPU is an RDNA1 chip."""
        return any(gpu.is_rdna1 for gpu in self.gpus)


def gfx_name(version: int) -> str:
    """LLVM's name of a KFD `gfx_target_version`: 100100 is gfx1010, 90012 is gfx90c.

    The number is major * 10000 + minor * 100 + stepping, in decimal; the name has the stepping in hexadecimal
    (libhsakmt/src/topology.c).
    """
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def read_machine(root: str = "/") -> Machine:
    """Read the machine below `root`, a folder that stands for `/`. Never raises for what it finds there."""
    base = Path(root)
    nodes = base / "sys/class/kfd/kfd/topology/nodes"
    gpus = []
    for name in _listed(nodes):
        gpu = _read_node(nodes / name, name)
        if gpu is not None:
            gpus.append(gpu)
    gpus.sort(key=lambda gpu: gpu.node)
    return Machine(tuple(gpus), (base / "dev/kfd").exists(), (base / "dev/dxg").exists())


def _listed(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _read_node(folder: Path, name: str) -> Gpu | None:
    """One topology node, or None for a CPU and for what cannot be read."""
    try:
        text = (folder / "properties").read_text(encoding="ascii", errors="replace")
    except OSError:  # a GPU masked in a container gives EPERM
        return None
    numbers: dict[str, int] = {}
    for line in text.splitlines():
        field, _, value = line.strip().partition(" ")
        if value.strip().isdecimal():
            numbers[field] = int(value)
    version = numbers.get("gfx_target_version", 0)
    if not name.isdecimal() or not version or numbers.get("vendor_id", _AMD) != _AMD:
        return None
    simds_per_unit = numbers.get("simd_per_cu", 0) or 2
    return Gpu(
        node=int(name),
        gfx=gfx_name(version),
        device_id=numbers.get("device_id", 0),
        compute_units=numbers.get("simd_count", 0) // simds_per_unit,
        render_minor=numbers.get("drm_render_minor", 0),
    )

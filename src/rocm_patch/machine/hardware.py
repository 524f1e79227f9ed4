"""GPUs as the kernel describes them: no ROCm, no torch, no GPU touched.

The KFD driver lists every compute node under `/sys/class/kfd/kfd/topology/nodes/<n>/`, the bus every device under
`/sys/bus/pci/devices/`, with the DRM driver's files inside. KFD names the real chip, whatever
`HSA_OVERRIDE_GFX_VERSION` says. One unknown or unreadable node never loses the others.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.machine import catalog, sysfs
from rocm_patch.machine.folders import Folder, home_of, read_folder

_AMD, _NVIDIA = 0x1002, 0x10DE  # PCI vendor ids
# Link flags of linux/drivers/gpu/drm/amd/amdkfd/kfd_crat.h: the route has no 32-bit, no 64-bit atomics.
_NO_ATOMICS = 1 << 2 | 1 << 3
_XGMI = 11  # link type; CRAT_IOLINK_TYPE_XGMI
_GPU_CLASSES = (0x03, 0x12)  # PCI base classes: display controller, processing accelerator
_VRAM_HEAPS = (1, 2)  # frame buffer, public and private (libhsakmt hsakmttypes.h)


@dataclass(frozen=True)
class Gpu:
    """One AMD GPU that the compute driver lists.

    Attributes:
        node: number of its KFD topology node (CPU sockets are counted too).
        gfx: the real chip's LLVM target, `gfx1010` for example.
        name: its name in shops, from pci.ids where that is installed, else from the catalog.
        device_id: PCI device id.
        compute_units: number of compute units.
        vram_bytes: memory of its own; for an integrated GPU the part of RAM set aside for it. 0 if unknown.
        integrated: whether it is part of a CPU.
        pci_address: `0000:03:00.0`, empty if unknown.
        pcie_atomics: whether its link to the CPU can do atomic operations, None if unknown.
        render_minor: number of `/dev/dri/renderD<n>`; 0 when unknown.
        thunk_node: its node number as ROCm counts, which leaves out GPUs whose render node is not here, as in a
            container; None for such a GPU itself.
    """

    node: int
    gfx: str
    name: str
    device_id: int
    compute_units: int
    vram_bytes: int
    integrated: bool
    pci_address: str
    pcie_atomics: bool | None
    render_minor: int
    thunk_node: int | None

    @property
    def generation(self) -> str:
        """`RDNA1`, or empty for a chip that the catalog does not know."""
        known = catalog.arch(self.gfx)
        return known.generation if known else ""


@dataclass(frozen=True)
class PciDevice:
    """A graphics or accelerator device on the PCI bus, whatever driver has it.

    Attributes:
        address: `0000:03:00.0`.
        device_id: PCI device id.
        driver: `amdgpu`, `radeon`, `vfio-pci`; empty where none has it.
        render_minor: number of `/dev/dri/renderD<n>`; 0 without one.
        vram_bytes: its memory, 0 if unknown.
    """

    address: str
    device_id: int
    driver: str
    render_minor: int
    vram_bytes: int


@dataclass(frozen=True)
class Machine:
    """The part of a computer that decides what a ROCm program can do.

    Attributes:
        gpus: the AMD GPUs, in the order of their nodes, which is taken to be HIP's order.
        unlisted: AMD devices on the PCI bus that the compute driver does not list.
        has_nvidia: whether an NVIDIA GPU is on the bus: then a CUDA build of torch is no mistake.
        unread: topology nodes that say nothing readable; a GPU hidden from a container looks like that.
        kfd: whether the kernel's compute driver is there (`/dev/kfd`).
        dxg: whether this is WSL with GPU access (`/dev/dxg`), where no topology can be read.
        kernel: the kernel's release, `6.8.0-45-generic`.
        driver: the amdgpu driver: its version where AMD's own is installed, `in-tree` for the kernel's, else empty.
        container: `docker`, `podman`, `kubernetes`, `lxc` and the like, empty outside of one.
        home: the user's home folder.
    """

    gpus: tuple[Gpu, ...]
    unlisted: tuple[PciDevice, ...]
    has_nvidia: bool
    unread: tuple[int, ...]
    kfd: bool
    dxg: bool
    kernel: str
    driver: str
    container: str
    home: Folder

    @property
    def can_have_amd_gpu(self) -> bool:
        """False where no ROCm program could reach a GPU."""
        return self.kfd or self.dxg


def gfx_name(version: int) -> str:
    """LLVM's name of a KFD `gfx_target_version`: 100100 is gfx1010, 90012 is gfx90c.

    The number is major * 10000 + minor * 100 + stepping, in decimal; the name has the stepping in hexadecimal
    (libhsakmt/src/topology.c).
    """
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def read_machine(root: str = "/", home: str | None = None) -> Machine:
    """Read the machine below `root`, a folder that stands for `/`. Never raises for what it finds there.

    Args:
        root: tests and reports of other machines have trees of their own.
        home: the user's home folder; of this process by default.
    """
    base = Path(root)
    devices = _pci_devices(base, _AMD)
    gpus, unread, counted = [], [], 0
    nodes = base / "sys/class/kfd/kfd/topology/nodes"
    for number in sorted(int(name) for name in sysfs.listed(nodes) if sysfs.is_number(name)):
        numbers = sysfs.numbers(nodes / str(number) / "properties")
        if not numbers:
            unread.append(number)
            continue
        # libhsakmt passes over GPUs whose render node it cannot find, and numbers the nodes that are left
        # (topology.c, topology_sysfs_check_node_supported).
        minor = numbers.get("drm_render_minor", 0)
        is_here = not minor or sysfs.exists(base / f"dev/dri/renderD{minor}")
        if (gpu := _gpu(base, nodes / str(number), numbers, devices, counted if is_here else None)) is not None:
            gpus.append(gpu)
        counted += is_here
    addresses = {gpu.pci_address[:-1] for gpu in gpus}
    minors = {gpu.render_minor for gpu in gpus} - {0}
    return Machine(
        gpus=tuple(gpus),
        unlisted=tuple(d for d in devices if d.address[:-1] not in addresses and d.render_minor not in minors),
        has_nvidia=bool(_pci_devices(base, _NVIDIA)),
        unread=tuple(unread),
        kfd=sysfs.exists(base / "dev/kfd"),
        dxg=sysfs.exists(base / "dev/dxg"),
        kernel=sysfs.text(base / "proc/sys/kernel/osrelease"),
        driver=sysfs.text(base / "sys/module/amdgpu/version")
        or ("in-tree" if sysfs.exists(base / "sys/module/amdgpu") else ""),
        container=_container(base),
        home=read_folder(home or home_of(os.environ), root),
    )


def _gpu(
    base: Path, folder: Path, numbers: dict[str, int], devices: list[PciDevice], thunk_node: int | None
) -> Gpu | None:
    """The GPU of one topology node, None for a CPU and for another maker's."""
    device_id = numbers.get("device_id", 0)
    gfx = _gfx(numbers, device_id)
    if not gfx or numbers.get("vendor_id", _AMD) != _AMD:
        return None
    render_minor = numbers.get("drm_render_minor", 0)
    address = _pci_address(numbers)
    # Partitions of one device differ in the function number alone.
    device = next((d for d in devices if address and d.address[:-1] == address[:-1]), None) or next(
        (d for d in devices if d.render_minor == render_minor > 0), None
    )
    known = catalog.arch(gfx)
    # An MI300A shares its gfx name with a card; its node has the CPU's cores.
    integrated = (known is not None and known.integrated) or numbers.get("cpu_cores_count", 0) > 0
    # The heap of an integrated GPU is all that it may borrow; the device of a partition has the whole card's memory.
    set_aside = device.vram_bytes if device else 0
    heaps = _heap_bytes(folder, numbers)
    return Gpu(
        node=int(folder.name),
        gfx=gfx,
        name=_pci_name(base, device_id) or (", ".join(known.products) if known else "unknown AMD GPU"),
        device_id=device_id,
        compute_units=numbers.get("simd_count", 0) // (numbers.get("simd_per_cu", 0) or 2),
        vram_bytes=(set_aside or heaps) if integrated else (heaps or set_aside),
        integrated=integrated,
        pci_address=address or (device.address if device else ""),
        pcie_atomics=_atomics(folder),
        render_minor=render_minor,
        thunk_node=thunk_node,
    )


def _gfx(numbers: dict[str, int], device_id: int) -> str:
    version = numbers.get("gfx_target_version", 0)
    if 0 < version < 1_000_000:
        return gfx_name(version)
    # Old kernels do not name the chip; the PCI id does.
    if "gfx_target_version" in numbers or not numbers.get("simd_count"):
        return ""
    return next((row.gfx for row in catalog.archs() if device_id in row.device_ids), "")


def _pci_address(numbers: dict[str, int]) -> str:
    location = numbers.get("location_id", 0)
    if not 0 < location <= 0xFFFF:
        return ""
    return f"{numbers.get('domain', 0):04x}:{location >> 8:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def _heap_bytes(folder: Path, numbers: dict[str, int]) -> int:
    banks = [sysfs.numbers(folder / "mem_banks" / name / "properties") for name in sysfs.listed(folder / "mem_banks")]
    heaps = (bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in _VRAM_HEAPS)
    return sum(heaps) or numbers.get("local_mem_size", 0)


def _atomics(folder: Path) -> bool | None:
    links = [sysfs.numbers(folder / "io_links" / name / "properties") for name in sysfs.listed(folder / "io_links")]
    # The driver marks a link that cannot; it says nothing of xGMI, which always can.
    flags = [link["flags"] for link in links if "flags" in link and link.get("type") != _XGMI]
    return not any(flag & _NO_ATOMICS for flag in flags) if flags else None


def _pci_devices(base: Path, vendor: int) -> list[PciDevice]:
    devices = []
    for address in sorted(sysfs.listed(base / "sys/bus/pci/devices")):
        folder = base / "sys/bus/pci/devices" / address
        kind = sysfs.hexadecimal(sysfs.text(folder / "class")) >> 16
        if sysfs.hexadecimal(sysfs.text(folder / "vendor")) != vendor or kind not in _GPU_CLASSES:
            continue
        minors = [
            name[7:]
            for name in sysfs.listed(folder / "drm")
            if name.startswith("renderD") and sysfs.is_number(name[7:])
        ]
        vram = sysfs.text(folder / "mem_info_vram_total")
        devices.append(
            PciDevice(
                address=address,
                device_id=sysfs.hexadecimal(sysfs.text(folder / "device")),
                driver=sysfs.link_name(folder / "driver"),
                render_minor=int(minors[0]) if minors else 0,
                vram_bytes=int(vram) if sysfs.is_number(vram) else 0,
            )
        )
    return devices


def _pci_name(base: Path, device_id: int) -> str:
    """The name in pci.ids, the list that distributions ship (https://pci-ids.ucw.cz)."""
    for place in ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"):
        try:
            content = (base / place).read_bytes()
        except OSError:
            continue
        vendor = re.search(rb"^%04x  [^\n]*\n((?:\t[^\n]*\n|#[^\n]*\n)*)" % _AMD, content, re.MULTILINE)
        if vendor and (device := re.search(rb"^\t%04x  ([^\n]+)$" % device_id, vendor[1], re.MULTILINE)):
            return device[1].decode("utf-8", "replace").strip()
    return ""


def _container(base: Path) -> str:
    if sysfs.exists(base / "var/run/secrets/kubernetes.io") or sysfs.exists(base / "run/secrets/kubernetes.io"):
        return "kubernetes"
    if sysfs.exists(base / ".dockerenv"):
        return "docker"
    if sysfs.exists(base / "run/.containerenv"):
        return "podman"
    if systemd := sysfs.text(base / "run/systemd/container"):
        return systemd
    groups = sysfs.text(base / "proc/1/cgroup")
    return next((word for word in ("docker", "kubepods", "libpod", "lxc", "containerd") if word in groups), "")

"""The kernel driver, its devices and who may open them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rocm_patch.machine import catalog
from rocm_patch.machine.build import version_numbers
from rocm_patch.tools import logs
from rocm_patch.tools.doctor.finding import Context, Finding, failure, ok, warning

_SETUP = (
    "https://github.com/ROCm/TheRock/blob/89553ce3746eda74ade42557470d25e37c91b6f0/docs/environment_setup_guide.md"
)
_FLAGS = "https://github.com/ROCm/legacy-rocm-build/issues/1797"
# The image need not have the host's groups by name, so the number is given.
_RENDER = "$(getent group render | cut -d: -f3)"
_KERNEL_LOG_BYTES = 4 * 1024 * 1024


def kernel_driver(context: Context) -> Iterable[Finding]:
    """Whether a driver has the cards, and the compute driver is there."""
    machine = context.machine
    for device in machine.unlisted if context.has_card else ():
        name = f"PCI device 1002:{device.device_id:04x} at {device.address}"
        if device.driver == "amdgpu" and machine.kfd:
            yield warning(
                f"{name} has the display driver, but is not a compute device",
                "the compute driver skips chips that it does not know, and those whose PCI slot has no atomics",
                "sudo dmesg | grep -i kfd",
                "https://github.com/ROCm/legacy-rocm-build/issues/1214",
            )
        elif device.driver in ("vfio-pci", "pci-stub"):
            yield warning(
                f"{name} is given to {device.driver}, for a virtual machine",
                "the host cannot use it meanwhile",
                f"sudo virsh nodedev-reattach pci_{device.address.replace(':', '_').replace('.', '_')}",
            )
        elif device.driver != "amdgpu":
            has = f"has the driver {device.driver}" if device.driver else "has no driver"
            yield failure(
                f"{name} {has}, not amdgpu", "ROCm needs the amdgpu kernel driver", "sudo modprobe amdgpu", _SETUP
            )
    if machine.kfd:
        driver = f"amdgpu {machine.driver}" if machine.driver else "amdgpu"
        yield ok(f"kernel {machine.kernel or 'unknown'}, {driver}, /dev/kfd")
    elif machine.dxg:
        yield ok(f"WSL, kernel {machine.kernel or 'unknown'}, /dev/dxg")
    elif context.has_card and any(device.driver == "amdgpu" for device in machine.unlisted):
        why = "the container was started without it" if machine.container else "the kernel was built without HSA_AMD"
        fix = container_command(context) if machine.container else "sudo modprobe amdgpu && ls -l /dev/kfd"
        yield failure("amdgpu has the card, but there is no /dev/kfd", why, fix, _FLAGS)
    for gpu in machine.gpus:
        known = catalog.arch(gpu.gfx)
        if known and known.min_kernel and version_numbers(machine.kernel) < version_numbers(known.min_kernel):
            yield warning(
                f"kernel {machine.kernel} is old for {gpu.gfx}",
                f"reported to work from Linux {known.min_kernel} on",
                "uname -r",
                "; ".join(known.sources[:2]),
            )


def gpus(context: Context) -> Iterable[Finding]:
    """The GPUs that the compute driver lists."""
    machine = context.machine
    for gpu in machine.gpus:
        kind = "integrated" if gpu.integrated else "card"
        memory = f", {gpu.vram_bytes / 2**30:.1f} GiB" if gpu.vram_bytes else ""
        summary = f"node {gpu.node}: {gpu.gfx}, {gpu.name}, {kind}, {gpu.compute_units} compute units{memory}"
        yield ok(summary + (f", PCI {gpu.pci_address}" if gpu.pci_address else ""))
        if catalog.arch(gpu.gfx) is None:
            yield warning(
                f"{gpu.gfx} is not in the catalog",
                "nothing is known of it here, so nothing is advised and nothing is set for it",
                "rocm-patch report --json -o report.json",
            )
    if machine.unread:
        nodes = ", ".join(map(str, machine.unread))
        yield warning(
            f"topology nodes {nodes} cannot be read",
            "a GPU that is hidden from a container looks like this",
            f"ls -l {context.root / 'sys/class/kfd/kfd/topology/nodes'}/*/properties",
        )
    if machine.gpus:
        return
    if machine.dxg:
        yield ok("WSL: the GPU is behind /dev/dxg, its chip cannot be read from here")
    elif machine.kfd:
        yield failure(
            "/dev/kfd is here, but the driver lists no AMD GPU",
            "the card is not supported by the kernel driver, or hidden from this container",
            container_command(context) if machine.container else "sudo dmesg | grep -i kfd",
            _FLAGS,
        )
    elif not machine.unlisted:
        yield ok("no AMD GPU: neither /dev/kfd nor /dev/dxg is here")


def device_access(context: Context) -> Iterable[Finding]:
    """Whether this user may open /dev/kfd and the render nodes, and if not, which group is missing."""
    machine = context.machine
    if not context.has_card:
        return
    reachable = [gpu for gpu in machine.gpus if gpu.thunk_node is not None]
    for gpu in machine.gpus if reachable else ():
        if gpu.thunk_node is None:
            yield ok(f"{gpu.gfx} at PCI {gpu.pci_address} is hidden: its renderD{gpu.render_minor} is not here")
    wanted = [context.root / "dev/kfd"] if machine.kfd else []
    wanted += [
        context.root / f"dev/dri/renderD{gpu.render_minor}" for gpu in reachable or machine.gpus if gpu.render_minor
    ]
    for device in wanted:
        if os.access(device, os.R_OK | os.W_OK):
            continue
        if not device.exists():
            fix = container_command(context) if machine.container else "sudo modprobe amdgpu"
            yield failure(f"{device} is not here", "ROCm needs /dev/kfd and the card's render node", fix, _FLAGS)
        else:
            yield _denied(context, device)
    if wanted and all(os.access(device, os.R_OK | os.W_OK) for device in wanted):
        yield ok(f"{len(wanted)} device nodes can be opened by {context.user}")


def _denied(context: Context, device: Path) -> Finding:
    status = device.stat()
    gid = status.st_gid
    group, members = context.groups.get(gid, (str(gid), []))
    summary = f"{device} (group {group}, mode {status.st_mode & 0o777:o}) cannot be opened by {context.user}"
    if gid == 0 or status.st_mode & 0o060 != 0o060:
        rule = f'KERNEL=="{"kfd" if device.name == "kfd" else "renderD*"}", GROUP="render", MODE="0660"'
        file = "/etc/udev/rules.d/70-rocm.rules"
        why = "no group but root's has the device; a rule gives it to render"
        fix = f"echo '{rule}' | sudo tee -a {file} && sudo udevadm control --reload && sudo udevadm trigger"
        return failure(summary, why, fix, _SETUP)
    if context.user in members and gid not in os.getgroups():
        why = f"{context.user} was put into {group} after logging in; this session does not know it yet"
        return failure(summary, why, f"newgrp {group}", _SETUP)
    if context.machine.container:
        why = "the container does not have the group of the host's device"
        return failure(summary, why, container_command(context, str(gid)), _FLAGS)
    known = [name for name, _ in context.groups.values()]
    names = ",".join(name for name in dict.fromkeys(("render", "video", group)) if name in known)
    why = "ROCm programs see no GPU without it; log in again afterwards"
    return failure(summary, why, f"sudo usermod -aG {names or group} {context.user}", _SETUP)


def container_command(context: Context, group: str = _RENDER) -> str:
    """How a container is started so that it has the GPU."""
    if context.machine.container == "podman":
        return "podman run --device=/dev/kfd --device=/dev/dri --group-add keep-groups --ipc=host IMAGE"
    return f"docker run --device=/dev/kfd --device=/dev/dri --group-add video --group-add {group} --ipc=host IMAGE"


def pcie_atomics(context: Context) -> Iterable[Finding]:
    """Whether each card's link to the CPU does atomic operations."""
    for gpu in context.machine.gpus:
        if gpu.pcie_atomics is False and not gpu.integrated:
            yield warning(
                f"the slot of {gpu.gfx} (PCI {gpu.pci_address}) has no PCIe atomics",
                "from ROCm 5.4 on torch is reported to compute wrong values silently on such slots; move the "
                "card to a slot that the CPU serves itself",
                f"sudo lspci -vvv -s {gpu.pci_address} | grep -i atomic",
                "https://github.com/pytorch/pytorch/issues/103973",
            )


def integrated(context: Context) -> Iterable[Finding]:
    """Whether an integrated GPU stands in a card's place."""
    shown = [entry.gpu for entry in context.fits]
    cards = [gpu for gpu in shown if not gpu.integrated]
    if cards and shown[0].integrated:
        place = shown.index(cards[0])
        yield warning(
            f"device 0 is the integrated {shown[0].gfx}, the card {cards[0].gfx} is {place}",
            "programs take device 0; rocm-patch run hides the integrated one",
            f"export HIP_VISIBLE_DEVICES={place}",
            "https://github.com/ROCm/legacy-rocm-build/issues/4380",
        )


def kernel_log(context: Context) -> Iterable[Finding]:
    """What the kernel has to say of the GPU since it started."""
    if not context.has_card:
        return
    try:
        content = _kernel_log(context.root)
    except OSError as error:
        yield ok(
            f"the kernel log cannot be read by {context.user} ({error.strerror})",
            fix="sudo dmesg | rocm-patch doctor -",
        )
        return
    lines = [line for line in content.splitlines() if "amdgpu" in line or "kfd" in line]
    found = logs.match("\n".join(lines), [gpu.gfx for gpu in context.machine.gpus])
    for match in found:
        why = f"{match.issue.title}. {match.issue.cause}"
        yield warning(
            f"the kernel log says: {match.line}",
            why,
            match.issue.fix or "sudo dmesg | grep -i amdgpu",
            "; ".join(match.issue.sources[:2]),
        )
    if not found:
        yield ok("the kernel log has no GPU fault")


def _kernel_log(root: Path) -> str:
    """What /dev/kmsg has now; it has a record for each read and blocks at the end unless told not to."""
    handle = os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    parts: list[bytes] = []
    left = _KERNEL_LOG_BYTES
    try:
        while left > 0:
            try:
                part = os.read(handle, 65536)
            except BlockingIOError:
                break
            except BrokenPipeError:  # a record was overwritten while it was read; the next one follows
                continue
            if not part:
                break
            parts.append(part)
            left -= len(part)
    finally:
        os.close(handle)
    return b"".join(parts).decode("utf-8", "replace")


CHECKS = (kernel_driver, gpus, device_access, pcie_atomics, integrated, kernel_log)

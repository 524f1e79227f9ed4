"""Around the GPU: the container, shared memory, limits, and the folders that caches lie in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from rocm_patch.machine import sysfs
from rocm_patch.machine.folders import cache_folder, read_folder
from rocm_patch.tools.doctor.finding import Context, Finding, ok, warning

_FLAGS = "https://github.com/ROCm/legacy-rocm-build/issues/1797"
_WORKER_SHM = 1 << 30  # what a loader's batches in flight can need; Docker gives 64 MiB
_THROWN_AWAY = ("docker", "podman", "kubernetes", "kubepods", "libpod", "containerd")
_FREE = 1 << 30
_OPEN_FILES = 1024


def container(context: Context) -> Iterable[Finding]:
    """What a container was started with, and whether what is learned in it outlives it."""
    kind = context.machine.container
    if not kind:
        return
    status = sysfs.text(context.root / "proc/self/status")
    seccomp = re.search(r"^Seccomp:\s*(\d)", status, re.MULTILINE)
    filtered = ", with a seccomp filter" if seccomp and seccomp[1] == "2" else ""
    yield ok(
        f"in a container ({kind}){filtered}",
        "AMD's instructions add --cap-add=SYS_PTRACE --security-opt seccomp=unconfined" if filtered else "",
        source=_FLAGS,
    )
    if not context.has_card and not context.machine.can_have_amd_gpu:
        return
    cache = cache_folder(context.environ)
    folder = read_folder(cache, context.settings.sysfs_root)
    # Machine containers such as lxc keep their files; those of an image go with it.
    if kind not in _THROWN_AWAY:
        return
    if folder.mount_point in ("", "/") or folder.file_system in ("overlay", "tmpfs"):
        yield warning(
            f"{cache} goes with the container",
            "what is learned of failing convolutions, and MIOpen's compiled kernels, are lost with it; "
            "keep the folder on a volume",
            f"docker run -v rocm-patch-cache:{_volume(context)} IMAGE",
            _FLAGS,
        )


def _volume(context: Context) -> str:
    """The folder to keep: the user's own choice, else the cache folder that MIOpen shares."""
    cache = cache_folder(context.environ)
    return str(cache if context.environ.get("ROCM_PATCH_CACHE_DIR") else cache.parent)


def shared_memory(context: Context) -> Iterable[Finding]:
    """Whether /dev/shm is large enough for loader workers."""
    size = _shm_bytes(context.root)
    if size is None:
        return
    if size < _WORKER_SHM:
        in_container = bool(context.machine.container)
        fix = "docker run --shm-size 8G IMAGE" if in_container else "sudo mount -o remount,size=8G /dev/shm"
        yield warning(
            f"/dev/shm has {size / 2**20:.0f} MiB",
            "loader workers pass batches through it and die with a bus error when it is full",
            fix,
            _FLAGS,
        )
    else:
        yield ok(f"/dev/shm has {size / 2**30:.1f} GiB")


def _shm_bytes(root: Path) -> int | None:
    """Size of /dev/shm: its mount option, which a container's runtime sets, else what the file system says."""
    for line in sysfs.text(root / "proc/mounts").splitlines():
        words = line.split()
        if len(words) > 3 and words[1] == "/dev/shm":
            size = re.search(r"(?:^|,)size=(\d+)([kmg]?)", words[3])
            if size:
                return int(size[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[size[2]]
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def limits(context: Context) -> Iterable[Finding]:
    """Limits of this session that GPU programs run into."""
    text = sysfs.text(context.root / "proc/self/limits")
    found = {name: _limit(text, name) for name in ("Max locked memory", "Max open files")}
    locked, files = found["Max locked memory"], found["Max open files"]
    if locked is not None and locked < 8 << 20 and len(context.machine.gpus) > 1:
        yield warning(
            f"this session may lock {locked >> 10} KiB of memory",
            "communication between GPUs pins buffers and fails without more; log in again afterwards",
            "docker run --ulimit memlock=-1 IMAGE"
            if context.machine.container
            else "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/90-rocm.conf",
            "https://rocm.docs.amd.com/projects/rccl/en/latest/",
        )
    if files is not None and files < _OPEN_FILES:
        yield warning(
            f"this session may open {files} files",
            "loader workers pass a file descriptor for each tensor and fail with 'Too many open files'",
            f"ulimit -n {4 * _OPEN_FILES}",
            "https://github.com/pytorch/pytorch/issues/11201",
        )
    if locked is not None or files is not None:
        yield ok(f"locked memory {_shown(locked)}, open files {files or 'unlimited'}")


def _limit(text: str, name: str) -> int | None:
    """The soft limit of that name, None for unlimited and for unknown."""
    row = re.search(rf"^{name}\s+(\d+)", text, re.MULTILINE)
    return int(row[1]) if row else None


def _shown(size: int | None) -> str:
    return "unlimited" if size is None else f"{size >> 10} KiB"


def folders(context: Context) -> Iterable[Finding]:
    """Whether what is learned can be kept: our folder, and the home that MIOpen uses."""
    folder = read_folder(cache_folder(context.environ), context.settings.sysfs_root)
    if not folder.is_writable:
        yield warning(
            f"{folder.path} cannot be written",
            "nothing that is learned of this machine is kept from one program to the next",
            "export ROCM_PATCH_CACHE_DIR=/var/tmp/rocm-patch-$(id -u)/cache",
        )
    elif folder.is_network:
        yield warning(
            f"{folder.path} lies on {folder.file_system}",
            "databases on a network file system lose their locks; a local folder is better",
            "export ROCM_PATCH_CACHE_DIR=/var/tmp/rocm-patch-$(id -u)/cache",
            "https://www.sqlite.org/howtocorrupt.html",
        )
    elif 0 <= folder.free_bytes < _FREE:
        yield warning(
            f"{folder.free_bytes >> 20} MiB are free at {folder.path}",
            "compiled kernels and databases will not fit",
            f"df -h {folder.mount_point or '/'}",
        )
    else:
        yield ok(f"{folder.path} can be written")
    home = context.machine.home
    named = context.environ.get("MIOPEN_USER_DB_PATH") and context.environ.get("MIOPEN_CUSTOM_CACHE_DIR")
    if context.has_card and (home.is_network or not home.is_writable) and not named:
        where = f"lies on {home.file_system}" if home.is_network else "cannot be written"
        yield warning(
            f"the home folder {home.path} {where}",
            "MIOpen keeps its databases and compiled kernels there; rocm-patch run moves them",
            'eval "$(rocm-patch env)"',
            "ROCm/MIOpen@2d1fd997:src/db_path.cpp.in",
        )


CHECKS = (container, shared_memory, limits, folders)

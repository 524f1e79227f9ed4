"""Folders and the file systems that they lie on, read from the mount table: a network home breaks databases."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.machine import sysfs

# File systems whose locks and latency MIOpen's SQLite databases do not survive; MIOpen keeps a list of its own
# (MIOpen src/db_path.cpp.in), these are the Linux names in /proc/mounts.
NETWORK_FILE_SYSTEMS = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.rclone", "fuse.s3fs",
     "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "wekafs")
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A folder, which need not exist yet.

    Attributes:
        path: as the user would write it.
        file_system: type in the mount table, `ext4`; empty where the table cannot be read.
        mount_point: where that file system is mounted.
        is_writable: whether this user can write in it, or make it.
        free_bytes: what is free there for this user, -1 if unknown.
    """

    path: str
    file_system: str
    mount_point: str
    is_writable: bool
    free_bytes: int

    @property
    def is_network(self) -> bool:
        """Whether it lies on another machine."""
        return self.file_system in NETWORK_FILE_SYSTEMS


def home_of(environ: Mapping[str, str]) -> str:
    """The user's home folder; `/` for a user who has none."""
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111  (Path's raises where there is none)
    return home if home.startswith("/") else "/"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where rocm-patch keeps what it learned: `ROCM_PATCH_CACHE_DIR`, else the platform's cache folder.

    That is `$XDG_CACHE_HOME/rocm-patch` or `~/.cache/rocm-patch` (XDG base directory specification).
    """
    given = environ.get("ROCM_PATCH_CACHE_DIR")
    if given:
        return Path(given)
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path(home_of(environ)) / ".cache") / "rocm-patch"


def read_folder(path: str | Path, root: str = "/") -> Folder:
    """What is known of a folder below `root`, a folder that stands for `/`. Never raises for what it finds."""
    existing = Path(root) / str(path).lstrip("/")
    # A home that is a link onto a network file system lies there.
    real, real_root = os.path.realpath(existing), os.path.realpath(root)
    inside = real.removeprefix(real_root) if real_root != "/" else real
    file_system, mount_point = _mount_of(inside or "/", root)
    while not sysfs.exists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        status = os.statvfs(existing)
        free = status.f_bavail * status.f_frsize
    except OSError:
        free = -1
    # W_OK alone is not enough to make files in a folder.
    is_writable = os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)  # noqa: PTH112  (never raises)
    return Folder(str(path), file_system, mount_point, is_writable, free)


def _mount_of(path: str, root: str) -> tuple[str, str]:
    best = ("", "")
    try:
        table = (Path(root) / "proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return best
    for line in table.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # The last of two mounts on one point hides the first.
        if inside and len(point) >= len(best[1]):
            best = (words[2], point)
    return best

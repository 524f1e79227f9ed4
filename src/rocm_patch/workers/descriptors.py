"""Descriptors that not every Python hands out, though the kernel does: anonymous files, the end of a process.

Builds against an old C library lack `os.memfd_create` (uv's Pythons) or `os.pidfd_open` (conda's).
"""

from __future__ import annotations

import ctypes
import os

_MFD_CLOEXEC = 1
_PIDFD_OPEN = 434  # on every architecture, pidfd_open(2)


def memory_file(name: str) -> int:
    """An anonymous file in memory, closed on exec.

    Raises:
        OSError: the kernel refuses.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "memfd_create"):
        raise OSError("this C library has no memfd_create")
    return _checked(libc.memfd_create(name.encode(), _MFD_CLOEXEC))


def end_of_this_process() -> int:
    """A descriptor that is readable when this process has ended.

    Raises:
        OSError: the kernel has none, before 5.3.
    """
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(os.getpid())
    return _checked(ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_OPEN, os.getpid(), 0))


def _checked(fd: int) -> int:
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd

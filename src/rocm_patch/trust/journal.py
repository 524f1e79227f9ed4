"""What this process computes, kept in a file that outlives it: if it dies, the next process reads which call it was.

One file per process, `runs/<name>.run`, locked for as long as the process lives. The lock, not a process id, says
that its owner is gone: containers that share a cache have ids of their own. Layout: two 64-bit numbers, a header in
JSON up to byte 4096, then one JSON line per convolution; number n is line n.

    first number    the last proven call that was started: one store into mapped memory, never synced
    second number   the unproven call in flight: synced to disk before the call

A crash of the process leaves both in the kernel's page cache; a crash of the machine leaves what was synced.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import json
import mmap
import os
import platform
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rocm_patch.machine import sysfs
from rocm_patch.settings import LOGGER
from rocm_patch.trust.fingerprint import Fingerprint

if sys.platform != "win32":
    import fcntl


_PAGE = 4096
# Taken from the file system at once, so that a disk that fills up later cannot stop a row from being written.
_SIZE = 1 << 18
_PROVEN, _ATTEMPT = 0, 1
# A program with ever new shapes does not fill the disk; beyond this, proven calls go without a number.
MOST_NUMBERS = 8192
# The file in which a program tells `rocm-patch run --restart` that it has to be started again, the id of that run,
# and the exit code of a program that the watchdog has ended (sysexits.h: a temporary failure).
RESTART_VARIABLE, LAUNCH_VARIABLE = "_ROCM_PATCH_RESTART", "_ROCM_PATCH_LAUNCH"
EXIT_HUNG = 75


@dataclass(frozen=True)
class Call:
    """One convolution on one strategy of one machine.

    Attributes:
        machine: the fingerprint.
        spec: `ConvSpec.to_json()`.
        label: the spec for people.
        strategy: its name.
    """

    machine: Fingerprint
    spec: str
    label: str
    strategy: str


@dataclass(frozen=True)
class Remains:
    """What a process that is gone has left.

    Attributes:
        path: its file.
        attempt: the unproven calls that were in flight.
        proven: the proven calls that were started last.
        listed: all the proven calls that it has made, in the order of their first one.
        host: the machine that it ran on; empty if that cannot be told.
        boot: the id of that machine's boot.
        launch: the id of the `rocm-patch run --restart` that it belonged to.
        stack: what faulthandler wrote at a fatal signal; empty without one.
    """

    path: Path
    attempt: tuple[Call, ...]
    proven: tuple[Call, ...]
    listed: tuple[Call, ...]
    host: str
    boot: str
    launch: str
    stack: str


def host_and_boot(root: str = "/") -> tuple[str, str]:
    """What tells this machine and its present boot from others; the host is empty where it has no id."""
    machine = sysfs.text(Path(root) / "etc/machine-id")
    boot = sysfs.text(Path(root) / "proc/sys/kernel/random/boot_id")
    return (f"{machine}@{socket.gethostname()}" if machine else ""), boot


class Journal:
    """The file of this process.

    Raises:
        OSError: the folder cannot hold it: full, read-only, or without locks.
    """

    def __init__(self, folder: Path, launch: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = uuid.uuid4().hex
        self.path = folder / f"{name}.run"
        self._fault_path = folder / f"{name}.fault"
        host, boot = host_and_boot()
        header = {
            "host": host,
            "boot": boot,
            "launch": launch,
            "pid": os.getpid(),
            "python": platform.python_version(),
        }
        hidden = folder / f".{name}"
        self._file = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _allocate(self._file, _SIZE)
            os.pwrite(self._file, json.dumps(header).encode(), 16)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._map = mmap.mmap(self._file, _PAGE)
            hidden.rename(self.path)  # seen by others only once it is locked
        except OSError:
            os.close(self._file)
            with suppress(OSError):
                hidden.unlink()
            raise
        _sync_folder(folder)
        # slots[0] = number is all that a proven call costs.
        self.slots = memoryview(self._map).cast("Q")
        self._end = 2 * _PAGE
        self._numbers: dict[tuple[Call, ...], int] = {}
        self._fault: io.FileIO | None = None
        self._watch_for_fatal_signals()

    def _watch_for_fatal_signals(self) -> None:
        # One handler per process: a program's own is left alone.
        if faulthandler.is_enabled():
            return
        self._fault = io.FileIO(str(self._fault_path), "w")
        faulthandler.enable(self._fault, all_threads=False)

    def number(self, calls: Sequence[Call]) -> int:
        """The number of a call, or of calls that are made as one; 0 if there is no room for it."""
        key = tuple(calls)
        number = self._numbers.get(key)
        if number is None:
            if len(self._numbers) >= MOST_NUMBERS:
                return 0
            line = _line(calls)
            try:
                written = os.pwrite(self._file, line, self._end)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                return 0
            if written != len(line):
                return 0
            self._end += written
            number = self._numbers[key] = len(self._numbers) + 1
        return number

    @contextmanager
    def attempt(self, call: Call) -> Iterator[None]:
        """An unproven call: on disk before it begins, off it when it has ended in whatever way Python sees."""
        os.pwrite(self._file, _line([call])[:_PAGE].ljust(_PAGE, b"\0"), _PAGE)
        self.slots[_ATTEMPT] = 1
        self._sync()
        try:
            yield
        finally:
            self.slots[_ATTEMPT] = 0
            # Or a power cut later on would be put down to it.
            self._sync()

    def _sync(self) -> None:
        try:
            # A mapping's pages count as the file's; flush() alone need not write the file's other pages.
            self._map.flush()
            os.fsync(self._file)
        except OSError as error:  # a disk that fails is no reason for the convolution to
            LOGGER.warning(
                "%s: %s; a crash of the machine will not be remembered\nhint: set ROCM_PATCH_CACHE_DIR",
                self.path,
                error,
            )

    def close(self) -> None:
        """A clean end: nothing is left behind."""
        self._stop_watching()
        with suppress(OSError):
            self.path.unlink()
        # The mapping goes with its last user: another thread may be about to write to it.
        os.close(self._file)

    def _stop_watching(self) -> None:
        if self._fault is not None:
            faulthandler.disable()
            self._fault.close()
            self._fault = None
            with suppress(OSError):
                self._fault_path.unlink()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's file, whose lock and numbers are the parent's."""
        self.slots.release()
        self._map.close()
        os.close(self._file)

    def let_parent_have_faults(self) -> None:
        """In a forked child: its fatal signals are not the parent's."""
        if self._fault is not None:
            faulthandler.disable()
            self._fault.close()
            self._fault = None


def _line(calls: Sequence[Call]) -> bytes:
    return json.dumps([asdict(call) for call in calls], separators=(",", ":")).encode() + b"\n"


def _allocate(file: int, size: int) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.pwrite(file, bytes(size), 0)  # a file system without the call


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems refuse it for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def left_behind(folder: Path) -> Iterator[Remains]:
    """The files of processes that are gone, each locked while it is looked at and removed afterwards.

    A file that another process is looking at is skipped. Whoever gets one has entered what it says by the time the
    iterator moves on.
    """
    try:
        paths = sorted(folder.glob("*.run"))
    except OSError:
        return
    for path in paths:
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # removed by its owner, or another user's
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(file, "rb", closefd=False) as handle:
                content = handle.read()
        except OSError:  # its owner lives
            os.close(file)
            continue
        try:
            remains = _read(path, content)
            if remains is not None:
                yield remains
            for gone in (path, path.with_suffix(".fault")):
                with suppress(OSError):
                    gone.unlink()
        finally:
            os.close(file)


def _read(path: Path, content: bytes) -> Remains | None:
    """None for a file that says nothing: torn by a power cut, or of another version."""
    proven, attempt = (int.from_bytes(content[start : start + 8], "little") for start in (0, 8))
    try:
        header = json.loads(content[16:_PAGE].rstrip(b"\0"))
        host, boot, launch = header["host"], header["boot"], header["launch"]
        lines = content[2 * _PAGE :].rstrip(b"\0").split(b"\n")
        in_flight = _calls(content[_PAGE : 2 * _PAGE].rstrip(b"\0")) if attempt else ()
        listed = [_calls(line) for line in lines[:-1]]
        last = listed[proven - 1] if 0 < proven <= len(listed) else ()
    except (ValueError, KeyError, TypeError):
        return None
    every = tuple(dict.fromkeys(call for calls in listed for call in calls))
    return Remains(path, in_flight, last, every, host, boot, launch, sysfs.text(path.with_suffix(".fault")))


def _calls(line: bytes) -> tuple[Call, ...]:
    return tuple(Call(**{**call, "machine": Fingerprint(**call["machine"])}) for call in json.loads(line))

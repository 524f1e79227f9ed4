"""SQLite connections and a lock file, with the rules that a file shared by many processes asks for."""

from __future__ import annotations

import ctypes
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


_HINT = "name a folder that can be written with ROCM_PATCH_CACHE_DIR"
BUSY_HINT = "end processes that stand still and use the folder, or name another one with ROCM_PATCH_CACHE_DIR"
_NAP_SECONDS = 0.02


class Unavailable(Exception):
    """The file cannot be used now.

    Args:
        cause: a word for the kind of trouble: `locked`, `full`, `newer`, `unusable`.
        message: what is the matter.
        hint: what mends it.
    """

    def __init__(self, cause: str, message: str, hint: str = _HINT) -> None:
        super().__init__(message)
        self.cause, self.message, self.hint = cause, message, hint


def connected(path: Path, options: str, deadline: float) -> sqlite3.Connection:
    """A connection to a file, which waits for others until the deadline.

    Args:
        path: the file.
        options: of SQLite's URI, `mode=rw`.
        deadline: `time.monotonic()` at which to give up.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    # isolation_level: transactions are begun and ended here, not by Python's guess.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}", uri=True, isolation_level=None, check_same_thread=False,
        timeout=max(0.0, deadline - time.monotonic()),
    )  # fmt: skip
    connection.text_factory = lambda content: content.decode("utf-8", "replace")
    # A mapped file that somebody cuts short kills the process.
    connection.execute("PRAGMA mmap_size=0")
    return connection


def patient(connection: sqlite3.Connection, deadline: float) -> sqlite3.Connection:
    """The connection, which waits for others until the deadline from here on."""
    connection.execute(f"PRAGMA busy_timeout={max(0, int((deadline - time.monotonic()) * 1000))}")
    return connection


def cause_of(error: sqlite3.Error) -> str:
    """What kind of trouble it is. By its words: Python 3.10 does not tell SQLite's numbers."""
    text = str(error)
    if not isinstance(error, sqlite3.OperationalError):
        return "damaged"
    words = {
        "locked": ("locked", "busy", "locking protocol", "interrupted"),
        "full": ("full",),
        "unusable": ("I/O error", "unable to open"),
    }
    return next((cause for cause, signs in words.items() if any(sign in text for sign in signs)), "damaged")


def inode(path: Path | str) -> tuple[int, int] | None:
    """What tells a file from another that had the same name; None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def leak(connection: sqlite3.Connection) -> None:
    """Keep a connection from ever being closed: in a forked child that would touch its parent's files."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


@contextmanager
def lock_file(path: Path, deadline: float) -> Iterator[None]:
    """Hold the lock that a file stands for; it is made, and never removed.

    Args:
        path: the file.
        deadline: `time.monotonic()` at which to give up.

    Raises:
        Unavailable: others held it for too long.
        OSError: it cannot be made, or the file system has no locks.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have deleted the folder in the meantime: then this is a lock on nothing.
            if (os.fstat(file).st_dev, os.fstat(file).st_ino) == inode(path):
                break
        except BlockingIOError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if time.monotonic() > deadline:
            raise Unavailable("locked", f"{path} is held by others for too long", BUSY_HINT)
        time.sleep(_NAP_SECONDS)
    try:
        yield
    finally:
        os.close(file)

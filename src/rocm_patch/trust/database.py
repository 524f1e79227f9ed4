"""One SQLite file that many processes share: opened when needed, mended when damaged, and never waited for long.

What can go wrong with such a file is in https://www.sqlite.org/howtocorrupt.html; the rules here follow from it:

- No connection crosses a fork: SQLite keeps its locks per process and file, and a child would think that it holds
  its parent's. `close()` before a fork, `forget()` in a child that got one all the same.
- A file that was moved or deleted while it was open is noticed after each use, by inode. So is a journal that was
  deleted under a live file, which would let two processes write past each other.
- Files are made and set aside under a lock file; no process removes one.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from rocm_patch.machine.folders import read_folder
from rocm_patch.trust.connection import BUSY_HINT, Unavailable, cause_of, connected, inode, leak, lock_file, patient

# A file may be replaced while we look; more often than this in one call, something else is wrong.
_ATTEMPTS = 4
_T = TypeVar("_T")


class Database:
    """A connection that comes and goes. One thread at a time.

    Args:
        path: the file.
        schema: statements that make its tables.
        version: of the schema.
        probe: a query that fails where a table or a column is missing.
        on_damage: told, in words, of a file that was set aside.

    Attributes:
        generation: goes up when the file turns out to be another one than last time.
        is_fresh: whether nothing has been written to this generation yet.
    """

    def __init__(
        self, path: Path, schema: str, version: int, probe: str, on_damage: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path, self.generation, self.is_fresh = path, 0, True
        self._schema, self._version, self._probe, self._on_damage = schema, version, probe, on_damage
        self._lock_path = path.with_suffix(".lock")
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._mode = ""
        self._is_inherited = False
        self._identity: tuple[object, ...] = ()
        self._number = 0
        self._file_before: object = None

    def read(self, deadline: float, query: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]] | None:
        """The rows of a query; None where there is no file yet.

        Raises:
            Unavailable: it cannot be read.
        """
        return self._attempt(
            deadline, False, lambda connection: patient(connection, deadline).execute(query, values).fetchall()
        )

    def write(
        self, deadline: float, work: Callable[[sqlite3.Connection], _T], *, durable: bool, create: bool = True
    ) -> _T | None:
        """Do some work in a transaction; None where there is no file and none is to be made.

        Args:
            deadline: `time.monotonic()` at which to give up.
            work: may be called more than once, each time on a transaction of its own.
            durable: whether it must survive a power cut that follows at once.
            create: whether to make the file.

        Raises:
            Unavailable: nothing was written.
        """

        def in_transaction(connection: sqlite3.Connection) -> _T:
            if self._mode == "read-only":
                raise Unavailable("unusable", f"{self.path} cannot be written")
            level = ("EXTRA" if self._mode == "delete" else "FULL") if durable or self.is_fresh else "NORMAL"
            patient(connection, deadline).execute(f"PRAGMA synchronous={level}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                patient(connection, deadline).execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

        if self._mode == "read-only":  # perhaps not any more
            self.close()
        result = self._attempt(deadline, create, in_transaction)
        self.is_fresh = self.is_fresh and self._connection is None
        return result

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        connection, self._connection, self._mode, self._identity = self._connection, None, "", ()
        if connection is not None and self._pid != os.getpid():
            leak(connection)
        elif connection is not None:
            with suppress(sqlite3.Error):  # tidying up on a disk that is full or gone; the data is where it was
                connection.close()

    def forget(self) -> None:
        """In a forked child: a connection that is open here is the parent's, and the file out of reach."""
        self._is_inherited = self._is_inherited or self._connection is not None
        self.close()

    def _attempt(self, deadline: float, create: bool, action: Callable[[sqlite3.Connection], _T]) -> _T | None:
        problem: Exception | None = None
        try:
            for _ in range(_ATTEMPTS):
                try:
                    connection = self._open(deadline, create)
                    if connection is None:
                        return None
                    result = action(connection)
                    if self._is_still_there(deadline):
                        return result
                except sqlite3.Error as error:
                    problem = error
                    if self._is_still_there(deadline):
                        self._mend(error, deadline)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise Unavailable("unusable", f"{self.path} cannot be used: {error}") from error
        raise Unavailable("unusable", f"{self.path} cannot be used: {problem or 'it is replaced again and again'}")

    def _open(self, deadline: float, create: bool) -> sqlite3.Connection | None:
        if self._connection is not None and self._pid != os.getpid():  # a fork that Python did not see
            self.forget()
        if self._is_inherited:
            what = "this process was forked while another thread used the file"
            raise Unavailable("unusable", what, "start processes with spawn")
        if self._connection is None:
            if inode(self.path) is None or not self._connect(deadline):
                if not create:
                    return None
                self._make(deadline)
                self._connect(deadline)
            # A deleted file's inode number may be its successor's: each file has a number of its own inside.
            if self._connection is not None and (self._identity[0], self._number) != self._file_before:
                self._file_before, self.is_fresh = (self._identity[0], self._number), True
                self.generation += 1
        return self._connection

    def _connect(self, deadline: float) -> bool:
        """False for a file that has no tables yet."""
        try:
            version = self._begin(deadline)
            if version == self._version:
                if self._mode == "wal" and read_folder(self.path.parent).is_network:
                    self._set_mode("DELETE")
                self._identity = self._look()
                return True
        except BaseException:
            self.close()
            raise
        self.close()
        if version:
            hint = "update rocm-patch, or name another folder with ROCM_PATCH_CACHE_DIR"
            raise Unavailable("newer", f"{self.path} is of a newer rocm-patch (schema {version})", hint)
        return False

    def _begin(self, deadline: float) -> int:
        """Open the file, for reading alone where it cannot be written; the version of its schema."""
        connection = self._keep(connected(self.path, "mode=rw", deadline))
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (self._number,) = connection.execute("PRAGMA application_id").fetchone()
            (self._mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        except sqlite3.OperationalError:
            if os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
                raise
            # A journal cannot be opened in a folder that is read-only; what it holds is not seen then.
            self.close()
            connection = self._keep(connected(self.path, "mode=ro&immutable=1", deadline))
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        if not os.access(self.path, os.W_OK):
            self._mode = "read-only"
        return int(version)

    def _keep(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        self._connection, self._pid = connection, os.getpid()
        return connection

    def _set_mode(self, mode: str) -> None:
        assert self._connection is not None
        (self._mode,) = self._connection.execute(f"PRAGMA journal_mode={mode}").fetchone()
        if self._mode != mode.lower():
            raise Unavailable("unusable", f"{self.path} cannot be brought into journal mode {mode}")

    def _make(self, deadline: float) -> None:
        """An empty file with its tables, unless another process makes it first."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock_file(self._lock_path, deadline):
            if inode(self.path) and self._connect(deadline):
                self.close()
                return
            # Write-ahead logging needs memory that all processes share: no network has it, and not every disk.
            modes = ("DELETE",) if read_folder(self.path.parent).is_network else ("WAL", "DELETE")
            for mode in modes:
                connection = self._keep(connected(self.path, "mode=rwc", deadline))
                try:
                    if mode == "DELETE":
                        connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # or it would try to share memory first
                    self._set_mode(mode)
                    connection.execute("PRAGMA synchronous=EXTRA")
                    number = int.from_bytes(os.urandom(4), "big", signed=True)
                    connection.executescript(
                        f"BEGIN IMMEDIATE; {self._schema}; PRAGMA application_id={number}; "
                        f"PRAGMA user_version={self._version}; COMMIT"
                    )
                    return
                except sqlite3.OperationalError as error:
                    if mode == modes[-1] or cause_of(error) in ("locked", "full"):
                        raise
                finally:
                    self.close()

    def _look(self) -> tuple[object, ...]:
        """Which files these are now."""
        names = ("", "-wal", "-shm") if self._mode == "wal" else ("",)
        return tuple(inode(f"{self.path}{name}") for name in names)

    def _is_still_there(self, deadline: float) -> bool:
        """Whether the files at the path are those that are open; lets go of them if not."""
        if self._connection is None:
            return True
        now, then = self._look(), self._identity
        if now == then or not then:
            return True
        if now[0] == then[0]:
            why = "its journal was deleted while it was in use"
            self._set_aside(deadline, why, lambda: self._look()[0] == then[0] and self._look() != then)
        self.close()
        return False

    def _mend(self, error: sqlite3.Error, deadline: float) -> None:
        """Set a damaged file aside; or somebody has done so before us, or it was nothing.

        Raises:
            Unavailable: there is no use in another attempt.
        """
        self.close()
        cause = cause_of(error)
        if cause == "locked":
            raise Unavailable("locked", f"{self.path} is in use by others for too long", BUSY_HINT) from error
        if cause == "full":
            raise Unavailable("full", f"{self.path}: the disk is full ({error})") from error
        if inode(self.path) is None:
            return
        if not (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)):
            raise Unavailable("unusable", f"{self.path} cannot be written ({error})") from error
        self._set_aside(deadline, str(error), lambda: self._is_damaged(deadline))

    def _is_damaged(self, deadline: float) -> bool:
        """What a fresh look says."""
        try:
            with closing(connected(self.path, "mode=rw", deadline)) as connection:
                connection.set_progress_handler(lambda: time.monotonic() > deadline, 10000)
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version not in (0, self._version):
                    return False
                if version:
                    connection.execute(self._probe).fetchone()
                (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                connection.execute("BEGIN IMMEDIATE")  # which says nothing of a header that forbids to write
                connection.execute(f"PRAGMA user_version={version}")
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            return cause_of(error) == "damaged"
        return bool(found != "ok")

    def _set_aside(self, deadline: float, why: str, is_needed: Callable[[], bool]) -> None:
        """Move the file away, whole, so that somebody can look into it, if that is needed still."""
        with lock_file(self._lock_path, deadline):
            if inode(self.path) is None or not is_needed():
                return
            stem = f"{self.path}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
            number, target = 1, stem
            while os.path.lexists(target):
                number, target = number + 1, f"{stem}.{number}"
            # A crash between the two leaves a journal without its file, which SQLite throws away.
            for name in ("", "-journal", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.rename(f"{self.path}{name}", f"{target}{name}")  # noqa: PTH104
        self._on_damage(f"{self.path} is damaged ({why}); it lies in {target} now, and a new one is begun")

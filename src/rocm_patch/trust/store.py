"""What has been learned on this machine: which strategy works for which convolution, and which must never run again.

Shared by all processes of a user, in `verdicts.db` in the cache folder. What cannot be written stays in memory and
is written with the next entry that can be.
"""

from __future__ import annotations

import atexit
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rocm_patch.settings import LOGGER
from rocm_patch.trust.connection import Unavailable
from rocm_patch.trust.database import Database
from rocm_patch.trust.entries import (
    HARD,
    ONE,
    PROBE,
    SCHEMA,
    VERDICT_COLUMNS,
    VERDICTS,
    VERSION,
    Key,
    Removal,
    Row,
    Suspicion,
    Verdict,
    query_all,
    readable,
    row_of,
    suspicion_of,
    verdict_of,
)
from rocm_patch.trust.fingerprint import Fingerprint
from rocm_patch.trust.memory import Memory

# Seconds that a call waits for a file that has been locked for long.
_LEAST_WAIT = 0.05
__all__ = ["VERDICTS", "Row", "Store", "Suspicion", "Verdict"]

_T = TypeVar("_T")


class Store:
    """The verdicts of this user's machines. Safe between processes and threads and across a fork.

    Whatever happens to the file, no method raises for it: there is one warning for each kind of trouble, and memory.

    Args:
        folder: where `verdicts.db` lies; made with the first entry.
        wait: seconds that a call may spend on waiting for other processes and threads. Halved with each time in a row
            that it was not enough, so that a file that stays locked does not cost this much again and again.
    """

    def __init__(self, folder: Path, wait: float = 2.0) -> None:
        self._path = folder / "verdicts.db"
        self._wait, self._timeouts = wait, 0
        self._database = Database(self._path, SCHEMA, VERSION, PROBE, self._note_damage)
        self._lock = threading.Lock()
        self._trouble: set[str] = set()
        self._has_failed = False  # the last use of the file
        self._notes: deque[tuple[str, str, str]] = deque()
        self._said: set[str] = set()
        self._memory = Memory()
        self._generation = 0
        _STORES.add(self)

    @property
    def where(self) -> str:
        """The file's path, or `memory` while that cannot be used."""
        return "memory" if self._trouble else str(self._path)

    def get(self, machine: Fingerprint, spec: str, strategy: str) -> Verdict | None:
        """The verdict, None where there is none."""
        query = f"SELECT {VERDICT_COLUMNS} FROM verdicts WHERE {ONE}"
        key = (machine, spec, strategy)
        with self._held() as deadline:
            found = self._read(deadline, query, (machine.id, spec, strategy), verdict_of)
            own = self._memory.verdicts.get(key)  # true whatever the file says, whose journal may have been deleted
            known = found[0] if found and not self._memory.has_removed(key) else None
        return own if own is not None and own.replaces(known) else known

    def put(self, machine: Fingerprint, spec: str, label: str, strategy: str, verdict: Verdict) -> bool:
        """Enter a verdict, and with it end a suspicion. A bad one stands until `forget` or `clear`.

        Returns:
            Whether it is in the file; if not, it is in memory.
        """
        return self._enter(Row(machine, spec, label, strategy, verdict))

    def suspect(self, machine: Fingerprint, spec: str, label: str, strategy: str, evidence: str) -> bool:
        """Enter a suspicion, to be looked into before the strategy runs again; as `put` otherwise."""
        return self._enter(Suspicion(machine, spec, label, strategy, time.time(), evidence))

    def suspicion(self, machine: Fingerprint, spec: str, strategy: str) -> str | None:
        """The evidence of a suspicion, None where there is none."""
        query = f"SELECT evidence FROM suspicions WHERE {ONE}"
        key, memory = (machine, spec, strategy), self._memory
        with self._held() as deadline:
            found = self._read(deadline, query, (machine.id, spec, strategy), str)
            if self._counts(key, found) and key in memory.suspicions:
                return own.evidence if (own := memory.suspicions[key]) else None
        return found[0] if found else None

    def acquit(self, machine: Fingerprint, spec: str, strategy: str) -> bool:
        """End a suspicion; as `put` otherwise."""
        return self._enter(Removal((machine, spec, strategy), verdict=False))

    def forget(self, machine: Fingerprint, spec: str, strategy: str) -> bool:
        """Take a verdict back, whatever it says, and a suspicion with it; as `put` otherwise."""
        return self._enter(Removal((machine, spec, strategy), verdict=True))

    def hard(self, machine: Fingerprint, strategy: str) -> int:
        """How many convolutions have crashed or hung on that machine with that strategy."""
        query = f"SELECT spec FROM verdicts WHERE machine = ? AND strategy = ? AND kind IN {HARD}"
        with self._held() as deadline:
            memory = self._memory
            found = self._read(deadline, query, (machine.id, strategy), str)
            specs = {spec for spec in found or () if not memory.has_removed((machine, spec, strategy))}
            own = memory.verdicts if memory.unsaved or self._counts(None, found) else {}
            for key, verdict in own.items():
                if verdict.is_hard and key[::2] == (machine, strategy) and self._counts(key, found):
                    specs.add(key[1])
        return len(specs)

    def rows(self, machine: Fingerprint | None = None) -> list[Row]:
        """All verdicts, of one machine or of all, the oldest first."""
        memory = self._memory
        with self._held() as deadline:
            found = self._read(deadline, *query_all("verdicts", VERDICT_COLUMNS, machine), row_of)
            rows = {row.key: row for row in found or () if not memory.has_removed(row.key)}
            for key, verdict in memory.verdicts.items():
                if self._counts(key, found) and verdict.replaces(rows[key].verdict if key in rows else None):
                    rows[key] = memory.row(key)
        chosen = [row for row in rows.values() if machine in (None, row.machine)]
        return sorted(chosen, key=lambda row: row.verdict.when)

    def suspicions(self, machine: Fingerprint | None = None) -> list[Suspicion]:
        """All suspicions, of one machine or of all, the oldest first."""
        with self._held() as deadline:
            found = self._read(deadline, *query_all("suspicions", "time, evidence", machine), suspicion_of)
            known: dict[Key, Suspicion | None] = {suspicion.key: suspicion for suspicion in found or ()}
            known.update((key, own) for key, own in self._memory.suspicions.items() if self._counts(key, found))
        chosen = [entry for entry in known.values() if entry is not None and machine in (None, entry.machine)]
        return sorted(chosen, key=lambda suspicion: suspicion.when)

    def clear(self, machine: Fingerprint | None = None, *, only_bad: bool = False) -> int:
        """Forget verdicts and suspicions, of one machine or of all.

        Args:
            machine: whose; None for all.
            only_bad: keep the verdicts that say ok.

        Returns:
            How many were removed. `where` says memory where those in the file could not be.
        """
        where, values = ("machine = ?", (machine.id,)) if machine else ("1", ())
        bad = " AND kind != 'ok'" if only_bad else ""

        def work(connection: sqlite3.Connection) -> int:
            removed = connection.execute(f"DELETE FROM verdicts WHERE {where}{bad}", values).rowcount
            return removed + connection.execute(f"DELETE FROM suspicions WHERE {where}", values).rowcount

        with self._held() as deadline:
            removed = self._write(deadline, work, durable=True, create=False) or 0
            return removed if deadline is None else removed + self._memory.clear(machine, only_bad)

    def close(self) -> None:
        """Write what is not written yet and let go of the file; the store can still be used."""
        if self._memory.unsaved or self._memory.inbox:
            self._save()
        with self._held() as deadline:
            if deadline is not None:
                self._database.close()

    def _counts(self, key: Key | None, found: list[Any] | None) -> bool:
        """Whether memory has a say about a key: where the file is not there, a new one, or behind."""
        return found is None or key in self._memory.unsaved or self._database.generation != self._generation

    def _enter(self, entry: Row | Suspicion | Removal) -> bool:
        # A thread that does not get the lock in time leaves it there for the next one.
        self._memory.inbox.append(entry)
        return self._save()

    def _save(self) -> bool:
        """Write what is not in the file; all that is known where the file is another one than before."""
        memory = self._memory

        def work(connection: sqlite3.Connection) -> bool:
            return memory.write(connection, everything=self._database.generation != self._generation)

        with self._held() as deadline:
            needed = memory.needs_file
            written = self._write(deadline, work, durable=memory.is_grave, create=needed)
            if written:
                self._generation = self._database.generation
            # Removals alone, and no file that they could be in.
            if written or not (needed or self._has_failed or deadline is None):
                memory.saved()
                return True
        return False

    def _write(
        self, deadline: float | None, work: Callable[[sqlite3.Connection], _T], *, durable: bool, create: bool
    ) -> _T | None:
        write = self._database.write
        return self._try("write", deadline, lambda until: write(until, work, durable=durable, create=create))

    def _read(
        self, deadline: float | None, query: str, values: tuple[Any, ...], make: Callable[..., _T]
    ) -> list[_T] | None:
        """What a query finds; None where the file cannot be asked. Rows that make no sense are left out."""
        rows = self._try("read", deadline, lambda until: self._database.read(until, query, values))
        return None if rows is None else [made for row in rows if (made := readable(make, row)) is not None]

    def _try(self, what: str, deadline: float | None, action: Callable[[float], _T | None]) -> _T | None:
        if deadline is None:
            return None
        self._has_failed = True
        try:
            result = action(deadline)
        except Unavailable as trouble:
            if trouble.cause == "locked":
                self._timeouts += 1
            else:
                self._trouble.add(what)
            text = f"{trouble.message}; what is learned about convolutions stays in memory for now"
            self._notes.append((trouble.cause, text, trouble.hint))
            return None
        self._has_failed, self._timeouts = False, 0
        self._trouble -= {"read", what}
        return result

    @contextmanager
    def _held(self) -> Iterator[float | None]:
        """The lock, and until when to wait in all; None for one that could not be had."""
        patience = max(self._wait / 2 ** min(self._timeouts, 16), min(self._wait, _LEAST_WAIT))
        deadline = time.monotonic() + patience
        lock = self._lock
        is_ours = lock.acquire(timeout=patience)
        try:
            if is_ours:
                self._memory.take_in()
            yield deadline if is_ours else None
        finally:
            if is_ours:
                lock.release()
            self._say()

    def _note_damage(self, text: str) -> None:
        self._notes.append(("damaged", text, "rocm-patch cache clear --all removes what was set aside"))

    def _say(self) -> None:
        # Not under the lock: a log handler may do anything.
        while self._notes:
            cause, text, hint = self._notes.popleft()
            if cause not in self._said:
                self._said.add(cause)
                LOGGER.warning("%s\nhint: %s", text, hint)


_STORES: weakref.WeakSet[Store] = weakref.WeakSet()
_FORKING = threading.local()


def _before() -> None:
    _FORKING.stores = [store for store in list(_STORES) if store._lock.acquire(timeout=store._wait)]
    for store in _FORKING.stores:
        store._database.close()


def _in_parent() -> None:
    for store in _FORKING.__dict__.pop("stores", ()):
        store._lock.release()


def _in_child() -> None:
    _FORKING.__dict__.clear()
    for store in list(_STORES):
        store._lock = threading.Lock()
        store._database.forget()


@atexit.register
def _close_all() -> None:
    for store in list(_STORES):
        store.close()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)

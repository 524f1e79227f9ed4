"""What this process has entered into the verdict store, so that a file that is lost can be written anew."""

from __future__ import annotations

import sqlite3
from collections import deque

from rocm_patch.trust.entries import (
    KEY_COLUMNS,
    ONE,
    VERDICT_COLUMNS,
    Key,
    Removal,
    Row,
    Suspicion,
    Verdict,
    readable,
    verdict_of,
)
from rocm_patch.trust.fingerprint import Fingerprint

# The oldest entries go first, so that a program with ever new shapes does not fill the memory.
MOST_REMEMBERED = 8192


class Memory:
    """Entries of this process, and which of them are not in the file. One thread at a time, but for `inbox`.

    Attributes:
        inbox: where entries arrive; `take_in` sorts them.
        verdicts: by key.
        suspicions: by key; None for one that has ended.
        unsaved: keys whose entries are not in the file.
    """

    def __init__(self) -> None:
        self.inbox: deque[Row | Suspicion | Removal] = deque()
        self.verdicts: dict[Key, Verdict] = {}
        self.suspicions: dict[Key, Suspicion | None] = {}
        self.unsaved: set[Key] = set()
        self._removed: set[Key] = set()  # verdicts that the file has still
        self._labels: dict[Key, str] = {}

    def take_in(self) -> None:
        """Sort what has arrived."""
        while self.inbox:
            entry = self.inbox.popleft()
            key = entry.key
            self.unsaved.add(key)
            self.suspicions[key] = entry if isinstance(entry, Suspicion) else None
            if isinstance(entry, Removal):
                if entry.verdict:
                    self.verdicts.pop(key, None)
                    self._removed.add(key)
                continue
            self._labels[key] = entry.label
            if isinstance(entry, Row) and entry.verdict.replaces(self.verdicts.get(key)):
                self.verdicts[key] = entry.verdict
        while len(self.suspicions) > MOST_REMEMBERED:
            self._forget(next(iter(self.suspicions)))

    def has_removed(self, key: Key) -> bool:
        """Whether the file's verdict is not to be believed."""
        return key in self._removed

    def row(self, key: Key) -> Row:
        """The verdict of a key, as a row."""
        return Row(key[0], key[1], self._labels.get(key, ""), key[2], self.verdicts[key])

    @property
    def needs_file(self) -> bool:
        """Whether anything unsaved is worth a file of its own."""
        return any(key in self.verdicts or self.suspicions.get(key) for key in self.unsaved)

    @property
    def is_grave(self) -> bool:
        """Whether anything unsaved must survive a power cut."""
        verdicts = (self.verdicts[key] for key in self.unsaved if key in self.verdicts)
        return any(verdict.is_bad for verdict in verdicts) or any(self.suspicions.get(key) for key in self.unsaved)

    def clear(self, machine: Fingerprint | None, only_bad: bool) -> int:
        """Forget the entries of a machine, of all for None; how many of them were in memory alone."""
        count = 0
        for key in [key for key in self.suspicions if machine in (None, key[0])]:
            is_kept = only_bad and key in self.verdicts and not self.verdicts[key].is_bad
            if key in self.unsaved:
                count += (self.suspicions[key] is not None) + (key in self.verdicts and not is_kept)
            if is_kept:
                self.suspicions[key] = None
            else:
                self._forget(key)
        return count

    def _forget(self, key: Key) -> None:
        del self.suspicions[key]
        self.verdicts.pop(key, None)
        self._labels.pop(key, None)
        self.unsaved.discard(key)
        self._removed.discard(key)

    def write(self, connection: sqlite3.Connection, *, everything: bool) -> bool:
        """Write what is not in the file, or everything, within a transaction; it stays unsaved until `saved`."""
        for key in list(self.suspicions) if everything else self.unsaved:
            self._merge(connection, key)
        return True

    def saved(self) -> None:
        """The transaction of `write` is in the file."""
        self.unsaved.clear()
        self._removed.clear()

    def _merge(self, connection: sqlite3.Connection, key: Key) -> None:
        machine, spec, strategy = key
        where = (machine.id, spec, strategy)
        if key in self._removed:
            connection.execute(f"DELETE FROM verdicts WHERE {ONE}", where)
        row = connection.execute(f"SELECT {VERDICT_COLUMNS} FROM verdicts WHERE {ONE}", where).fetchone()
        known = readable(verdict_of, row) if row else None
        own, suspicion, label = self.verdicts.get(key), self.suspicions[key], _encodable(self._labels.get(key, ""))
        if own is not None or suspicion is not None:
            connection.execute("INSERT OR IGNORE INTO machines VALUES (?, ?)", (machine.id, machine.to_json()))
        if own is not None and own.replaces(known):
            known = own
            columns = (own.kind, own.seconds, own.error, own.calls, own.when, _encodable(own.evidence))
            connection.execute(
                f"INSERT OR REPLACE INTO verdicts ({KEY_COLUMNS}, label, {VERDICT_COLUMNS}) "
                "VALUES (?,?,?,?,?,?,?,?,?,?)",
                (*where, label, *columns),
            )
        if suspicion is not None and (known is None or not known.is_bad):
            connection.execute(
                "INSERT OR REPLACE INTO suspicions VALUES (?,?,?,?,?,?)",
                (*where, label, suspicion.when, _encodable(suspicion.evidence)),
            )
        else:
            connection.execute(f"DELETE FROM suspicions WHERE {ONE}", where)


def _encodable(text: str) -> str:
    # What a program has printed may hold what UTF-8 cannot.
    return text.encode("utf-8", "replace").decode("utf-8")

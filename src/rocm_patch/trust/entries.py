"""What the verdict store holds, in Python and in SQL."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rocm_patch.trust.fingerprint import Fingerprint

VERDICTS = ("ok", "error", "crash", "hang", "wrong")
HARD = ("crash", "hang")
_WORDS = {"ok": "works", "error": "failed", "crash": "crashed", "hang": "hung", "wrong": "gave wrong values"}

VERSION = 1
KEY_COLUMNS = "machine, spec, strategy"
VERDICT_COLUMNS = "kind, seconds, error, calls, time, evidence"
SCHEMA = f"""
    CREATE TABLE machines (id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE verdicts (
        machine TEXT NOT NULL, spec TEXT NOT NULL, strategy TEXT NOT NULL, label TEXT NOT NULL, kind TEXT NOT NULL,
        seconds REAL, error REAL, calls INTEGER NOT NULL, time REAL NOT NULL, evidence TEXT NOT NULL,
        PRIMARY KEY ({KEY_COLUMNS})
    ) WITHOUT ROWID;
    CREATE INDEX hard ON verdicts (machine, strategy, kind);
    CREATE TABLE suspicions (
        machine TEXT NOT NULL, spec TEXT NOT NULL, strategy TEXT NOT NULL, label TEXT NOT NULL,
        time REAL NOT NULL, evidence TEXT NOT NULL, PRIMARY KEY ({KEY_COLUMNS})
    ) WITHOUT ROWID
"""
PROBE = (
    f"SELECT {KEY_COLUMNS}, label, {VERDICT_COLUMNS} FROM verdicts "
    f"UNION ALL SELECT {KEY_COLUMNS}, label, time, evidence, 0, 0, 0, 0 FROM suspicions "
    "UNION ALL SELECT id, fingerprint, 0, 0, 0, 0, 0, 0, 0, 0 FROM machines LIMIT 1"
)
ONE = "machine = ? AND spec = ? AND strategy = ?"
_T = TypeVar("_T")
Key = tuple[Fingerprint, str, str]


@dataclass(frozen=True)
class Verdict:
    """How a strategy did for one convolution.

    Attributes:
        kind: one of VERDICTS.
        seconds: how long the call took.
        error: the largest relative error seen, NaN if none was measured.
        calls: how often it was tried.
        when: Unix time.
        evidence: what it rests on: a message, the last lines of stderr, a stack.
    """

    kind: str
    seconds: float = 0.0
    error: float = math.nan
    calls: int = 1
    when: float = field(default_factory=time.time)
    evidence: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the strategy must not run again for this convolution."""
        return self.kind != "ok"

    @property
    def is_hard(self) -> bool:
        """Whether it cost the process its life."""
        return self.kind in HARD

    def replaces(self, other: Verdict | None) -> bool:
        """Whether this one stands where there is already another: the worse one does, and the newer of equals."""
        if other is None:
            return True
        worse = (self.is_bad + self.is_hard) - (other.is_bad + other.is_hard)
        return worse > 0 or (worse == 0 and (self.is_bad or self.calls >= other.calls))

    def __str__(self) -> str:
        """What follows a strategy's name in a sentence: `hung: no progress for 60 s`."""
        first = self.evidence.strip().partition("\n")[0]
        word = _WORDS.get(self.kind, "")
        return ": ".join(part for part in (word, first) if part) or self.kind


@dataclass(frozen=True)
class Row:
    """A verdict and what it is about.

    Attributes:
        machine: where it holds.
        spec: the convolution, `ConvSpec.to_json()`.
        label: the same for people.
        strategy: its name.
        verdict: how it did.
    """

    machine: Fingerprint
    spec: str
    label: str
    strategy: str
    verdict: Verdict

    @property
    def key(self) -> Key:
        """What there is one verdict for."""
        return self.machine, self.spec, self.strategy


@dataclass(frozen=True)
class Suspicion:
    """A process died, or stood still, with this call last; the other fields are a `Row`'s.

    Attributes:
        when: Unix time.
        evidence: what is known of it.
    """

    machine: Fingerprint
    spec: str
    label: str
    strategy: str
    when: float
    evidence: str

    @property
    def key(self) -> Key:
        """What there is one suspicion for."""
        return self.machine, self.spec, self.strategy


@dataclass(frozen=True)
class Removal:
    """The end of a suspicion, or of a verdict too.

    Attributes:
        key: what it is about.
        verdict: whether the verdict goes.
    """

    key: Key
    verdict: bool


def verdict_of(
    kind: str, seconds: float | None, error: float | None, calls: int, when: float, evidence: str
) -> Verdict:
    """The verdict in VERDICT_COLUMNS.

    Raises:
        ValueError: it is none.
        TypeError: likewise.
    """
    if kind not in VERDICTS:
        raise ValueError(f"unknown verdict {kind!r}")
    # SQLite has no NaN.
    numbers = [math.nan if number is None else float(number) for number in (seconds, error)]
    return Verdict(kind, numbers[0], numbers[1], int(calls), float(when), evidence)


def row_of(machine: str, spec: str, label: str, strategy: str, *verdict: Any) -> Row:
    """What `query_all` finds among the verdicts; raises as `verdict_of`."""
    return Row(Fingerprint.from_json(machine), spec, label, strategy, verdict_of(*verdict))


def suspicion_of(machine: str, spec: str, label: str, strategy: str, when: float, evidence: str) -> Suspicion:
    """What `query_all` finds among the suspicions; raises as `verdict_of`."""
    return Suspicion(Fingerprint.from_json(machine), spec, label, strategy, float(when), evidence)


def query_all(table: str, columns: str, machine: Fingerprint | None) -> tuple[str, tuple[str, ...]]:
    """The query for a whole table, or for one machine's part, and its values."""
    query = f"SELECT fingerprint, spec, label, strategy, {columns} FROM {table} JOIN machines ON id = machine"
    return (query, ()) if machine is None else (f"{query} WHERE machine = ?", (machine.id,))


def readable(make: Callable[..., _T], row: tuple[Any, ...]) -> _T | None:
    """What a row says, None for one that makes no sense."""
    try:
        return make(*row)
    except (TypeError, ValueError):
        return None

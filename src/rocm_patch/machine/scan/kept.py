"""What was found in files, remembered for as long as neither the file, the rules nor this code change."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from rocm_patch._version import __version__
from rocm_patch.machine import catalog
from rocm_patch.machine.fit import override_target
from rocm_patch.machine.folders import cache_folder
from rocm_patch.settings import LOGGER

if TYPE_CHECKING:  # the plan of variables asks for sums alone, and is made in every patched process
    from rocm_patch.machine.scan.inventory import Content

# A file's content for one question; the number of the version changes with what is counted and how.
_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS file (
    path     TEXT NOT NULL,  -- absolute
    question TEXT NOT NULL,  -- card, targets whose code was examined for it, and what the rules were
    identity TEXT NOT NULL,  -- size, time and inode of the file
    harm     TEXT NOT NULL,  -- JSON: target to [kernels whose code was examined, those of them with a hazard]
    content  BLOB NOT NULL,  -- Content.to_json(), compressed with zlib
    PRIMARY KEY (path, question)
) WITHOUT ROWID
"""
_TIMEOUT_SECONDS, _PATIENCE_SECONDS = 10.0, 0.5
_LARGEST = 1 << 28


def examined_targets(card: str, reported: str) -> tuple[str, ...]:
    """The targets whose code is examined for a card: its own, that of the override that the catalog knows for it, and
    that of the chip that it reports."""
    known = catalog.arch(card)
    pretended = override_target(known.override) if known and known.override else card
    return tuple(dict.fromkeys(t for chip in (card, pretended, reported) if chip for t in catalog.targets_of(chip)))


@dataclass(frozen=True)
class Harm:
    """What is remembered of several files.

    Attributes:
        examined: kernels whose code was examined.
        harmful: those that the card cannot run safely.
    """

    examined: int
    harmful: int


def real_path(path: Path) -> Path:
    """The path under which a file or folder is remembered, whatever links lead to it."""
    return Path(os.path.realpath(path))


def _key(path: Path) -> str:
    """A path as text that SQLite takes: a name may hold bytes that are no text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def identity_of(path: Path) -> str | None:
    """What changes when the file does; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


class Kept:
    """The memory of scans in the cache folder; where that cannot be used, there is one warning and no memory.

    Args:
        environ: says where the cache folder is.
        card: the chip that was asked for, empty for none.
        reported: the chip whose code it loads.
    """

    def __init__(self, environ: Mapping[str, str], card: str, reported: str) -> None:
        self._path = cache_folder(environ) / "scan.sqlite3"
        self._question = f"{card}|{','.join(examined_targets(card, reported))}|{_rules()}"
        self._database: sqlite3.Connection | None = None
        self._is_usable, self._can_write = True, False

    def read(self, path: Path, identity: str) -> Content | None:
        """What is remembered of a file that has not changed."""
        query = "SELECT content FROM file WHERE path = ? AND question = ? AND identity = ?"
        try:
            database = self._open(is_to_write=False)
            row = database and database.execute(query, (_key(path), self._question, identity)).fetchone()
            return _unpacked(row[0]) if row else None
        except (sqlite3.Error, OSError, ValueError, zlib.error) as error:
            self._give_up(error)
            return None

    def harm(self, places: Iterable[Path], chip: str) -> Harm | None:
        """What was found in code for a chip in files, or below folders; None where nothing is remembered of them.

        Files that have changed since, or are gone, do not count.
        """
        query = "SELECT path, identity, harm FROM file WHERE question = ? AND path >= ? AND path < ?"
        examined = harmful = 0
        is_known = False
        try:
            database = self._open(is_to_write=False)
            if database is None:
                return None
            for place in map(real_path, places):
                # Everything below a folder sorts between its name with a slash and with what follows a slash.
                name = _key(place)
                is_folder = os.path.isdir(place)  # noqa: PTH112  (Path's may raise)
                start, end = (f"{name}/", f"{name}0") if is_folder else (name, f"{name}\0")
                for path, identity, text in database.execute(query, (self._question, start, end)):
                    if identity == identity_of(Path(path)):
                        is_known, sums = True, json.loads(text)
                        for count, bad in (sums.get(target, (0, 0)) for target in catalog.targets_of(chip)):
                            examined, harmful = examined + count, harmful + bad
        except (sqlite3.Error, OSError, ValueError, TypeError, AttributeError) as error:
            self._give_up(error)
        return Harm(examined, harmful) if is_known else None

    def write(self, contents: Iterable[tuple[Path, str, Content]]) -> None:
        """Remember files, all or none: path, identity and what they hold."""
        rows = []
        for path, identity, content in contents:
            packed = zlib.compress(json.dumps(content.to_json()).encode(), 1)
            sums = {
                target: (found.examined, found.cannot_encode + found.with_bug)
                for target, found in content.examined.items()
            }
            rows.append((_key(path), self._question, identity, json.dumps(sums), packed))
        if not rows:
            return
        try:
            database = self._open(is_to_write=True)
            if database is not None:
                with database:
                    database.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def close(self) -> None:
        """Let go of the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self, is_to_write: bool) -> sqlite3.Connection | None:
        if not self._is_usable or (self._database is not None and self._can_write >= is_to_write):
            return self._database
        self.close()
        if is_to_write:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._database = database = sqlite3.connect(self._path, timeout=_TIMEOUT_SECONDS)
            if database.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA_VERSION:
                database.execute("DROP TABLE IF EXISTS file")
                database.execute(_SCHEMA)
                database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif os.path.exists(self._path):  # noqa: PTH110  (Path's raises where the folder is closed)
            # Every program whose variables are planned may ask: nothing is written, nobody waited for.
            address = f"file:{quote(os.fsencode(self._path))}?mode=ro"
            database = sqlite3.connect(address, uri=True, timeout=_PATIENCE_SECONDS)
            if database.execute("PRAGMA user_version").fetchone()[0] == _SCHEMA_VERSION:
                self._database = database
            else:
                database.close()
        self._can_write = is_to_write
        return self._database

    def _give_up(self, error: Exception) -> None:
        if self._is_usable:
            is_spoilt = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            hint = f"\nhint: rm {self._path}" if is_spoilt else ""
            LOGGER.warning("scans are not remembered: %s: %s%s", self._path, error, hint)
        self._is_usable = False
        self.close()


@cache
def _rules() -> str:
    return hashlib.sha256(f"{catalog.hazards()!r} {__version__}".encode()).hexdigest()[:16]


def _unpacked(packed: bytes) -> Content:
    from rocm_patch.machine.scan.inventory import Content

    document = json.loads(zlib.decompressobj().decompress(packed, _LARGEST))
    if not isinstance(document, dict):
        raise ValueError("not what a scan has kept")
    return Content.from_json(document)

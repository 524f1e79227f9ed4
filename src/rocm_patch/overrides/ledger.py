"""The only owner of originals: what was changed, by which patch, and how to put it back.

The first original of an attribute survives however often it is replaced, and reverting restores that very
object.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rocm_patch.settings import LOGGER

# The patches that enable_all_patches() applies, in its order; each has its entry in a Status.
PATCHES = ("multiprocessing", "environment", "dataloader", "miopen_bypass")
_ABSENT = object()
_MOST_DETAILS = 100


@dataclass(frozen=True)
class Entry:
    """The state of one patch: true if applied.

    Attributes:
        applied: whether it is in force.
        why: what was done, or why it was not.
        details: what it changed, one line each.
    """

    applied: bool
    why: str
    details: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.applied


class Status(Mapping[str, Entry]):
    """One entry per patch; reads as a mapping and prints as a short table."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, patch: str) -> Entry:
        return self._entries[patch]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __str__(self) -> str:
        width = max(map(len, self._entries))
        return "\n".join(
            f"{patch:<{width}}  {'applied' if entry else 'not applied':<11}  {entry.why}"
            for patch, entry in self._entries.items()
        )

    __repr__ = __str__


@dataclass
class _Applied:
    """One patch in force: what it was asked for, its entry, and how to take it back, last change first."""

    arguments: Any
    entry: Entry
    undo: list[Callable[[], None]] = field(default_factory=list)


class Ledger:
    """Records changes by patch. Apply through `change` and `record`; take back through `revert`."""

    def __init__(self) -> None:
        self._applied: dict[str, _Applied] = {}
        self._refused: dict[str, Entry] = {}
        self.lock = threading.RLock()

    def applied(self, patch: str) -> Entry | None:
        """The entry of a patch in force, else None."""
        found = self._applied.get(patch)
        return None if found is None else found.entry

    def already(self, patch: str, arguments: Any) -> Entry | None:
        """The entry of a patch that is in force with these arguments.

        With other arguments it is taken back with a warning, for the caller to apply it anew.
        """
        found = self._applied.get(patch)
        if found is None:
            return None
        if found.arguments == arguments:
            return found.entry
        LOGGER.warning("the patch %s was on (%s); the new choices replace the old ones", patch, found.entry.why)
        self.revert(patch)
        return None

    def record(self, patch: str, arguments: Any, entry: Entry, *undo: Callable[[], None]) -> Entry:
        """Enter a patch that was applied, with the functions that take it back in reverse order."""
        self._refused.pop(patch, None)
        self._applied[patch] = _Applied(arguments, entry, list(undo))
        return entry

    def note(self, patch: str, line: str) -> None:
        """Add to the details of a patch in force what it has done since, each thing once."""
        with self.lock:
            found = self._applied.get(patch)
            if found is not None and line not in found.entry.details:
                details = (*found.entry.details, line)[-_MOST_DETAILS:]
                found.entry = dataclasses.replace(found.entry, details=details)

    def refuse(self, patch: str, why: str) -> Entry:
        """Enter a patch that was asked for and could not be applied."""
        entry = Entry(False, why)
        if patch not in self._applied:
            self._refused[patch] = entry
        return entry

    def revert(self, patch: str) -> bool:
        """Take a patch back; False if it was not in force."""
        found = self._applied.pop(patch, None)
        self._refused.pop(patch, None)
        if found is None:
            return False
        for undo in reversed(found.undo):
            undo()
        return True

    def in_force(self) -> list[str]:
        """The patches in force, in the order in which they were applied."""
        return list(self._applied)

    def status(self) -> Status:
        """One entry per patch of `PATCHES`, and one for each further patch that is in force."""
        entries = {patch: self._refused.get(patch, Entry(False, "not asked for")) for patch in PATCHES}
        entries.update({patch: applied.entry for patch, applied in self._applied.items()})
        return Status(entries)


def replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute and return the function that restores the object that was there."""
    original = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)

    def restore() -> None:
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)

    return restore


# One per process: originals must have one owner.
LEDGER = Ledger()

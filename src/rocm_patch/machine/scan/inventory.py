"""What files hold for each target, counted; of files that belong together, added up."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rocm_patch.machine.scan import compression, elf, files, hazards
from rocm_patch.machine.scan.hazards import Examination, Kernel

# What files that cannot be read say; of each library so many are kept.
_MOST_NOTES = 20
# Unpacked, of the parts of a file that are read together. A file that says it holds more is made to be a burden.
_MOST_BYTES = 1 << 34


@dataclass
class Amount:
    """What there is for one target.

    Attributes:
        objects: pieces of code: ELF files, or code that is compiled when it is loaded.
        kernels: kernels in them.
        bytes: what they take, unpacked.
        records: lines and rows about the target that are no code, such as timings.
    """

    objects: int = 0
    kernels: int = 0
    bytes: int = 0
    records: int = 0


@dataclass
class Content:
    """What one file holds, or several together.

    Attributes:
        targets: by gfx target.
        examined: by gfx target, what the examination of its code for a card has found.
        notes: what could not be read, and why.
    """

    targets: dict[str, Amount] = field(default_factory=dict)
    examined: dict[str, Examination] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Content) -> None:
        """Count in what another one holds."""
        for target, amount in other.targets.items():
            ours = self.targets.setdefault(target, Amount())
            ours.objects += amount.objects
            ours.kernels += amount.kernels
            ours.bytes += amount.bytes
            ours.records += amount.records
        for target, found in other.examined.items():
            self.examined.setdefault(target, Examination()).add(found)
        self.notes += [note for note in other.notes if note not in self.notes][: _MOST_NOTES - len(self.notes)]

    def harm(self, targets: Iterable[str] | None = None) -> Examination:
        """What the examination has found, of some targets or of all."""
        found = Examination()
        for target in self.examined if targets is None else targets:
            found.add(self.examined.get(target, Examination()))
        return found

    def to_json(self) -> dict[str, Any]:
        """A document from which `from_json` makes the same."""
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> Content:
        """What `to_json` wrote.

        Raises:
            ValueError: the document is not of that form.
        """
        try:
            examined = {}
            for target, fields in document["examined"].items():
                kernels = [Kernel(str(row["name"]), dict(row["hazards"])) for row in fields["kernels"]]
                examined[target] = Examination(**{**fields, "kernels": kernels})
            targets = {target: Amount(**fields) for target, fields in document["targets"].items()}
            return Content(targets, examined, [str(note) for note in document["notes"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not what a scan has kept: {error}") from error


def read(path: Path, parts: Sequence[files.Part], card: str, examine: Sequence[str]) -> Content:
    """What some parts of a file hold; what cannot be read becomes a note.

    Args:
        path: the file.
        parts: from `files.parts`.
        card: the chip for which code is examined; empty for none.
        examine: the targets whose code is examined.
    """
    found = Content()
    left = _MOST_BYTES
    for part in parts:
        try:
            for piece in files.pieces(path, part):
                left -= piece.bytes
                if left < 0:
                    raise ValueError(f"it holds more than {_MOST_BYTES >> 20} MiB")
                _count(found, piece, card, examine)
        except compression.CannotReadError as error:
            found.add(Content(notes=[str(error)]))
        except (OSError, ValueError, MemoryError, struct.error) as error:  # struct.error: cut off
            found.add(Content(notes=[str(error) or type(error).__name__]))
    return found


def _count(found: Content, piece: files.Piece, card: str, examine: Sequence[str]) -> None:
    amount = found.targets.setdefault(piece.target, Amount())
    amount.records += piece.records
    if piece.records:
        return
    amount.objects += 1
    amount.bytes += piece.bytes
    read = elf.read_code_object(piece.code)
    if read is None:
        return
    if elf.is_cut_off(piece.code):
        found.add(Content(notes=[f"a code object for {piece.target} is cut off"]))
    amount.kernels += read.kernels
    if piece.target in examine:
        found.examined.setdefault(piece.target, Examination()).add(hazards.examine(piece.code, read, card))

"""What a user's log betrays: the known failures of the catalog found in it, and reading logs whatever they hold."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import sys
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.errors import UsageError
from rocm_patch.machine import catalog
from rocm_patch.machine.catalog import KnownIssue
from rocm_patch.machine.fit import OVERRIDE, override_target
from rocm_patch.settings import LOGGER

LONGEST_LINE = 200
# A log may be one line of 50 MB, so nothing below repeats without a limit: searches stay linear.
# The look-behinds stand after `gfx` to let the search skip to it; `_gfx1030` is part of a file's name, and
# `device-gfx1010` of a wheel's, which come in lists of every chip there is.
_TARGET = re.compile(r"gfx(?<!\wgfx)(?<!device-gfx)[0-9a-f]{3,4}\b")
_OVERRIDE = re.compile(OVERRIDE + r"(?:_\d{1,3})?[\s=:\"']{1,6}(\d{1,3}\.\d{1,3}\.\d{1,3})")
_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,999}(?:\x07|\x1b\\))")
_PROGRESS_BAR = re.compile(r"[^|]{0,200}\d%\|[^|]{0,400}\|[^\]]{0,400}\]?")  # tqdm's


@dataclass(frozen=True)
class Match:
    """A known failure that a log shows.

    Attributes:
        issue: the failure.
        line_number: of the first line that betrays it, from 1.
        line: that line, stripped; the part around the symptom where it is longer than 200 characters.
    """

    issue: KnownIssue
    line_number: int
    line: str


def match(text: str, gfx: Collection[str] = ()) -> list[Match]:
    """The known failures that a log shows, in the order of the catalog: those of particular chips come first in it.

    A failure of particular chips counts only if the log is about one of them.

    Args:
        text: the log.
        gfx: the chips of this machine, for logs that name none.
    """
    chips = _chips(text, gfx)
    concerned = [issue for issue in catalog.issues() if "*" in issue.archs or not chips.isdisjoint(issue.archs)]
    places: dict[str, int] = {}  # many failures share a symptom
    found = []
    for issue in concerned:
        for symptom in issue.symptoms:
            if symptom not in places:
                hit = re.search(symptom, text)
                places[symptom] = hit.start() if hit else -1
        hits = [places[symptom] for symptom in issue.symptoms if places[symptom] >= 0]
        if hits:
            found.append(Match(issue, *_line_at(text, min(hits))))
    return found


def read_log(path: Path | None) -> str:
    """The text of a log: plain or gzip, of any encoding, without colours and progress bars.

    Args:
        path: the file; None or `-` for standard input.

    Raises:
        UsageError: the file is missing, a folder, or may not be read.
    """
    if path is None or str(path) == "-":
        content = sys.stdin.buffer.read()
    else:
        content = _content(path)
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(content) or content
    # PowerShell redirects in UTF-16, with a mark in front.
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")
    return _without_progress(_TERMINAL_CODE.sub("", text))


def _chips(text: str, gfx: Collection[str]) -> set[str]:
    """The chips that a log is about: those it names, and this machine's where what it names proves nothing.

    Under an override a log names the chip that the card passes for. So a log that names such a chip alone may
    well be from a machine whose chip is another.
    """
    named = _named(text)
    pretended = {override_target(value) for value in _OVERRIDE.findall(text)}
    known = [catalog.arch(chip) for chip in gfx]
    pretended |= {override_target(chip.override) for chip in known if chip is not None and chip.override}
    return named if named - pretended else named | set(gfx)


def _named(text: str) -> set[str]:
    """The targets that a text names; a line with more than two is a list of what some build supports."""
    named: set[str] = set()
    line: set[str] = set()
    end = 0
    for hit in _TARGET.finditer(text):
        if text.find("\n", end, hit.start()) >= 0:
            named |= line if len(line) < 3 else set()
            line = set()
        line.add(hit.group())
        end = hit.end()
    return named | (line if len(line) < 3 else set())


def _line_at(text: str, place: int) -> tuple[int, str]:
    """Number and text of the line at a place."""
    begin = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    end = len(text) if end < 0 else end
    if end - begin > LONGEST_LINE:
        begin = max(begin, place - LONGEST_LINE // 4)
    line = text[begin : min(end, begin + 2 * LONGEST_LINE)].strip()
    return text.count("\n", 0, place) + 1, line[:LONGEST_LINE].rstrip()


def _content(path: Path) -> bytes:
    hint = "rocm-patch doctor FILE; or hand it over: sudo dmesg | rocm-patch doctor -"
    try:
        return path.read_bytes()
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder, and a log is a file", f"name a file in it: ls {path}") from error
    except PermissionError as error:
        hint = f"sudo cat {path} | rocm-patch doctor -"
        raise UsageError(f"the log {path} may not be read: {error.strerror}", hint) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the log {path} cannot be read: {reason}", hint) from error


def _unpacked(packed: bytes) -> bytes:
    """What can be read of gzip data. Logs of machines that hung are often cut off."""
    plain = io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            while part := stream.read1(1 << 20):
                plain.write(part)
    except (OSError, EOFError, zlib.error) as error:
        LOGGER.warning("the gzip data breaks off (%s); what comes before it is read", error)
    return plain.getvalue()


def _without_progress(text: str) -> str:
    """A text in which each line shows what was last written to it, and messages between progress bars."""
    if "\r" not in text:
        return text
    return "\n".join(_last_state(line) if "\r" in line else line for line in text.split("\n"))


def _last_state(line: str) -> str:
    *overwritten, last = line.rstrip("\r").split("\r")
    return " ".join([part for part in overwritten if part.strip() and not _PROGRESS_BAR.fullmatch(part)] + [last])

"""Small files of the kernel, read so that one that is missing, unreadable or garbage is merely empty."""

from __future__ import annotations

import os
import re
from pathlib import Path


def numbers(path: Path) -> dict[str, int]:
    """The `name value` lines of a sysfs file; values can exceed 2^63."""
    found = {}
    for line in text(path).splitlines():
        name, _, value = line.strip().partition(" ")
        if is_number(value.strip()):
            found[name] = int(value)
    return found


def text(path: Path) -> str:
    """The file's text, empty if it cannot be read: a GPU that is hidden from a container gives EPERM."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except (OSError, ValueError):
        return ""


def link_name(path: Path) -> str:
    """The last part of what a symbolic link points to, which need not exist; empty for anything else."""
    try:
        return Path(os.readlink(path)).name  # noqa: PTH115
    except OSError:
        return ""


def listed(folder: Path) -> list[str]:
    """The names in a folder, empty if it cannot be read."""
    try:
        return os.listdir(folder)  # noqa: PTH208  (names, not paths)
    except OSError:
        return []


def exists(path: Path) -> bool:
    """Whether it is there, False where that cannot be told."""
    try:
        return path.exists()
    except OSError:
        return False


def is_number(word: str) -> bool:
    """Whether a word is a decimal number of sane length: a unique id has 20 digits, int() refuses thousands."""
    return word.isascii() and word.isdecimal() and len(word) < 40


def hexadecimal(word: str) -> int:
    """The value of `0x1002` or `1002`, 0 for anything else."""
    return int(word, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", word) else 0

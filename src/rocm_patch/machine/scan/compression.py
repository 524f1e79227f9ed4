"""Decompression up to a number of bytes: a file that claims to hold terabytes costs no more than was asked for."""

from __future__ import annotations

import importlib
import zlib
from typing import Any

_STEP = 1 << 20


class CannotReadError(ValueError):
    """Compressed in a way that this Python cannot read, with what would make it read it."""


def inflate(packed: bytes, most: int) -> bytes:
    """At most so many bytes of a zlib stream; what there is of a truncated one.

    Raises:
        ValueError: it is spoilt.
    """
    try:
        return zlib.decompressobj().decompress(packed, most)
    except zlib.error as error:
        raise ValueError(f"spoilt zlib stream: {error}") from error


def zstd(packed: bytes, most: int) -> bytes:
    """At most so many bytes of a zstd frame; what there is of a truncated one.

    Raises:
        CannotReadError: this Python knows no zstd (3.14 does, `backports.zstd` brings it to others).
        ValueError: it is spoilt.
    """
    module = zstd_module()
    if module is None:
        raise CannotReadError(
            "compressed with zstd, which this Python cannot read; hint: python -m pip install backports.zstd"
        )
    return _stepwise(module.ZstdDecompressor(), packed, most, module.ZstdError)


def xz(packed: bytes, most: int) -> bytes:
    """At most so many bytes of an xz stream.

    Raises:
        ValueError: it is spoilt.
    """
    lzma = _module("lzma")
    return _stepwise(lzma.LZMADecompressor(memlimit=1 << 28), packed, most, lzma.LZMAError)


def bzip2(packed: bytes, most: int) -> bytes:
    """At most so many bytes of a bzip2 stream.

    Raises:
        ValueError: it is spoilt.
    """
    return _stepwise(_module("bz2").BZ2Decompressor(), packed, most, OSError)


def _module(name: str) -> Any:
    """A module that a Python can have been built without; every patched process comes through this file."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotReadError(f"this Python was built without {name}") from error


def _stepwise(decompressor: Any, packed: bytes, most: int, spoilt: type[Exception]) -> bytes:
    pieces: list[bytes] = []
    left, given = most, packed
    try:
        while left > 0 and not decompressor.eof and (given or not decompressor.needs_input):
            piece = decompressor.decompress(given, min(left, _STEP))
            pieces.append(piece)
            left, given = left - len(piece), b""
            if not piece and decompressor.needs_input:
                break
    except (spoilt, EOFError) as error:
        raise ValueError(f"spoilt {spoilt.__module__} stream: {error}") from error
    return b"".join(pieces)


def zstd_module() -> Any:
    """Python's own module from 3.14 on, or the same for older ones; None where neither is there."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None

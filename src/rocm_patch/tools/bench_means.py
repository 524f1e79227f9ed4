"""What the rows of `rocm-patch bench` come to: means over layers, and the difference from an older measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import UsageError

SLOWER = 1.1  # times the older measurement, above which it is called slower
_KEY = ("layer", "image", "weight", "stride", "padding", "dilation", "groups", "channels_last", "dtype", "mode")
_HINT = "make the file with rocm-patch bench --json > old.json"

_Row = Mapping[str, Any]
_Rows = Mapping[str, _Row]


def summary(rows: Sequence[_Row]) -> dict[str, Any]:
    """Per type and mode: geometric means over the layers where both have a time, and where ours is not the best.

    Each mean is `{"mean": ratio, "layers": how many}`, or None where no layer has both. `on_device` has the same of
    the device's own time.

    Args:
        rows: as in the JSON document.
    """
    found: dict[str, Any] = {}
    for dtype, mode in dict.fromkeys((row["dtype"], row["mode"]) for row in rows):
        by_name: dict[str, dict[str, _Row]] = {}
        for row in rows:
            if (row["dtype"], row["mode"]) == (dtype, mode):
                by_name.setdefault(row["contender"], {})[row["layer"]] = row
        ours, vendor, off, unfold = (
            by_name.get(name, {}) for name in ("ours", "vendor", "vendor_off", "unfold_matmul")
        )

        def of(
            what: str, ours: _Rows = ours, vendor: _Rows = vendor, off: _Rows = off, unfold: _Rows = unfold
        ) -> _Row:
            return {
                "ours_over_vendor": _mean(ours, vendor, what),
                "vendor_off_over_ours": _mean(off, ours, what),
                "unfold_matmul_over_ours": _mean(unfold, ours, what),
                "slower_than_vendor_off": [name for name, ratio in _ratios(ours, off, what).items() if ratio > 1],
            }

        found.setdefault(dtype, {})[mode] = {
            **of("ms"),
            "on_device": of("device_ms"),
            "memory_ours_over_vendor": _mean(ours, vendor, "mib"),
            "ours_without_a_time": [name for name, row in ours.items() if row["ms"] is None],
        }
    return found


def _ratios(above: _Rows, below: _Rows, what: str) -> dict[str, float]:
    pairs = {name: (row.get(what), below[name].get(what)) for name, row in above.items() if name in below}
    return {name: a / b for name, (a, b) in pairs.items() if a and b}


def _mean(above: _Rows, below: _Rows, what: str) -> dict[str, Any] | None:
    logs = [math.log(ratio) for ratio in _ratios(above, below, what).values()]
    return {"mean": math.exp(sum(logs) / len(logs)), "layers": len(logs)} if logs else None


def read(path: Path) -> dict[str, Any]:
    """A document that an earlier bench wrote.

    Raises:
        UsageError: it cannot be read, or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}", _HINT) from error
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}", _HINT) from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or content.get("schema_version") != 1:
        raise UsageError(f"{str(path)!r} is no measurement of schema_version 1", _HINT)
    if not all(isinstance(row, dict) and {*_KEY, "contender", "ms"} <= row.keys() for row in rows):
        raise UsageError(f"{str(path)!r} has rows without {', '.join(_KEY)}, contender or ms", _HINT)
    return dict(content)


@dataclass(frozen=True)
class Change:
    """A row that two measurements both have.

    Attributes:
        label: layer, type, mode and contender.
        ratio: new time over old, or None if one has none.
        why: why the new one has no time.
        is_regression: ours, and more than 10 % slower, or without the time that it had.
    """

    label: str
    ratio: float | None
    why: str | None
    is_regression: bool


def compare(old: Sequence[_Row], new: Sequence[_Row]) -> list[Change]:
    """The rows that both have, in the new one's order; those without a time in either are left out."""
    before = {_key(row): row for row in old}
    changes = []
    for row in new:
        was = before.get(_key(row))
        if was is None or (was["ms"] is None and row["ms"] is None):
            continue
        ratio = row["ms"] / was["ms"] if row["ms"] and was["ms"] else None
        is_worse = row["ms"] is None if ratio is None else ratio > SLOWER
        label = f"{row['layer']} {row['dtype']} {row['mode']} {row['contender']}"
        changes.append(Change(label, ratio, row.get("why"), row["contender"] == "ours" and is_worse))
    return changes


def _key(row: _Row) -> str:
    return json.dumps([row[name] for name in (*_KEY, "contender")])

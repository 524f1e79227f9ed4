"""The picture of `rocm-patch bench --plot`: every layer's times, a panel for each type and mode."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rocm_patch.errors import RocmPatchError, UsageError

# Contenders that are drawn one by one, with their markers and colours (those of Okabe and Ito, which colour-blind
# people can tell apart); the single strategies are grey.
_MARKS = {
    "ours": ("o", "#0072B2"), "vendor": ("s", "#D55E00"), "vendor_off": ("v", "#E69F00"),
    "unfold_matmul": ("^", "#009E73"), "cpu_fallback": ("x", "#CC79A7"), "compile_triton": ("d", "#56B4E9"),
}  # fmt: skip


_TIMES = {"ms": "as called", "device_ms": "time of the device"}


def need_matplotlib() -> Any:
    """The part of matplotlib that is drawn with; asked for before anything is measured.

    Raises:
        RocmPatchError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RocmPatchError(f"--plot draws with matplotlib: {error}", "pip install matplotlib") from error


def write(document: Mapping[str, Any], path: Path) -> None:
    """Draw a document of `rocm-patch bench` into a file, whose ending says the format.

    Raises:
        RocmPatchError: matplotlib is not installed.
        UsageError: the file cannot be written, or its ending is no format.
    """
    figure_module = need_matplotlib()
    rows = document["rows"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    panels = list(dict.fromkeys((row["dtype"], row["mode"]) for row in rows))
    height = 1.2 + len(panels) * 3.2
    figure = figure_module.Figure(figsize=(max(7.0, 1.5 + 0.55 * len(layers)), height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (dtype, mode) in zip(axes, panels, strict=True):
        shown = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode) and row["ms"]]
        # A GPU's own time, where there is one: what the host takes beside it differs from machine to machine.
        time = "device_ms" if all(row.get("device_ms") for row in shown) else "ms"
        for name in dict.fromkeys(row["contender"] for row in shown):
            own = [row for row in shown if row["contender"] == name]
            marker, colour = _MARKS.get(name, (".", "#b0b0b0"))
            label = name if name in _MARKS else "_"  # matplotlib leaves such a label out of the legend
            axis.plot(
                [layers.index(row["layer"]) for row in own], [row[time] for row in own], linestyle="none",
                marker=marker, color=colour, label=label, zorder=3 if name == "ours" else 2,
            )  # fmt: skip
        best = {row["layer"]: row["ms"] * row["roofline"] for row in shown if row["roofline"]}
        axis.plot(
            [layers.index(layer) for layer in best], list(best.values()), linestyle="none", marker="_",
            color="black", label="best possible",
        )  # fmt: skip
        if shown:
            axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.set_title(f"{dtype}, {mode.replace('_', ' + ')}, {_TIMES[time]}; single strategies grey", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=7, ncols=4)
    names = [name if len(name) < 40 else name[:37] + "..." for name in layers]
    axes[-1].set_xticks(range(len(layers)), names, rotation=60, ha="right", fontsize=7)
    figure.suptitle(f"{document['device']}, torch {document['versions']['torch']}", fontsize=10)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {str(path)!r}: {error}", "--plot out.png") from error

"""`rocm-patch report`: one record of this machine, as JSON for an issue and as a page for its owner.

`collect` gathers and scrubs, `render` makes the page from `report.html.jinja`, `write` puts either into a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from rocm_patch._version import __version__
from rocm_patch.errors import UsageError
from rocm_patch.launch.run import program_build
from rocm_patch.machine import backend, catalog, environment, hardware
from rocm_patch.machine.build import find_libraries
from rocm_patch.machine.folders import cache_folder
from rocm_patch.settings import Settings
from rocm_patch.tools import doctor
from rocm_patch.tools.privacy import private_facts, scrubbed
from rocm_patch.trust.store import Store

SCHEMA_VERSION = 1
KIND = "rocm-patch report"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_BENCH_HINT = "make the file with rocm-patch bench --json > bench.json"


def collect(
    settings: Settings,
    environ: Mapping[str, str] | None = None,
    *,
    boxes: list[dict[str, Any]] | None = None,
    bench: Path | None = None,
) -> dict[str, Any]:
    """Everything that a report says, scrubbed of what tells who its owner is.

    Args:
        settings: the user's choices; `sysfs_root` says which machine is read.
        environ: the user's environment; of it only variables that the catalog or rocm-patch knows are kept.
        boxes: the results of `verify`, each `{"box", "state", "detail", "seconds"}`; None where it was not run.
        bench: a file that `rocm-patch bench --json` wrote.

    Raises:
        UsageError: the bench file cannot be read, or is not one.
    """
    environ = os.environ if environ is None else environ
    measured = None if bench is None else _read_bench(bench)
    machine = hardware.read_machine(settings.sysfs_root, environ.get("HOME"))
    python, build = program_build(environ)
    torch: dict[str, Any] = {"python": python, "version": None}
    if build is not None:
        torch |= {**_plain(build), "kind": build.kind, "targets": build.targets}
        torch["libraries"] = find_libraries(build, settings.sysfs_root)
    plan = environment.plan(machine, build, settings, environ)
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rocm_patch": __version__,
        "python": platform.python_version(),
        "machine": machine,
        "torch": torch,
        "activation": backend.decide(machine, build, settings, environ),
        "plan": {"variables": plan.changes, "notices": plan.notices},
        "environment": [_variable(name, value) for name, value in sorted(environ.items()) if _is_known(name)],
        "findings": doctor.document(doctor.examine(settings, environ))["findings"],
        "verify": boxes,
        "verdicts": _verdicts(environ),
        "bench": measured,
    }
    scrubbed_document: dict[str, Any] = scrubbed(_plain(document), private_facts(environ))
    return scrubbed_document


def _verdicts(environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The convolutions that have failed here, under whatever torch and driver."""
    return [
        {
            "verdict": row.verdict.kind,
            "strategy": row.strategy,
            "convolution": row.label,
            "machine": str(row.machine),
            "when": datetime.fromtimestamp(row.verdict.when, timezone.utc).isoformat(timespec="seconds"),
            "evidence": row.verdict.evidence,
        }
        for row in Store(cache_folder(environ)).rows()
        if row.verdict.is_bad
    ]


def write(path: Path, text: str) -> None:
    """Write a file whole: beside its place first, then renamed into it.

    Raises:
        UsageError: the folder is missing or read-only, or the path is a folder or a device.
    """
    asked = f"cannot write {str(path)!r}"
    try:
        target = path.resolve()
        if target.is_dir():
            file = shlex.quote(f"{target}/report.html")
            raise UsageError(f"{asked}: it is a folder", f"rocm-patch report -o {file}")
        if target.exists() and not target.is_file():
            raise UsageError(f"{asked}: it is a device or a pipe", "rocm-patch report --json, which prints")
        if not target.parent.is_dir():
            raise UsageError(f"{asked}: there is no such folder", f"mkdir -p {shlex.quote(str(target.parent))}")
        beside = target.parent / f".rocm-patch-report-{os.getpid()}"
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
        except OSError:
            if beside.exists():
                beside.unlink()
            raise
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{asked}: {why}", "rocm-patch report -o ~/report.html") from error


def _is_known(name: str) -> bool:
    return name == "ROCM_PATCH" or name.startswith("ROCM_PATCH_") or catalog.variable(name) is not None


def _variable(name: str, value: str) -> dict[str, str]:
    known = catalog.variable(name)
    return {"name": name, "value": value, "component": known.component if known else "rocm-patch"}


def _read_bench(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the bench file {str(path)!r}: {error.strerror}", _BENCH_HINT) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the bench file {str(path)!r} is not JSON: {error}", _BENCH_HINT) from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UsageError(f"the bench file {str(path)!r} has no list of rows", _BENCH_HINT)
    if (found := content.get("schema_version")) != 1:
        raise UsageError(f"the bench file {str(path)!r} has schema_version {found!r}, not 1", _BENCH_HINT)
    return content


def _plain(value: Any) -> Any:
    """A value as JSON has it: records as objects, sets sorted, and text that any encoding can carry."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(_plain(str(name))): _plain(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    # Names of files can hold bytes that are no text, output of programs can hold control characters.
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[^\t\n -~\u00a0-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)


def render(document: Mapping[str, Any]) -> str:
    """The page for a document of `collect`: HTML in one piece, which loads nothing."""
    page: str = _page().render(report=document)
    return page.lstrip()


@cache
def _page() -> Any:
    import jinja2

    pages = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.do"])
    pages.filters |= {"shown": _shown, "label": _label, "linked": _linked, "number": _number}
    pages.globals |= {"axis": _axis, "bench_chart": _bench_chart}
    pages.tests |= {"drawable": _is_drawable, "nested": lambda value: isinstance(value, (dict, list))}
    return pages.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _label(name: str) -> str:
    """A field's name in words: `pcie_atomics` is PCIe atomics."""
    words = re.sub(r"_(bytes|ms)$", "", name).split("_") if name not in _NAMES else [name]
    text = " ".join(_NAMES.get(word, word) for word in words)
    return text if words[0] in _NAMES else text[:1].upper() + text[1:]


_NAMES = {
    "pci": "PCI", "pcie": "PCIe", "vram": "Video memory", "kfd": "/dev/kfd", "dxg": "/dev/dxg (WSL)", "gpu": "GPU",
    "hip": "HIP", "cuda": "CUDA", "gfx": "Chip", "miopen": "MIOpen", "rocblas": "rocBLAS", "cudnn": "cuDNN",
    "rocm": "ROCm", "cpu": "CPU", "nvidia": "NVIDIA", "torch": "torch", "rocm_patch": "rocm-patch",
    "is_writable": "Writable",
}  # fmt: skip


def _shown(value: Any, name: str = "") -> str:
    """A single value in words, with the unit that the field's name tells."""
    if value is None or value == "":
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and name.endswith("_bytes"):
        return (
            "not stated"
            if value < 0
            else f"{value / 2**30:,.1f} GiB"
            if value >= 2**30
            else f"{value / 2**20:,.0f} MiB"
        )
    if isinstance(value, int) and name.endswith("device_id"):
        return f"0x{value:04x}"
    if isinstance(value, float):
        return _number(value)
    return str(value)


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _linked(text: str) -> str:
    """Text with its web addresses as links."""
    import markupsafe

    pieces = re.split(r"(https?://[^\s<>()\"';,]*[^\s<>()\"';,.:])", text)
    link = markupsafe.Markup('<a href="{0}" rel="noreferrer">{0}</a>')
    return markupsafe.Markup("").join(link.format(p) if n % 2 else p for n, p in enumerate(pieces))


@dataclass(frozen=True)
class _Axis:
    """A horizontal axis from `low` to `high`; places on it are parts of its length from 0 to 1.

    Attributes:
        base: the place where bars start; None on a logarithmic axis without a reference, where bars would lie.
        ticks: (place, text).
    """

    low: float
    high: float
    is_log: bool
    base: float | None = 0.0
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return value / self.high


def _axis(values: Sequence[float], reference: float | None = None, is_linear: bool = False) -> _Axis:
    """An axis for values of 0 or more; logarithmic where the largest is more than 20 times the smallest."""
    shown = [*values, *([] if reference is None else [reference])]
    smallest, largest = min(shown, default=0.0), max(shown, default=0.0) or 1.0
    decades = range(math.floor(math.log10(largest)) - 30, math.floor(math.log10(largest)) + 2)
    steps = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    if is_linear or smallest < steps[0] or largest <= 20 * smallest:
        step = next(step for step in steps if largest <= 5 * step)
        marks = [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]
        axis = _Axis(0.0, marks[-1], is_log=False)
    else:
        below = max(step for step in steps if step <= smallest)
        marks = [below, *(step for step in steps if below < step < largest), min(s for s in steps if s >= largest)]
        axis = _Axis(marks[0], marks[-1], is_log=True)
        axis = dataclasses.replace(axis, base=None if reference is None else axis.place(reference))
        if len(marks) > 7:
            marks = [mark for mark in marks if f"{mark:e}".startswith("1.")][:: 1 + len(marks) // 18]
    return dataclasses.replace(axis, ticks=tuple((axis.place(mark), f"{mark:,.6g}") for mark in marks))


def _is_drawable(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-9 < value < 1e12


def _bench_chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What to draw of a bench: for each row its label, a bar for each `_ms` field, and these times.

    The bars are multiples of the native time where every row has one, else milliseconds.
    """
    groups: list[tuple[str, list[tuple[str, float]], dict[str, float]]] = []
    for number, row in enumerate(rows, start=1):
        times = {n.removesuffix("_ms"): float(v) for n, v in row.items() if n.endswith("_ms") and _is_drawable(v)}
        words = [row.get("name") or row.get("layer") or f"row {number}"]
        words += [value for name, value in row.items() if isinstance(value, str) and name not in ("name", "layer")]
        if times:
            groups.append((" ".join(map(str, words)), list(times.items()), times))
    named = (name for name in ("native", "vendor") if all(name in times for _, _, times in groups))
    native = next(named, None)
    if native is None or all(len(times) == 1 for _, _, times in groups):
        return {"groups": groups, "native": None, "means": {}}
    logs: dict[str, list[float]] = {}
    for _, bars, times in groups:
        bars[:] = [(name, ms / times[native]) for name, ms in bars if name != native]
        for name, ratio in bars:
            logs.setdefault(name, []).append(math.log(ratio))
    means = {name: math.exp(sum(found) / len(found)) for name, found in logs.items()}
    return {"groups": groups, "native": native, "means": means}

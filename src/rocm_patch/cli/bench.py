"""`rocm-patch bench`.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rocm_patch.errors import UsageError
from rocm_patch.settings import BACKENDS, from_environ
from rocm_patch.tools.bench_peers import DTYPES, PEERS

_Names = list[str]
_Row = Mapping[str, Any]


def bench(
    dtype: Annotated[
        _Names, typer.Option(help=f"{', '.join(DTYPES)}; repeatable. float32, and float16 on a GPU, by default.")
    ] = [],  # noqa: B006  (typer's way to say none)
    layer: Annotated[
        _Names, typer.Option(metavar="PART", help="Only layers with this in their name; repeatable.")
    ] = [],  # noqa: B006
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="A model's layers: torchvision:NAME, timm:NAME, file.py:callable, or a file that torch.save wrote "
            "a whole module to. Reading such a file runs code that it names: only files that you trust.",
        ),
    ] = "",
    input_shape: Annotated[
        _Names, typer.Option(metavar="SHAPE", help="A model's input without its batch, 3x224x224; one per input.")
    ] = [],  # noqa: B006
    batch: Annotated[int, typer.Option(min=0, help="Samples; the layers' own by default, of a model 8.")] = 0,
    strategies: Annotated[
        _Names, typer.Option(metavar="NAMES", help="Only these strategies, commas between; none for none.")
    ] = [],  # noqa: B006
    peers: Annotated[
        _Names,
        typer.Option(metavar="NAMES", help=f"Only these of {', '.join(PEERS)}, commas between; none for none."),
    ] = [],  # noqa: B006
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Operands in that memory format.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny layers, one repetition: shows that it works, not how fast.")
    ] = False,
    backend: Annotated[str, typer.Option(help=f"Whose convolutions: {', '.join(BACKENDS)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    out: Annotated[str, typer.Option(metavar="FILE", help="Write the JSON document there too.")] = "",
    plot: Annotated[str, typer.Option(metavar="FILE", help="Draw the times, out.png; needs matplotlib.")] = "",
    compare: Annotated[
        str, typer.Option(metavar="OLD.json", help="Against an earlier document; exit 1 if ours became slower.")
    ] = "",
) -> None:
    """Measure convolutions: ours, each strategy and what people use instead; time, memory, error, roofline.

    Exits 1 if ours is wrong or fails anywhere, or --compare finds it more than 10 % slower.
    """
    from rocm_patch.tools import bench as tool
    from rocm_patch.tools import bench_layers, bench_means, bench_peers, bench_plot, probe

    for name in dtype:
        if name not in DTYPES:
            raise UsageError(f"unknown type {name!r}; it can be {', '.join(DTYPES)}", "--dtype float16")
    if quick and model:
        raise UsageError("--quick is for the built-in layers", "leave out --quick, or give --batch 1")
    if input_shape and not model:
        raise UsageError("--input-shape is for a model", "give --model too, or leave it out")
    old = bench_means.read(Path(compare)) if compare else None
    if plot:
        bench_plot.need_matplotlib()
    device = probe.device_of(from_environ().replaced(backend=backend or None))
    contenders = bench_peers.contenders(device, _listed(strategies), _listed(peers))
    if model:
        made, shapes = bench_layers.load_model(model, [_shape(text) for text in input_shape])
        layers = bench_layers.model_layers(made, [(batch or 8, *shape) for shape in shapes], channels_last)
        layers = bench_layers.chosen_layers(layers, layer)
    else:
        layers = bench_layers.standard_layers(layer, batch, quick)
    types = list(dict.fromkeys(dtype)) or (["float32"] if device == "cpu" else ["float32", "float16"])
    measured = tool.Bench(device, layers, types, contenders, channels_last, quick)

    rows: list[Any] = []
    with _bar(len(measured)) as show:
        try:
            for row in measured.rows():
                rows.append(row)
                show(f"{row.layer} {row.dtype} {row.contender}")
        except KeyboardInterrupt:
            measured.stopped = "interrupted"
    document = measured.document(rows)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if out:
        _write(Path(out), text)
    if plot:
        bench_plot.write(document, Path(plot))
    if as_json:
        sys.stdout.write(text)
    else:
        _print_tables(document)
    changes = [] if old is None else bench_means.compare(old["rows"], document["rows"])
    if old is not None:
        _print_changes(old, document, changes, as_json)
    if measured.stopped is not None:
        print(f"rocm-patch: stopped: {measured.stopped}", file=sys.stderr)
        raise typer.Exit(130 if measured.stopped == "interrupted" else 1)
    is_wrong = any(row.contender == "ours" and row.ms is None for row in rows)
    if is_wrong or any(change.is_regression for change in changes):
        raise typer.Exit(1)


def _listed(words: Sequence[str]) -> list[str] | None:
    """None where nothing was said, an empty list for `none`."""
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    return None if not names else [name for name in names if name != "none"]


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"{text!r} is not the shape of an input", "--input-shape 3x224x224, without the batch")
    return tuple(map(int, sizes))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}", "--out bench.json") from error


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=total)
        yield lambda words: progress.update(task, advance=1, description=words)


def _print_tables(document: Mapping[str, Any]) -> None:
    """A table per mode, a line per layer and type; then the summary, and what is wrong."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False)
    by_line: dict[tuple[str, str, str], dict[str, _Row]] = {}
    for row in document["rows"]:
        by_line.setdefault((row["mode"], row["layer"], row["dtype"]), {})[row["contender"]] = row
    for mode in dict.fromkeys(row["mode"] for row in document["rows"]):
        table = Table(title=f"{_words(mode)}, ms ({document['device']})", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("type")
        for name in ("vendor", "vendor off", "unfold", "ours"):
            table.add_column(name, justify="right")
        table.add_column("best strategy")
        for name in ("ours/vendor", "error", "roofline"):
            table.add_column(name, justify="right")
        for (of_mode, layer, dtype), found in by_line.items():
            if of_mode == mode:
                ours, vendor = found.get("ours", {}), found.get("vendor", {})
                both = ours.get("ms") and vendor.get("ms")
                table.add_row(
                    layer + (f" ({ours['count']} times)" if ours.get("count", 1) > 1 else ""), dtype,
                    *(_ms(found.get(name, {})) for name in ("vendor", "vendor_off", "unfold_matmul", "ours")),
                    _best(found), f"{ours['ms'] / vendor['ms']:.2f}" if both else "",
                    "" if ours.get("error") is None else f"{ours['error']:.1e}",
                    "" if ours.get("roofline") is None else f"{ours['roofline']:.0%}",
                )  # fmt: skip
        console.print(table)
    for line in _sentences(document):
        print(line)


def _ms(row: _Row) -> str:
    """A time, or in one word why there is none."""
    if row.get("ms") is not None:
        return f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
    return (row.get("why") or "").partition(":")[0]


def _best(found: Mapping[str, _Row]) -> str:
    timed = [row for row in found.values() if row["kind"] == "strategy" and row["ms"] is not None]
    return min(timed, key=lambda row: row["ms"])["contender"] if timed else ""


def _words(mode: str) -> str:
    return mode.replace("_", " + ")


def _sentences(document: Mapping[str, Any]) -> Iterator[str]:
    """The summary in words."""
    says = {
        "ours_over_vendor": "ours takes {:.2f} times the vendor's time",
        "vendor_off_over_ours": "with the vendor's library off it takes {:.2f} times ours",
        "unfold_matmul_over_ours": "unfold and matmul take {:.2f} times ours",
        "memory_ours_over_vendor": "ours takes {:.2f} times the vendor's memory",
    }
    for dtype, modes in document["summary"].items():
        for mode, found in modes.items():
            for where, part in (("", found), (", the device's own time", found["on_device"])):
                means = [
                    text.format(part[name]["mean"]) + f" ({part[name]['layers']} layers)"
                    for name, text in says.items()
                    if part.get(name) is not None
                ]
                if means:
                    yield f"{dtype}, {_words(mode)}{where}, geometric means: {'; '.join(means)}."
                if part["slower_than_vendor_off"]:
                    yield f"  Slower than with the library off: {', '.join(part['slower_than_vendor_off'])}."
    rates = document["rates"]
    if rates:
        gemm = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in rates["gemm_tflops"].items() if rate)
        host = rates["host_us"]
        yield f"Measured here: products {gemm or 'of no type'}; copies {rates['copy_gb_per_s']:.4g} GB/s."
        yield f"A tiny convolution takes the host {host['ours']:.1f} us ours, {host['native']:.1f} us native."
    failed: dict[str, list[str]] = {}
    for row in document["rows"]:
        if row["why"] and (row["contender"] == "ours" or row["why"].startswith("wrong")):
            yield f"{row['contender']} on {row['layer']}, {row['dtype']}, {_words(row['mode'])}: {row['why']}"
        elif row["why"] and row["why"].startswith(("failed", "not run")):
            failed.setdefault(f"{row['contender']} {row['why']}", []).append(row["layer"])
    for words, layers in failed.items():
        yield f"{words} ({', '.join(dict.fromkeys(layers))})"


def _print_changes(old: _Row, new: _Row, changes: Sequence[Any], to_stderr: bool) -> None:
    """New over old for each row that both have; regressions last, so that they are seen."""
    stream = sys.stderr if to_stderr else sys.stdout
    if old.get("device") != new["device"]:
        print(f"another device: {old.get('device')} before, {new['device']} now", file=stream)
    if not changes:
        print("the two measurements have no row in common", file=stream)
    for change in sorted(changes, key=lambda change: bool(change.is_regression)):
        ratio = f"{change.ratio:8.2f}" if change.ratio is not None else f"{'no time':>8}"
        words = " SLOWER OR WRONG" if change.is_regression else ""
        print(f"{ratio}  {change.label}{words}" + (f" ({change.why})" if change.why else ""), file=stream)

"""`rocm-patch probe` and `rocm-patch demo`.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from rocm_patch.errors import UsageError
from rocm_patch.settings import BACKENDS, from_environ

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def probe(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="[MODEL|SCRIPT]", help="module:callable that makes a model, or a script.")
    ] = "",
    suite: Annotated[bool, typer.Option("--suite", help="The built-in shapes, for a first look at a card.")] = False,
    input: Annotated[
        list[str], typer.Option(metavar="SHAPE", help="A model's input, 8x3x224x224; one option per input.")
    ] = [],  # noqa: B006  (typer's way to say none)
    dtype: Annotated[
        list[str], typer.Option(help=f"Type of a model's parameters: {', '.join(_DTYPES)}; repeatable.")
    ] = ["float32"],  # noqa: B006
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="A model's inputs are channels_last.")
    ] = False,
    seconds: Annotated[float, typer.Option(metavar="SECONDS", help="How long a script is listened to.")] = 120.0,
    backend: Annotated[str, typer.Option(help=f"Whose convolutions: {', '.join(BACKENDS)}.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Try what is known already too.")] = False,
    as_json: _Json = False,
) -> None:
    """Prove convolutions ahead of time, each in a process of its own, and remember which fail.

    Arguments of a script follow it: rocm-patch probe train.py -- --epochs 1.
    """
    from pathlib import Path

    from rocm_patch.machine.folders import cache_folder
    from rocm_patch.tools import probe as tool
    from rocm_patch.trust.store import Store

    if bool(target) == suite:
        raise UsageError("nothing to probe, or two things at once", "rocm-patch probe MODEL, SCRIPT or --suite")
    for name in dtype:
        if name not in _DTYPES:
            raise UsageError(f"unknown type {name!r}; it can be {', '.join(_DTYPES)}", "--dtype float16")
    settings = from_environ().replaced(backend=backend or None)
    device = tool.device_of(settings)
    if suite:
        plan = tool.of_suite(device, dtype)
    elif target.endswith(".py") or Path(target).exists():
        plan = tool.of_script(device, [target, *context.args], settings, os.environ, seconds)
    else:
        if not input:
            raise UsageError(
                f"the inputs of {target} are not known", f"rocm-patch probe {target} --input 8x3x224x224"
            )
        plan = tool.of_model(device, target, input, dtype, channels_last)
    store = Store(cache_folder(os.environ))
    with _bar(len(plan), as_json) as show:
        rows = tool.run(plan, settings, store, again, show)
    if as_json:
        print(json.dumps(tool.document(rows, device), indent=2))
    else:
        _print_table(rows)
    if any(row.is_bad for row in rows):
        raise typer.Exit(1)


class _bar:
    """A progress bar on a terminal, a line per bad row elsewhere; both on stderr."""

    def __init__(self, total: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("proving"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)
        self._plain, self._total, self._done = not console.is_terminal, total, 0

    def __enter__(self) -> Callable[[Any], None]:
        self._progress.start()
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _show(self, row: Any) -> None:
        self._done += 1
        self._progress.update(self._task, advance=1, description=row.label)
        if self._plain and (row.is_bad or self._done % 50 == 0 or self._done == self._total):
            word = f"{row.kind} {row.strategy} {row.label}" if row.is_bad else "proven"
            print(f"rocm-patch: {self._done} of {self._total}: {word}", file=sys.stderr, flush=True)


def _print_table(rows: Sequence[Any]) -> None:
    """Per direction and strategy how many of each verdict, then what is not ok, one by one."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        found = counts.setdefault((row.direction, row.strategy), {})
        found[row.kind] = found.get(row.kind, 0) + 1
    print(f"{'direction':<12} {'strategy':<10} verdicts")
    for (direction, strategy), found in counts.items():
        print(f"{direction:<12} {strategy:<10} {', '.join(f'{n} {kind}' for kind, n in sorted(found.items()))}")
    for row in rows:
        if row.kind != "ok":
            first_line = row.evidence.splitlines()[0] if row.evidence else ""
            print(
                f"{row.kind:<8} {row.strategy:<10} {row.label}" + (f"\n         {first_line}" if first_line else "")
            )
    known = sum(not row.is_new for row in rows)
    print(f"{len(rows)} proven, {known} of them before; {sum(row.is_bad for row in rows)} failed")


def demo(
    faults: Annotated[bool, typer.Option("--faults", help="Failures on purpose, survived and remembered.")] = False,
    only: Annotated[list[str], typer.Option(metavar="NAME", help="One of the failures; repeatable.")] = [],  # noqa: B006
    direction: Annotated[list[str], typer.Option(help="One of the directions; repeatable.")] = [],  # noqa: B006
    backend: Annotated[str, typer.Option(help=f"Whose convolutions: {', '.join(BACKENDS[1:])}.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="How many at once.")] = 1,
    as_json: _Json = False,
) -> None:
    """Train a small network with failures put into its native convolutions, and see it end right."""
    from rocm_patch.tools import demo as tool

    if not faults:
        raise UsageError("there is one demonstration, with failures on purpose", "rocm-patch demo --faults")
    for name, legal in ((only, tool.FAULTS), (direction, tool.DIRECTIONS)):
        for word in name:
            if word not in legal:
                raise UsageError(f"unknown name {word!r}; it can be {', '.join(legal)}", "rocm-patch demo --faults")
    if backend not in BACKENDS[1:]:
        raise UsageError(f"unknown backend {backend!r}", f"give one of {', '.join(BACKENDS[1:])}")

    def show(outcome: Any) -> None:
        word = "right" if outcome.is_right else "WRONG"
        print(
            f"{word}  {outcome.fault:<19} {outcome.direction:<11} first run {outcome.first}, remembered: "
            f"{', '.join(outcome.verdicts) or 'nothing'}; second run met it {outcome.second_faults} times "
            f"({outcome.seconds:.0f} s)",
            file=sys.stderr if as_json else sys.stdout,
            flush=True,
        )

    outcomes = tool.run(backend, only or tuple(tool.FAULTS), direction or tool.DIRECTIONS, jobs, show)
    if as_json:
        print(json.dumps(tool.document(outcomes, backend), indent=2))
    if not all(outcome.is_right for outcome in outcomes):
        raise typer.Exit(1)

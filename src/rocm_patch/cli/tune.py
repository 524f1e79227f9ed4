"""`rocm-patch tune`.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from rocm_patch.errors import UsageError
from rocm_patch.launch.run import Target
from rocm_patch.settings import BACKENDS, from_environ, show_log
from rocm_patch.tools.bench_peers import DTYPES

_HINT = "rocm-patch tune MODEL --input 3x224x224, or rocm-patch tune SCRIPT.py [ARGS]"
# What makes a launched program time its convolutions; `tuning.py`, which reads it, needs torch.
TUNE_VARIABLE = "ROCM_PATCH_TUNE"
# The options that take a value; a test holds this list to the command's own.
VALUE_OPTIONS = ("--input", "--batch", "--dtype", "--backend")


def split(arguments: Sequence[str]) -> tuple[list[str], Target | None]:
    """The arguments of `tune` as ours and, from a .py file on, the script's; no target for a model."""
    words = iter(enumerate(arguments))
    for index, word in words:
        if word in VALUE_OPTIONS:
            next(words, None)
        elif not word.startswith("-"):
            if word.endswith(".py"):
                return list(arguments[:index]), Target("script", tuple(arguments[index:]))
            break
    return list(arguments), None


def tune(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SCRIPT.py [ARGS]...",
            help="torchvision:NAME, timm:NAME, file.py:callable, or a file that torch.save wrote a whole module to "
            "(reading such a file runs code that it names: only files that you trust). Or a script: it runs as under "
            "rocm-patch run, and what it computes is timed on the way.",
        ),
    ] = "",
    input: Annotated[
        list[str], typer.Option(metavar="SHAPE", help="A model's input without its batch, 3x224x224; one per input.")
    ] = [],  # noqa: B006  (typer's way to say none)
    batch: Annotated[int, typer.Option(min=1, help="Samples of a model's inputs.")] = 8,
    dtype: Annotated[
        list[str], typer.Option(help=f"Type of a model's parameters: {', '.join(DTYPES)}; repeatable.")
    ] = ["float32"],  # noqa: B006
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="A model's inputs and weights are in that memory format.")
    ] = False,
    backend: Annotated[str, typer.Option(help=f"Whose convolutions: {', '.join(BACKENDS)}.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Time what is known already once more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Time the strategies of a model's or a script's convolutions; programs take the fastest from then on.

    Of a model exits 1 if a convolution could not be timed; of a script with the script's own code.
    """
    if context.obj is not None:
        _run_script(context, backend)
    if not target:
        raise UsageError("nothing to tune", _HINT)
    for name in dtype:
        if name not in DTYPES:
            raise UsageError(f"unknown type {name!r}; it can be {', '.join(DTYPES)}", "--dtype float16")
    shapes = [_shape(text) for text in input]
    settings = from_environ().replaced(backend=backend or None)
    if settings.log:
        show_log(settings.log)

    from rocm_patch import api
    from rocm_patch.tools import probe
    from rocm_patch.tools import tune as tool

    # Before torch is imported: timings hold for the environment that programs will run in.
    api.setup_environment(settings.profile)
    device = probe.device_of(settings)
    with redirect_stdout(sys.stderr):  # what the model's own code prints
        specs = tool.of_model(device, target, shapes, batch, list(dict.fromkeys(dtype)), channels_last)
    rows: list[Any] = []
    is_interrupted = False
    with _bar(len(specs)) as show:
        try:
            for row in tool.rows(specs, settings, again):
                rows.append(row)
                show(row)
        except KeyboardInterrupt:
            is_interrupted = True
    if as_json:
        print(json.dumps(tool.document(rows, device), indent=2))
    else:
        _print_table(rows, device)
    if len(rows) < len(specs):
        why = "interrupted" if is_interrupted else rows[-1].why
        print(f"rocm-patch: stopped: {why}; {len(specs) - len(rows)} were not timed", file=sys.stderr)
        raise typer.Exit(130 if is_interrupted else 1)
    if any(row.fastest is None for row in rows):
        raise typer.Exit(1)


def _run_script(context: typer.Context, backend: str) -> None:
    """Become the script, under the launcher; does not return."""
    from rocm_patch.launch import run as launcher
    from rocm_patch.machine import backend as backends
    from rocm_patch.machine import hardware

    script = context.obj.words[0]
    if not Path(script).is_file():
        raise UsageError(f"cannot run {script!r}: no such file", _HINT)
    sources = {name: context.get_parameter_source(name) for name in context.params if name != "backend"}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        option = f"--{given[0].removeprefix('as_').replace('_', '-')}"
        raise UsageError(
            f"{option} is for a model, and {script} is a script",
            "what follows the script is the script's own; FILE.py:CALLABLE names the maker of a model",
        )
    settings = from_environ().replaced(backend=backend or None)
    environ = {**os.environ, TUNE_VARIABLE: "1"}
    launch = launcher.prepare(context.obj, settings, environ)
    notices = list(launch.notices)
    build = launcher.program_build(environ)[1]
    chosen = backends.decide(hardware.read_machine(settings.sysfs_root), build, settings, launch.environ)
    if chosen.backend is None:
        hint = "rocm-patch tune --backend hip|cuda|cpu SCRIPT.py" if settings.enabled else "leave ROCM_PATCH=0 out"
        notices.append(f"nothing will be timed: {chosen.why}\nhint: {hint}")
    elif chosen.policy != "bypass":
        notices.append(
            f"nothing will be timed, convolutions go by the policy {chosen.policy}: {chosen.why}\n"
            "hint: ROCM_PATCH_CONV=bypass has all of them served by rocm-patch"
        )
    for notice in [*notices, launch.summary]:
        print(f"rocm-patch: {notice}", file=sys.stderr)
    launcher.execute(launch)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"{text!r} is not the shape of an input", "--input 3x224x224, without the batch")
    return tuple(map(int, sizes))


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on a terminal, a line now and then elsewhere; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("timing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=total)
        done = 0

        def show(row: Any) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=1, description=str(row.spec))
            if not console.is_terminal and (row.why or done % 50 == 0 or done == total):
                words = f"{row.spec}: {row.why}" if row.why else "timed"
                print(f"rocm-patch: {done} of {total}: {words}", file=sys.stderr, flush=True)

        yield show


def _print_table(rows: Sequence[Any], device: str) -> None:
    """A line per convolution, those that could not be timed, and what changed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False)
    table = Table(title=f"one call each ({device})", title_justify="left")
    table.add_column("convolution", overflow="fold")
    for name in ("without tuning", "fastest"):
        table.add_column(name)
    for name in ("ms", "gain"):
        table.add_column(name, justify="right")
    table.add_column("timed")
    for row in rows:
        table.add_row(
            str(row.spec), row.without_tuning, row.fastest or "none",
            "" if row.fastest is None else f"{1e3 * row.seconds[row.fastest]:.3g}",
            "" if row.gain is None else f"{row.gain:.2f}", "" if row.why else "now" if row.is_new else "before",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row.why:
            print(f"{row.spec} could not be timed: {row.why}")
    known = sum(not row.is_new for row in rows)
    changed = sum(row.fastest not in (None, row.without_tuning) for row in rows)
    failed = sum(row.fastest is None for row in rows)
    print(
        f"{len(rows)} convolutions: {changed} are served by another strategy than without tuning; "
        f"{known} were known already, {len(rows) - known - failed} were timed now, {failed} could not be"
    )

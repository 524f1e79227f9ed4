"""`rocm-patch scan`.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rocm_patch.settings import from_environ

if TYPE_CHECKING:  # at run time when it is needed: every start of rocm-patch comes through here
    from rocm_patch.machine.scan.hazards import Examination
    from rocm_patch.machine.scan.scanning import Library, Scan

# Names of kernels that are shown of each library, unless all are asked for.
_SHOWN = 3


def scan(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[PATH]...", help="Libraries, code objects, folders. Without: the installed torch, ROCm, caches."
        ),
    ] = [],  # noqa: B006  (typer's way to say none)
    card: Annotated[str, typer.Option(metavar="GFX", help="For this chip, gfx1010; this machine's by default.")] = "",
    override: Annotated[
        str,
        typer.Option(
            metavar="X.Y.Z", help="Under this HSA_OVERRIDE_GFX_VERSION, or none; by default the one in use."
        ),
    ] = "",
    kernels: Annotated[bool, typer.Option("--kernels", help="List every kernel with a hazard.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Read what has been read before too.")] = False,
    jobs: Annotated[
        int, typer.Option(min=0, max=4, help="Processes side by side; one per processor by default.")
    ] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if anything is missing or harmful.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Read, without a GPU, which GPU code libraries carry, and what of it this card cannot run safely."""
    from rocm_patch.tools import scan as tool

    with _progress() as show:
        found = tool.run(
            [Path(path) for path in paths], from_environ(), os.environ, card, override, again, jobs, show
        )
    if as_json:
        print(json.dumps(tool.document(found), indent=1))
    else:
        _print(found, kernels)
    is_bad = any(
        library.harm(found.question).is_harmful or library.answer(found.question.card)[0] == "none"
        for library in found.libraries
        if found.question.card and library.has_code
    )
    if strict and is_bad:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line for each tenth elsewhere; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    task = bar.add_task("", total=None)
    tenth = 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        bar.update(task, completed=done, total=total)
        if not console.is_terminal and total > 1 << 28 and 10 * done // total > tenth:
            tenth = 10 * done // total
            print(f"rocm-patch: read {done >> 20} of {total >> 20} MiB", file=sys.stderr, flush=True)

    with bar:
        yield show


def _print(found: "Scan", all_kernels: bool) -> None:
    question = found.question
    if question.override:
        print(
            f"{question.card} under HSA_OVERRIDE_GFX_VERSION={question.override}: loads code for {question.reported}"
        )
    elif question.card:
        print(f"{question.card}: loads code for itself")
    else:
        print("no AMD GPU here and none named: what there is, for which chips (--card gfx1010 for one)")
    for library in found.libraries:
        print(f"{library.name}: {_answer(library, question.card)}")
        print(f"    {library.folder}")
        for line in _targets(library):
            print(f"    {line}")
        harm = library.harm(question)
        if harm.examined:
            _print_hazards(harm, question.card, all_kernels)
        for note in library.content.notes:
            print(f"    not read: {note}")
    if not found.libraries:
        print("no GPU code found")


def _answer(library: "Library", card: str) -> str:
    if not library.content.targets:
        return "cannot be read"
    return library.answer(card)[1] if card else ", ".join(sorted(library.content.targets))


def _targets(library: "Library") -> Iterator[str]:
    for target, amount in sorted(library.content.targets.items(), key=_age):
        parts = [f"{amount.kernels:,} kernels" if amount.objects else "", f"{_size(amount.bytes)}"]
        parts += [f"{amount.records:,} records"] if amount.records else []
        yield f"{target:<16} {', '.join(part for part in parts if part)}"


def _age(row: "tuple[str, object]") -> tuple[int, str]:
    """Sorts targets by generation: gfx906, gfx90a, gfx1010."""
    return len(row[0].partition("-")[0]), row[0]


def _print_hazards(harm: "Examination", card: str, all_kernels: bool) -> None:
    from rocm_patch.machine import catalog

    called = f" and {harm.called:,} functions that they call" if harm.called else ""
    print(
        f"    {harm.examined - harm.called:,} kernels{called} on {card}: {harm.cannot_encode:,} with instructions "
        f"that it lacks, {harm.with_bug:,} with a hardware bug and no work-around, {harm.clean:,} clean"
    )
    for rule in catalog.hazards():
        if rule.id in harm.places:
            places, kernels = harm.places[rule.id], harm.kernels_by_rule[rule.id]
            print(f"      {rule.id} ({rule.effect}): {places:,} in {kernels:,} kernels; {rule.title}")
    worst = sorted(harm.kernels, key=lambda kernel: kernel.rank)
    for kernel in worst if all_kernels else worst[:_SHOWN]:
        counts = ", ".join(f"{count} {rule}" for rule, count in kernel.hazards.items())
        print(f"      {kernel.name}: {counts}")
    if len(worst) > _SHOWN and not all_kernels:
        print(f"      and {harm.cannot_encode + harm.with_bug - _SHOWN:,} more: --kernels lists them")


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"

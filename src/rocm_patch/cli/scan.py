"""`rocm-patch scan`.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rocm_patch.cli.check import printable
from rocm_patch.settings import from_environ

if TYPE_CHECKING:  # at run time when it is needed: every start of rocm-patch comes through here
    from rocm_patch.machine.scan.hazards import Examination
    from rocm_patch.machine.scan.scanning import Library, Question, Scan


def scan(
    paths: Annotated[
        Optional[list[str]],  # noqa: UP045  (the oldest typer reads no union)
        typer.Argument(
            metavar="[PATH]...", help="Libraries, code objects, folders. Without: the installed torch, ROCm, caches."
        ),
    ] = None,
    card: Annotated[str, typer.Option(metavar="GFX", help="For this chip, gfx1010; this machine's by default.")] = "",
    override: Annotated[
        str,
        typer.Option(
            metavar="X.Y.Z", help="Under this HSA_OVERRIDE_GFX_VERSION, or none; by default the one in use."
        ),
    ] = "",
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Name every kernel that has something against it.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Read what has been read before too.")] = False,
    jobs: Annotated[int, typer.Option(min=0, max=4, help="Processes side by side, up to 4; 2 by default.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 unless all of it can be loaded and is clean.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Read, without a GPU, which GPU code libraries carry, and what of it this card cannot run safely."""
    from rocm_patch.tools import scan as tool

    with _progress() as show:
        found = tool.run(
            [Path(path) for path in paths or ()], from_environ(), os.environ, card, override, again, jobs, show
        )
    if as_json:
        print(json.dumps(tool.document(found), indent=1))
    else:
        _print(found, kernels)
    if strict and not _is_fine(found):
        raise typer.Exit(1)


def _is_fine(found: "Scan") -> bool:
    """Whether there is code, and all of it is the card's own and has nothing against it, as far as it is known."""
    question = found.question
    libraries = [library for library in found.libraries if library.has_code]
    if not libraries or any(library.content.notes for library in found.libraries):
        return False
    if not question.card:
        return True
    wanted = ("native", "compiled", "override") if question.override else ("native", "compiled")
    return all(
        library.answer(question).kind in wanted and not library.harm(question).is_harmful for library in libraries
    )


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
    from rocm_patch.machine.scan.hazards import Examination

    question = found.question
    if question.override:
        loads = f"HSA_OVERRIDE_GFX_VERSION={question.override}, under which code for {question.reported} is loaded"
        print(f"card {question.card}, {loads}")
    elif question.card:
        print(f"card {question.card}, no override")
    else:
        print("no AMD GPU here and none named: what there is, for which chips (--card gfx1010 for one)")
    sums, kinds = Examination(), dict[str, int]()
    for library in found.libraries:
        print(printable(f"{library.name}: {_answer(library, question)}"))
        print(printable(f"    {library.folder}"))
        if library.content.targets:
            print(f"    kernels: {', '.join(_targets(library))}")
        if question.card:
            answer, harm = library.answer(question), library.harm(question)
            _print_hazards(harm, question.card, answer.chip, all_kernels)
            if library.has_code:
                sums.add(harm)
                kinds[answer.kind] = kinds.get(answer.kind, 0) + 1
        for note in library.content.notes:
            print(printable(f"    not read: {note}"))
    if not found.libraries:
        print(
            printable(
                f"no GPU code found in {', '.join(map(str, found.where)) or 'the places that docs/SCAN.md names'}"
            )
        )
    elif question.card:
        _print_sums(sums, kinds, question.card, all_kernels)


def _print_sums(sums: "Examination", kinds: dict[str, int], card: str, all_kernels: bool) -> None:
    words = {
        "native": "native",
        "compiled": "compiled when loaded",
        "override": "by another chip's code",
        "none": "none",
    }
    parts = [f"{kinds[kind]} {word}" for kind, word in words.items() if kind in kinds]
    print(f"{sum(kinds.values())} with GPU code: {', '.join(parts) or 'none'}")
    if sums.examined:
        harmful = sums.cannot_encode + sums.with_bug
        print(f"{harmful:,} of their {sums.examined:,} kernels and functions have something against them on {card}")
        if harmful and not all_kernels:
            print("hint: --kernels names them; docs/SCAN.md says what the rules mean and what to do")


def _answer(library: "Library", question: "Question") -> str:
    if not library.content.targets:
        return "cannot be read"
    return library.answer(question).words if question.card else ", ".join(sorted(library.content.targets, key=_age))


def _targets(library: "Library") -> Iterator[str]:
    for target, amount in sorted(library.content.targets.items(), key=lambda row: _age(row[0])):
        records = f"{amount.records:,} records, " if amount.records else ""
        yield f"{target} {amount.kernels:,} ({records}{_size(amount.bytes)})"


def _age(target: str) -> tuple[int, str]:
    """Sorts targets by generation: gfx906, gfx90a, gfx1010."""
    return len(target.partition("-")[0]), target


def _print_hazards(harm: "Examination", card: str, chip: str, all_kernels: bool) -> None:
    from rocm_patch.machine import catalog

    if not harm.examined:
        return
    called = f" and {harm.called:,} functions that they call" if harm.called else ""
    print(
        f"    of {harm.examined - harm.called:,} kernels{called} for {chip}, on {card}: {harm.cannot_encode:,} with "
        f"instructions that it lacks, {harm.with_bug:,} with a hardware bug and no work-around, {harm.clean:,} with "
        "nothing found"
    )
    for rule in catalog.hazards():
        if rule.id in harm.places:
            places, kernels = harm.places[rule.id], harm.kernels_by_rule[rule.id]
            print(f"      {rule.effect} possible: {places:,} places in {kernels:,} kernels; {rule.id}: {rule.title}")
    for kernel in sorted(harm.kernels, key=lambda kernel: kernel.rank) if all_kernels else ():
        counts = ", ".join(f"{count} {rule}" for rule, count in sorted(kernel.hazards.items()))
        print(printable(f"      {kernel.name}: {counts}"))


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"

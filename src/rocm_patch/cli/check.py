"""`rocm-patch check`.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # at run time when it is needed: every start of rocm-patch comes through here
    from rocm_patch.tools.check.finding import Finding


def check(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT|FOLDER...", help="Scripts, notebooks, or folders with such in them."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Read scripts, without running them: what will fail with a GPU and workers, where, and what mends it.

    Exits 1 if there is anything.
    """
    from rocm_patch.tools import check as tool

    result = tool.check(map(Path, paths))
    if as_json:
        print(json.dumps(tool.document(result), indent=2))
    else:
        _show(result.findings)
        count = f"{len(result.findings) or 'no'} finding{'' if len(result.findings) == 1 else 's'}"
        files = f"{result.files} file{'' if result.files == 1 else 's'}"
        print(f"rocm-patch: {count} in {files}", file=sys.stderr)
    if result.findings:
        raise typer.Exit(1)


def _show(findings: "tuple[Finding, ...]") -> None:
    from rich.console import Console
    from rich.text import Text

    # A line stays one line, so that editors and grep can read it.
    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        cell = "" if finding.cell is None else f"cell {finding.cell}:"
        console.print(
            Text.assemble(
                (printable(f"{finding.path}:{cell}{finding.line}:{finding.column}: "), ""),
                (f"{finding.rule}: ", "bold red"),
                printable(finding.summary),
            )
        )
        console.print(Text(f"  why: {printable(finding.why)}"))
        console.print(Text(f"  fix: {printable(finding.fix)}"))


def printable(text: str) -> str:
    """Text that any stream can take: a path may hold bytes that are none."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)

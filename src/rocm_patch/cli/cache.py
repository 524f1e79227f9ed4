"""`rocm-patch cache`: what has been learned about convolutions on this machine, to look at and to forget.

Without `from __future__ import annotations`, as in `cli.main`.
"""

import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rocm_patch.settings import show_log

if TYPE_CHECKING:  # at run time when it is needed: every start of rocm-patch comes through here
    from rocm_patch.trust.fingerprint import Fingerprint
    from rocm_patch.trust.store import Row, Store, Suspicion

app = typer.Typer(
    help="What has been learned about convolutions on this machine: look at it, or have it tried again.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
_Machine = Annotated[
    str, typer.Option("--machine", metavar="ID", help="Of one machine alone; rocm-patch cache list has the ids.")
]
_Bad = Annotated[bool, typer.Option("--bad", help="Failures and suspicions alone.")]


@app.command("list")
def list_(as_json: _Json = False, bad: _Bad = False, machine: _Machine = "") -> None:
    """List what is known, grouped by machine: the device and the versions that verdicts hold for."""
    store, rows, suspicions = _read(machine)
    rows = [row for row in rows if row.verdict.is_bad or not bad]
    if as_json:
        _print_json(store, rows, suspicions)
        return
    for known in _machines(rows, suspicions):
        print(f"{known.id}  {known}")
        lines = [
            (row.verdict.kind, row.strategy, row.label, row.verdict.when, row.verdict.evidence)
            for row in rows
            if row.machine == known
        ]
        lines += [("suspect", s.strategy, s.label, s.when, s.evidence) for s in suspicions if s.machine == known]
        wide = max(len(line[2]) for line in lines)
        for kind, strategy, label, when, evidence in lines:
            first = evidence.strip().partition("\n")[0]
            print(f"  {kind:<8}{strategy:<10} {label:<{wide}}  {_time(when)}  {first}".rstrip())
    if not rows and not suspicions:
        _say(f"nothing {'bad ' if bad else ''}is known yet; it would be in {store.where}")


@app.command()
def show(text: Annotated[str, typer.Argument(metavar="TEXT", help="Part of the description; all without it.")] = "",
         as_json: _Json = False) -> None:  # fmt: skip
    """Show all that is known of the convolutions whose description contains TEXT, evidence and all."""
    store, rows, suspicions = _read("")
    rows = [row for row in rows if text in row.label]
    suspicions = [suspicion for suspicion in suspicions if text in suspicion.label]
    if as_json:
        _print_json(store, rows, suspicions)
    elif rows or suspicions:
        blocks = [_block(row.strategy, row.label, row.machine, _details(row), row.verdict.evidence) for row in rows]
        blocks += [
            _block(s.strategy, s.label, s.machine, [("verdict", "suspected"), ("when", _time(s.when))], s.evidence)
            for s in suspicions
        ]
        print("\n\n".join(blocks))
    if not rows and not suspicions:
        what = f"of a convolution with {text!r} in its description" if text else "yet"
        _say(f"nothing is known {what}\nhint: rocm-patch cache list shows all that is known")
        raise typer.Exit(1)


@app.command()
def clear(
    bad: Annotated[bool, typer.Option("--bad", help="Keep the verdicts that say ok.")] = False,
    machine: _Machine = "",
    everything: Annotated[bool, typer.Option("--all", help="Damaged files that were set aside too.")] = False,
) -> None:
    """Forget what is known, so that all of it is tried again."""
    from rocm_patch.machine.folders import cache_folder

    if everything and (bad or machine):
        _say("error: --all removes everything, --bad and --machine a part\nhint: rocm-patch cache clear --all")
        raise typer.Exit(2)
    store, rows, suspicions = _read(machine)
    for known in _machines(rows, suspicions):
        kinds = [row.verdict.kind for row in rows if row.machine == known and (row.verdict.is_bad or not bad)]
        kinds += ["suspect" for suspicion in suspicions if suspicion.machine == known]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
        _say(f"forgetting {counts or 'nothing'} of {known.id} ({known})")
    chosen = _machines(rows, suspicions)[0] if machine else None
    removed = store.clear(chosen, only_bad=bad)
    is_written = store.where != "memory" and not _left(store, chosen, bad)
    _say(f"{removed} removed from {store.where}" if is_written else "the file could not be written; nothing changed")
    damaged = sorted(cache_folder(os.environ).glob("verdicts.db.corrupt-*")) if everything else []
    for path in damaged:
        try:
            path.unlink()
        except OSError as error:
            _say(f"cannot remove {path}: {error.strerror}")
            is_written = False
        else:
            _say(f"{path} removed")
    if not is_written:
        raise typer.Exit(1)


def _read(machine: str) -> "tuple[Store, list[Row], list[Suspicion]]":
    """The store and what it holds of the machine whose id begins so, or of all.

    Raises:
        typer.Exit: no such machine, or more than one.
    """
    from rocm_patch.machine.folders import cache_folder
    from rocm_patch.trust.store import Store

    show_log("warning")
    store = Store(cache_folder(os.environ))
    rows, suspicions = store.rows(), store.suspicions()
    if not machine:
        return store, rows, suspicions
    found = [known for known in _machines(rows, suspicions) if known.id.startswith(machine)]
    if len(found) != 1:
        what = "more than one machine" if found else "no machine"
        _say(f"error: {what} in {store.where} has an id that begins with {machine!r}\nhint: rocm-patch cache list")
        raise typer.Exit(2)
    return (
        store,
        [row for row in rows if row.machine == found[0]],
        [suspicion for suspicion in suspicions if suspicion.machine == found[0]],
    )


def _left(store: "Store", machine: "Fingerprint | None", only_bad: bool) -> bool:
    rows = [row for row in store.rows(machine) if row.verdict.is_bad or not only_bad]
    return bool(rows or store.suspicions(machine))


def _machines(rows: "list[Row]", suspicions: "list[Suspicion]") -> "list[Fingerprint]":
    entries: list[Row | Suspicion] = [*rows, *suspicions]
    return list(dict.fromkeys(entry.machine for entry in entries))


def _details(row: "Row") -> list[tuple[str, str]]:
    verdict = row.verdict
    error = "not measured" if math.isnan(verdict.error) else f"{verdict.error:.3g}, relative"
    return [
        ("verdict", verdict.kind),
        ("time", f"{verdict.seconds:.6g} s"),
        ("error", error),
        ("calls", str(verdict.calls)),
        ("when", _time(verdict.when)),
    ]


def _block(strategy: str, label: str, machine: "Fingerprint", details: list[tuple[str, str]], evidence: str) -> str:
    lines = [f"{strategy}: {label}", f"  {'machine':<9}{machine.id} ({machine})"]
    lines += [f"  {name:<9}{value}" for name, value in details]
    if evidence.strip():
        lines += ["  evidence", *(f"    {line}" for line in evidence.rstrip().splitlines())]
    return "\n".join(lines)


def _print_json(store: "Store", rows: "list[Row]", suspicions: "list[Suspicion]") -> None:
    verdicts: list[dict[str, Any]] = [
        {
            **_subject(row),
            "kind": row.verdict.kind,
            "seconds": row.verdict.seconds,
            "error": None if math.isnan(row.verdict.error) else row.verdict.error,
            "calls": row.verdict.calls,
            "when": row.verdict.when,
            "evidence": row.verdict.evidence,
        }
        for row in rows
    ]
    suspected = [{**_subject(s), "when": s.when, "evidence": s.evidence} for s in suspicions]
    document = {"schema_version": 1, "where": store.where, "verdicts": verdicts, "suspicions": suspected}
    print(json.dumps(document, indent=2))


def _subject(entry: "Row | Suspicion") -> dict[str, Any]:
    machine = {"id": entry.machine.id, **json.loads(entry.machine.to_json())}
    try:
        spec = json.loads(entry.spec)
    except ValueError:  # of a version that wrote it in another way
        spec = entry.spec
    return {"machine": machine, "spec": spec, "label": entry.label, "strategy": entry.strategy}


def _time(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _say(text: str) -> None:
    print(f"rocm-patch: {text}", file=sys.stderr)

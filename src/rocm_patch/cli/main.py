"""`rocm-patch`: the commands and their options.

Without `from __future__ import annotations`: the oldest typer that we allow does not read options from strings.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rocm_patch._version import __version__
from rocm_patch.cli import bench as measuring
from rocm_patch.cli import cache, proving
from rocm_patch.cli import check as checking
from rocm_patch.cli import scan as scanning
from rocm_patch.cli import tune as tuning
from rocm_patch.cli.arguments import split_run
from rocm_patch.errors import RocmPatchError
from rocm_patch.launch.run import BrokenScriptError, Target
from rocm_patch.settings import (
    BACKENDS,
    LOADER_METHODS,
    LOG_LEVELS,
    POLICIES,
    PROFILES,
    STRATEGY_NAMES,
    from_environ,
    parse_bytes,
)

app = typer.Typer(
    name="rocm-patch",
    help="PyTorch that works on AMD Radeon cards AMD does not support well. Not yet run on AMD hardware.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Options that are left out are empty: the oldest typer that we allow reads no `str | None`.
_Backend = Annotated[str, typer.Option(help=f"Whose convolutions are served: {', '.join(BACKENDS)}.")]
_Profile = Annotated[str, typer.Option(help=f"Environment plan: {', '.join(PROFILES)}.")]
_Venv = Annotated[str, typer.Option(metavar="PATH", help="The virtual environment; the active one by default.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Exit 1 for warnings too.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def _say(text: str) -> None:
    print(f"rocm-patch: {text}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"rocm-patch {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    options_metavar="[OPTIONS] SCRIPT [ARGS]... | -m MODULE [ARGS]... | -c CODE | -- COMMAND [ARGS]...",
)
def run(
    context: typer.Context,
    backend: _Backend = "",
    conv: Annotated[
        str, typer.Option(help=f"Policy ({', '.join(POLICIES)}) or strategy ({', '.join(STRATEGY_NAMES)}).")
    ] = "",
    start_method: Annotated[
        str,
        typer.Option(
            help=f"How loaders' workers start: {', '.join(LOADER_METHODS)}. auto, as without it: from a fork "
            "server, and Python's own start method is left alone; the others set that too."
        ),
    ] = "",
    profile: _Profile = "",
    log: Annotated[str, typer.Option(help=f"What to say while it runs: {', '.join(LOG_LEVELS)}.")] = "",
    unset: Annotated[
        list[str], typer.Option(metavar="NAME", help="Take a variable out of the environment first; repeatable.")
    ] = [],  # noqa: B006  (typer's way to say none)
    restart: Annotated[
        bool, typer.Option("--restart", help="Start it again on the bypass if a convolution hangs or crashes.")
    ] = False,
    hang_limit: Annotated[
        str, typer.Option(metavar="SECONDS", help="Without progress for so long a convolution counts as hung.")
    ] = "",
    workspace: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory that one convolution may take beside its tensors: 512M, 2G.")
    ] = "",
    exact: Annotated[
        bool, typer.Option("--exact", help="Leave out Winograd's algorithms, which round more than a matrix product.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line about what is on.")] = False,
) -> None:
    """Run a program patched, with nothing to edit in it; it exits with its own code."""
    from rocm_patch.launch import run as launcher

    target: Target | None = context.obj
    if target is None:
        _fail("nothing to run", "rocm-patch run SCRIPT [ARGS], run -m MODULE, or run -- COMMAND [ARGS]")
    if restart and target.words[0] == "-":
        _fail("a script that comes by stdin cannot be started again", "put it into a file")
    limit = {"ROCM_PATCH_HANG_LIMIT": hang_limit} if hang_limit else {}
    settings = from_environ({**os.environ, **limit}).replaced(
        backend=backend or None,
        conv=conv or None,
        start_method=start_method or None,
        profile=profile or None,
        log=log or None,
        workspace=parse_bytes(workspace) if workspace else None,
        exact=exact or None,
    )
    launch = launcher.prepare(target, settings, os.environ, unset)
    for notice in launch.notices:
        _say(notice)
    if not quiet:
        _say(launch.summary)
    if restart:
        from rocm_patch.launch.restart import supervise

        raise typer.Exit(supervise(launch, _say))
    launcher.execute(launch)


@app.command()
def env(
    shell: Annotated[str, typer.Option(help="Form of the output: sh, fish or json.")] = "sh",
    as_json: _Json = False,
    explain: Annotated[bool, typer.Option(help="Say why, and what the facts say of each variable.")] = False,
    profile: _Profile = "",
) -> None:
    """Print the environment variables that this machine needs, for a shell to read."""
    from rocm_patch.launch.run import program_build
    from rocm_patch.machine import environment, hardware

    settings = from_environ().replaced(profile=profile or None)
    machine = hardware.read_machine(settings.sysfs_root)
    plan = environment.plan(machine, program_build(os.environ)[1], settings, os.environ)
    shell = "json" if as_json else shell
    if shell not in ("sh", "fish", "json"):
        _fail(f"unknown shell {shell!r}; it can be sh, fish or json", "rocm-patch env --shell sh")
    if shell == "json":
        rows = [
            {"name": c.name, "value": c.value, "found": c.found, "why": c.why, "source": c.source}
            for c in plan.changes
        ]
        notices = [str(notice) for notice in plan.notices]
        print(json.dumps({"schema_version": 1, "variables": rows, "notices": notices}, indent=2))
        return
    for change in plan.changes:
        if explain:
            # A value with a line break must not leave the comment: the output is evaluated.
            print("# " + " ".join(f"{change}".split()) + f"\n#   source: {change.source}")
        if change.changes and environment.may_set(change):
            value = shlex.quote(change.value)
            print(f"export {change.name}={value}" if shell == "sh" else f"set -gx {change.name} {value}")
        elif not explain and not change.changes:
            _say(str(change))
    for warning in plan.warnings:
        _say(warning)


@app.command()
def activate(venv: _Venv = "") -> None:
    """Patch every program of a virtual environment, for those that have a launcher of their own."""
    from rocm_patch.launch import activate as hook

    environment = hook.environment_of(venv or None)
    path = hook.activate(environment)
    _say(
        f"{environment} is activated by {path}\n"
        "hint: rocm-patch deactivate takes it back; ROCM_PATCH=0 switches it off"
    )


@app.command()
def deactivate(venv: _Venv = "") -> None:
    """Take `activate` back."""
    from rocm_patch.launch import activate as hook

    environment = hook.environment_of(venv or None)
    removed = hook.deactivate(environment)
    _say(f"{environment} is deactivated" if removed else f"{environment} was not activated")


@app.command()
def doctor(
    file: Annotated[
        str,
        typer.Argument(metavar="[FILE]", help="A log or traceback (- for stdin) or a Python script to look at."),
    ] = "",
    as_json: _Json = False,
    strict: _Strict = False,
) -> None:
    """Look at this machine, or at a log: what is there, what would be on, what is in the way."""
    from rocm_patch.tools import doctor as tool

    settings = from_environ()
    findings = tool.examine_log(Path(file), settings) if file else tool.examine(settings)
    if as_json:
        print(json.dumps(tool.document(findings), indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:<8} {finding.check}: {finding.summary}")
            if finding.why and finding.level != "ok":
                print(f"{'':<8}   why: {finding.why}")
            if finding.fix:
                print(f"{'':<8}   fix: {finding.fix}")
            if finding.source and finding.level != "ok":
                print(f"{'':<8}   source: {finding.source}")
    levels = {finding.level for finding in findings}
    if "failure" in levels or (strict and "warning" in levels):
        raise typer.Exit(1)


@app.command()
def verify(
    as_json: _Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for boxes that could not be run too.")] = False,
    backend: _Backend = "",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="What each box may take.")] = 120.0,
) -> None:
    """Try the ten boxes of the document's checklist on this machine, each in a process of its own."""
    from rocm_patch.tools import verify as tool

    boxes = tool.run(from_environ().replaced(backend=backend or None), timeout=timeout, on_box=_show_box(as_json))
    if as_json:
        print(json.dumps(tool.document(boxes), indent=2))
    states = {box.state for box in boxes}
    if "failed" in states or (strict and "not run" in states):
        raise typer.Exit(1)


@app.command()
def report(
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="x.html to read (report.html by default), or x.json."),
    ] = "",
    as_json: _Json = False,
    bench: Annotated[str, typer.Option(metavar="FILE", help="Put in what rocm-patch bench --json measured.")] = "",
    verify: Annotated[bool, typer.Option(help="Run rocm-patch verify first, which uses the GPU.")] = False,
) -> None:
    """Put all that is known of this machine into a page to read, or a JSON file to attach to an issue."""
    from rocm_patch.tools import report as tool

    settings, boxes = from_environ(), None
    if verify:
        from rocm_patch.tools import verify as verifier

        boxes = verifier.document(verifier.run(settings, on_box=_show_box(True)))["boxes"]
    document = tool.collect(settings, boxes=boxes, bench=Path(bench) if bench else None)
    is_json = as_json or output.endswith(".json")
    text = json.dumps(document, indent=2, allow_nan=False) + "\n" if is_json else tool.render(document)
    if as_json and not output:
        print(text, end="")
        return
    tool.write(Path(output or "report.html"), text)
    _say(f"wrote {output or 'report.html'}; look through it before you send it to anybody")


app.command(context_settings={"allow_extra_args": True})(proving.probe)
app.command()(proving.demo)
app.command()(measuring.bench)
app.command()(tuning.tune)
app.command()(checking.check)
app.command()(scanning.scan)
app.add_typer(cache.app, name="cache")


def _show_box(to_stderr: bool) -> Any:
    def show(box: Any) -> None:
        line = f"{box.state:<8} {box.box}: {box.detail} ({box.seconds:.1f} s)"
        print(line, file=sys.stderr if to_stderr else sys.stdout, flush=True)

    return show


def _fail(message: str, hint: str) -> NoReturn:
    _say(f"error: {message}\nhint: {hint}")
    raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> Any:
    """The entry point of `rocm-patch`; exits with the code that the command line promises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    target = None
    if arguments[:1] == ["run"]:
        ours, target = split_run(arguments[1:])
        arguments = ["run", *ours]
    elif arguments[:1] == ["tune"]:
        ours, target = tuning.split(arguments[1:])
        arguments = ["tune", *ours]
    try:
        return app(args=arguments, prog_name="rocm-patch", obj=target)
    except RocmPatchError as error:
        _say(f"error: {error}")
        sys.exit(1 if isinstance(error, BrokenScriptError) else 2)

"""`rocm-patch run`: plan the environment, then become the program.

The process is replaced by exec, so signals, stdin, the exit code and everything else are the program's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import UsageError
from rocm_patch.launch.hook import SOURCE_VARIABLE
from rocm_patch.launch.variables import LAUNCHED
from rocm_patch.machine import backend, environment, hardware
from rocm_patch.machine.build import TorchBuild, find_build, read_build
from rocm_patch.settings import Settings, variable

SITE_FOLDER = Path(__file__).parent / "site"

# Asked of the program's own Python: where its torch lies, whether it has rocm_patch, and whether the script
# parses. Leaves the current folder out of the search, as a script would.
_QUESTION = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util, json

def folder_of(package):
    spec = importlib.util.find_spec(package)
    folders = spec and spec.submodule_search_locations
    return next(iter(folders)) if folders else None

answer = {package: folder_of(package) for package in ("torch", "rocm_patch")}
if len(sys.argv) > 1:
    try:
        with open(sys.argv[1], "rb") as file:
            compile(file.read(), sys.argv[1], "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        answer["syntax"] = [str(getattr(error, "msg", error)), getattr(error, "lineno", 0) or 0]
json.dump(answer, sys.stdout)
"""


@dataclass(frozen=True)
class Target:
    """What to run.

    Attributes:
        kind: `script` (a path, or `-` for stdin), `module` (-m), `code` (-c) or `command` (after --).
        words: the script, module, code or command, and its arguments.
    """

    kind: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """Everything that `os.execve` needs, and what to tell the user first.

    Attributes:
        argv: the command.
        environ: its whole environment.
        summary: one line saying what is on.
        notices: warnings with hints.
    """

    argv: tuple[str, ...]
    environ: dict[str, str]
    summary: str
    notices: tuple[str, ...]


class BrokenScriptError(UsageError):
    """A script that Python itself would refuse to start."""


def program_python(environ: Mapping[str, str]) -> str:
    """The Python that the program would run with: the active virtual environment's, else PATH's, else ours.

    Ours comes last: installed by pipx, it has no torch.
    """
    active = environ.get("VIRTUAL_ENV")
    if active:
        python = Path(active) / "bin" / "python"
        if python.exists():
            return str(python)
    for name in ("python", "python3"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found:
            return found
    return sys.executable


def prepare(target: Target, settings: Settings, environ: Mapping[str, str], unset: Sequence[str] = ()) -> Launch:
    """Plan a launch; changes nothing.

    Args:
        target: what to run.
        settings: the user's choices; those that are given travel to the program as variables.
        environ: the environment to start from.
        unset: variables to take out of it, and to leave out of the plan.

    Raises:
        UsageError: the target cannot be run; BrokenScriptError for a script that does not parse.
    """
    child = {name: value for name, value in environ.items() if name not in unset}
    python = program_python(environ)
    argv = _command(target, python, environ)
    if not settings.enabled:
        return Launch(argv, child, "off (ROCM_PATCH=0): a plain run", ())
    answer = _ask(python, child, target)
    if not answer.get("torch") and find_build() is not None:
        # rocm-patch was called by its path, without activating the environment that it and torch lie in.
        python = sys.executable
        argv = _command(target, python, environ)
        answer = _ask(python, child, target)
    build = read_build(Path(answer["torch"])) if answer.get("torch") else None
    machine = hardware.read_machine(settings.sysfs_root)
    plan = environment.plan(machine, build, settings, child)
    changes = tuple(change for change in plan.changes if change.name not in unset)
    environment.apply(changes, child)
    _hand_over(settings, child, has_rocm_patch=bool(answer.get("rocm_patch")))
    activation = backend.decide(machine, build, settings, child)
    notices = plan.warnings
    if build is None:
        notices.append(
            f"{python} has no torch; children that have one are patched\n"
            "hint: activate the environment that has torch, then run again"
        )
    return Launch(argv, child, _summary(activation, settings, changes, build), tuple(notices))


def program_build(environ: Mapping[str, str]) -> tuple[str, TorchBuild | None]:
    """The Python that is meant, ours where it has torch and the program's else, and its torch, from its files."""
    own = find_build()
    if own is not None:
        return sys.executable, own
    python = program_python(environ)
    folder = _ask(python, environ, None).get("torch")
    return python, read_build(Path(folder)) if folder else None


def _command(target: Target, python: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    first = target.words[0]
    if target.kind == "module":
        return (python, "-m", *target.words)
    if target.kind == "code":
        return (python, "-c", *target.words)
    if target.kind == "command":
        found = shutil.which(first, path=environ.get("PATH"))
        if found is None:
            raise UsageError(f"cannot run {first!r}: no such command", "give a command that is on PATH, or its path")
        return (found, *target.words[1:])
    path = Path(first)
    if first != "-" and not path.exists():
        raise UsageError(
            f"cannot run {first!r}: no such file",
            "rocm-patch run SCRIPT [ARGS], rocm-patch run -m MODULE, or rocm-patch run -- COMMAND",
        )
    if path.is_dir() and not (path / "__main__.py").exists():
        raise UsageError(
            f"cannot run {first!r}: it is a folder without a __main__.py",
            "give the script inside it, or -m MODULE",
        )
    return (python, *target.words)


def _ask(python: str, environ: Mapping[str, str], target: Target | None) -> dict[str, Any]:
    """What the program's Python says of itself; nothing when it cannot be asked."""
    script = []
    if (
        target
        and target.kind == "script"
        and Path(target.words[0]).suffix == ".py"
        and Path(target.words[0]).is_file()
    ):
        script = [target.words[0]]
    # Our own hook need not ride in the question.
    asked = {**environ, "ROCM_PATCH": "0"}
    try:
        done = subprocess.run(
            [python, "-c", _QUESTION, *script],
            env=asked,
            capture_output=True,
            timeout=60,
            check=True,
            text=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    if target and "syntax" in answer:
        message, line = answer["syntax"]
        raise BrokenScriptError(
            f"cannot run {target.words[0]!r}: {message} (line {line})",
            f"{python} -m py_compile {target.words[0]}",
        )
    return answer


def _hand_over(settings: Settings, child: dict[str, str], *, has_rocm_patch: bool) -> None:
    """Put into the child's environment what the hook needs there."""
    for field, default in (("backend", "auto"), ("profile", "auto"), ("sysfs_root", "/")):
        value = getattr(settings, field)
        if value != default:
            child[variable(field)] = value
    for limit in ("hang_limit", "busy_limit"):
        if getattr(settings, limit) != getattr(Settings(), limit):
            child[variable(limit)] = f"{getattr(settings, limit):g}"
    for field in ("conv", "start_method", "fault", "log"):
        value = getattr(settings, field)
        if value is not None:
            child[variable(field)] = value
    if settings.workspace is not None:
        child[variable("workspace")] = str(settings.workspace)
    if settings.exact:
        child[variable("exact")] = "1"
    child[LAUNCHED] = "1"
    package = Path(__file__).resolve().parents[1]
    if not has_rocm_patch:
        child[SOURCE_VARIABLE] = str(package.parent)
    before = child.get("PYTHONPATH")
    others = [entry for entry in before.split(os.pathsep) if entry != str(SITE_FOLDER)] if before else []
    child["PYTHONPATH"] = os.pathsep.join([str(SITE_FOLDER), *others])


def _summary(
    activation: backend.Activation,
    settings: Settings,
    changes: Sequence[environment.EnvChange],
    build: TorchBuild | None,
) -> str:
    if activation.backend is None:
        convolutions = f"convolutions native ({activation.why})"
    else:
        served = activation.strategy or activation.policy
        convolutions = f"convolutions {served} on {activation.backend} ({activation.why})"
    loaders = "loaders as they are"
    if activation.backend is not None or settings.start_method:
        method = settings.start_method or "auto"
        loaders = "loader workers " + ("from a fork server" if method == "auto" else f"by {method}")
    made = sum(change.changes for change in changes)
    kept = len(changes) - made
    variables = f"{made} variables set" + (f", {kept} kept" if kept else "")
    return f"{convolutions}; {loaders}; {variables}"


def execute(launch: Launch) -> None:
    """Become the program; returns only by raising.

    Raises:
        UsageError: the system refuses to start the command.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(launch.argv[0], list(launch.argv), launch.environ)
    except OSError as error:
        raise UsageError(
            f"cannot run {launch.argv[0]!r}: {error.strerror}", "check that it is an executable file"
        ) from error

"""How a script's worker processes start."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.flow import Step
from rocm_patch.tools.check.loaders import is_fork
from rocm_patch.tools.check.names import argument
from rocm_patch.tools.check.scopes import last_part

_GUARD = "missing-guard"
_FORK = "fork-asked-for"
_PROCESSES = "worker processes are started"
# Calls that do not iterate over a loader that they are given.
_LOOK_ONLY = frozenset(("len", "print", "isinstance", "type", "str", "repr", "id", "hasattr", "getattr", "setattr",
                        "append", "dict", "prepare", "setup_dataloaders", "prepare_data_loader", "info",
                        "debug"))  # fmt: skip
# Methods that iterate over the loaders that their object was made with.
_RUNNERS = ("fit", "train", "run", "test", "evaluate", "validate", "predict", "start")


def missing_guard(script: Script) -> Iterator[Finding]:
    """Workers that start when the file is imported; once per file, where the first do."""
    if script.is_notebook:  # which no worker imports
        return
    for step in script.steps:
        what = "" if step.is_guarded else _starts(script, step)
        if what:
            at = ast.Pass(lineno=step.line, col_offset=0)
            yield script.found(
                at,
                _GUARD,
                f'{what} outside of `if __name__ == "__main__":`',
                "a worker that does not come by fork imports the script again, and would do this again; Python stops "
                "it: `DataLoader worker exited unexpectedly`, or `An attempt has been made to start a new process`",
                'put it into a function and call that under `if __name__ == "__main__":`'
                + ("" if what == _PROCESSES else f"; rocm-patch run {script.program} needs no guard for loaders"),
            )
            return


def _starts(script: Script, step: Step) -> str:
    node, loaders = step.node, script.loaders
    used: list[ast.Call] = []
    if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        used = loaders.loaders_in(node.iter)
    elif isinstance(node, ast.YieldFrom):
        used = loaders.loaders_in(node.value)
    elif isinstance(node, ast.Call):
        if loaders.starts_process(node):
            return _PROCESSES
        if loaders.trains_with_workers(node):
            return "a training whose loaders have workers is started"
        used = _used_by(script, node)
    return "a DataLoader with workers is used" if any(not loaders.asks_for_fork(call) for call in used) else ""


def _used_by(script: Script, call: ast.Call) -> list[ast.Call]:
    """The loaders that a call iterates over."""
    loaders, name = script.loaders, last_part(call.func)
    if script.names.definition(call.func) is not None or loaders.makes_loader(call):
        return []  # its own steps say
    found: list[ast.Call] = []
    if isinstance(call.func, ast.Attribute) and name in _RUNNERS:
        for made in script.names.values(call.func.value):
            if isinstance(made, ast.Call) and script.names.definition(made.func) is None:
                found += _handed(script, made)
    if name not in _LOOK_ONLY and not name[:1].isupper():  # an object that is made does not iterate yet
        found += _handed(script, call)
    return found


def _handed(script: Script, call: ast.Call) -> list[ast.Call]:
    parts = [*call.args, *(keyword.value for keyword in call.keywords)]
    found = [loader for part in parts for loader in script.loaders.loaders_in(part)]
    if last_part(call.func) in _RUNNERS:  # trainer.fit(module): Lightning asks the module for its loaders
        found += [loader for part in parts for loader in script.loaders.loaders_of(part)]
    return found


def fork_asked_for(script: Script) -> Iterator[Finding]:
    """Where a script itself says that processes are to be forked."""
    for call in script.calls:
        name = last_part(call.func)
        if script.names.dotted(call.func) in ("os.fork", "os.forkpty"):
            yield script.found(
                call,
                _FORK,
                f"{script.names.dotted(call.func)}() makes a child that cannot use the GPU if its parent did",
                "ROCm's handles do not survive a fork: what the child asks of the GPU fails or hangs",
                "start another process: multiprocessing with the start method spawn, or subprocess",
            )
        asked: list[ast.expr] = []
        if name in ("set_start_method", "get_context", "_force_start_method"):
            asked += argument(call, 0, "method")
        if call in script.loaders.calls:
            asked += script.loaders.given(call, "multiprocessing_context")
        for keyword in call.keywords:
            if (
                keyword.arg in ("multiprocessing_context", "start_method", "mp_context")
                and keyword.value not in asked
            ):
                asked.append(keyword.value)
        for part in asked:
            if "fork" in script.names.texts(part) and is_fork(script.names, part):
                yield script.found(
                    part,
                    _FORK,
                    f"{name or 'a call'}() is given the start method fork",
                    "a forked worker cannot use the GPU once its parent has: `Cannot re-initialize CUDA in forked "
                    "subprocess`, or a hang; what a loader is given, rocm-patch leaves as it is",
                    'leave it out, or say "spawn"; workers that leave the GPU alone may keep it with '
                    f"`# rocm-patch: ignore[{_FORK}]`",
                )

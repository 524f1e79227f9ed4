"""How a worker begins, as a child of the fork server or as a new interpreter: all before torch's own loop."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import process, resource_tracker, spawn, util
from pathlib import Path
from typing import Any

from rocm_patch.workers import main_script, payload, state

# The descriptors that every worker gets, in this order; those of the payload and of the process object follow.
STANDARD = ("request", "modules", "messages", "tracker", "parent", "stdout", "stderr")
_MOST_SAID = 3500  # bytes: a write to a pipe of up to 4096 is not mixed with another's


def say(fd: int, **message: Any) -> None:
    """One line of JSON to the process that asked for the worker; nobody may be there to read it."""
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, json.dumps(message).encode() + b"\n")


def serve(fds: Sequence[int]) -> int:
    """Become the worker that is asked for, and do its work; returns its exit code."""
    given = dict(zip(STANDARD, fds, strict=False))
    for name, fd in (("stdout", 1), ("stderr", 2)):
        os.dup2(given[name], fd)
        os.set_inheritable(fd, True)  # which dup2 leaves alone where both are the same
    os.close(given["modules"])
    resource_tracker._resource_tracker._fd = given["tracker"]  # type: ignore[attr-defined]
    try:
        worker = _prepared(given["request"], fds[len(STANDARD) :])
    except BaseException as error:  # noqa: BLE001  (whatever the program's modules raise ends here, and is told)
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        where = traceback.format_exc()
        say(given["messages"], failed=text[: _MOST_SAID // 2], traceback=where[-_MOST_SAID // 2 :])
        return 1
    say(given["messages"], ready=True)
    os.close(given["messages"])
    code: int = worker._bootstrap(given["parent"])
    return code


def _prepared(request: int, fds: Sequence[int]) -> Any:
    """The process object, when everything that it needs is in place."""
    with open(request, "rb") as file:
        asked = pickle.load(file)
    taken = asked["state"]
    state.apply_first(taken)
    current = process.current_process()
    current._inheriting = True  # type: ignore[attr-defined]  # a main script that starts processes is told off
    try:
        spawn.prepare(asked["preparation"])
        if asked["main"] is not None:
            main_script.stand_in(**asked["main"])
        state.apply_to_libraries(taken)
        heading = asked["payload"]
        shared, published, changes = payload.load(heading, fds[: heading["fds"]])
        main_script.publish(published)
        changes.apply()
        state.apply_settings(taken)
        payload.INHERITED["process"] = list(fds[heading["fds"] :])
        unpickler = _ProcessUnpickler(io.BytesIO(asked["process"]))
        unpickler.shared = shared
        return unpickler.load()
    finally:
        del current._inheriting  # type: ignore[attr-defined]


class _ProcessUnpickler(pickle.Unpickler):
    """Loads a process object whose shared objects came with the payload."""

    shared: Sequence[Any] = ()

    def persistent_load(self, index: Any) -> Any:
        return self.shared[index]


def preparation(name: str, *, with_main: bool) -> dict[str, Any]:
    """What multiprocessing prepares a new process with, without settling Python's start method as it would."""
    current = process.current_process()
    data: dict[str, Any] = {
        "name": name,
        "authkey": bytes(current.authkey),  # as it is, it refuses to be pickled
        "log_to_stderr": util._log_to_stderr,  # type: ignore[attr-defined]
        "sys_path": _import_path(),
        "sys_argv": sys.argv,
        "orig_dir": process.ORIGINAL_DIR,  # type: ignore[attr-defined]
    }
    with contextlib.suppress(FileNotFoundError):  # it has been deleted
        data["dir"] = str(Path.cwd())
    if util._logger is not None:  # type: ignore[attr-defined]
        data["log_level"] = util._logger.getEffectiveLevel()  # type: ignore[attr-defined]
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        data["start_method"] = method
    if with_main:
        main = sys.modules["__main__"]
        name_of_main = getattr(main.__spec__, "name", None)
        path = getattr(main, "__file__", None)
        if name_of_main is not None:
            data["init_main_from_name"] = name_of_main
        elif path is not None:
            data["init_main_from_path"] = os.path.normpath(os.path.join(process.ORIGINAL_DIR or "", path))  # type: ignore[attr-defined]  # noqa: PTH118
    return data


def _import_path() -> list[str]:
    """sys.path for another process. Python's import looks at no other entries than strings."""
    here = process.ORIGINAL_DIR  # type: ignore[attr-defined]
    return [here if entry == "" else entry for entry in sys.path if isinstance(entry, str)]


# For `python -c`: takes these packages from where the parent's lie if this interpreter does not find them itself,
# and nothing else from there. A launcher that came by pipx has them, and the program's Python may not.
# Importing torch makes some hundred thousand objects that stay: a garbage collector only costs time until then.
PROGRAM = """
import gc, sys
gc.disable()
sys.path[:] = {path!r}
import importlib.util
for name, folder in {packages!r}.items():
    if importlib.util.find_spec(name) is None:
        spec = importlib.util.spec_from_file_location(
            name, folder + "/__init__.py", submodule_search_locations=[folder]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
from rocm_patch.workers import {module}
{module}.main(*{arguments!r})
"""


def command(module: str, *arguments: Any) -> list[str]:
    """The command that runs `main(*arguments)` of a module of this room in a new interpreter."""
    import cloudpickle

    import rocm_patch

    packages = {
        package.__name__: os.path.dirname(os.path.abspath(str(package.__file__)))  # noqa: PTH100, PTH120
        for package in (rocm_patch, cloudpickle)
    }
    program = PROGRAM.format(path=_import_path(), packages=packages, module=module, arguments=arguments)
    flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [spawn.get_executable(), *flags, "-c", program]


def main(*fds: int) -> None:
    """In a new interpreter: the worker."""

    for fd in fds:
        if fd > 2:  # not the standard streams
            os.set_inheritable(fd, False)
    code = serve(fds)
    util._flush_std_streams()  # type: ignore[attr-defined]
    os._exit(code)

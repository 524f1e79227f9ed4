"""`rocm-patch verify`: the ten boxes of the document's checklist, tried for real on this machine.

Each box runs in a process of its own, in a program exactly as `rocm-patch run` would start it, so one that crashes or
hangs says nothing of the others. What a box does is in `boxes.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import UsageError
from rocm_patch.launch.run import Launch, Target, prepare
from rocm_patch.settings import Settings
from rocm_patch.tools.box_process import FAILED, NOT_RUN, STATES, TICKED
from rocm_patch.tools.boxes import BOXES, TORCH_IMPORTS

SCHEMA_VERSION = 1

# The program of a box. Takes rocm_patch from where this one lies, since the program's Python may have none (ours came
# by pipx), and nothing else from there. Leaves the current folder out of the search, as a script would.
_PROGRAM = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
folder, box, answer, *ours = sys.argv[1:]
top = folder + "/__init__.py"
spec = importlib.util.spec_from_file_location("rocm_patch", top, submodule_search_locations=[folder])
sys.modules["rocm_patch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["rocm_patch"])
from rocm_patch.tools import box_process, boxes
box_process.answer(boxes.BOXES[box], answer, ours)
"""
_PACKAGE = Path(__file__).resolve().parents[1]
_MOST_LINES = 3  # of a failed process's stderr
_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Box:
    """One box's result.

    Attributes:
        box: its name for ever, a key of `boxes.BOXES`.
        state: `ticked`, `failed` or `not run`.
        detail: what was measured, or why not; one line.
        seconds: how long it took.
    """

    box: str
    state: str
    detail: str
    seconds: float


def run(
    settings: Settings,
    environ: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    on_box: Callable[[Box], None] | None = None,
    only: Sequence[str] = tuple(BOXES),
) -> list[Box]:
    """Try the boxes one after another. Once torch does not import, the boxes that follow are not run.

    Args:
        settings: the user's choices.
        environ: the environment to start from; this process's by default.
        timeout: seconds that each box may take; then its processes are killed.
        on_box: called with each box when it is done.
        only: the names of the boxes to try.

    Raises:
        UsageError: the timeout is not positive.
    """
    if not timeout > 0:
        raise UsageError(f"a timeout of {timeout:g} s leaves no time for a box", "rocm-patch verify --timeout 120")
    given = os.environ if environ is None else environ
    launch = prepare(Target("code", (_PROGRAM,)), settings, given)
    ours = [name for name, value in launch.environ.items() if given.get(name) != value]
    results: list[Box] = []
    no_torch = False
    for name in (name for name in BOXES if name in only):
        start = time.perf_counter()
        state, detail = (NOT_RUN, "torch does not import here") if no_torch else _try(name, launch, ours, timeout)
        results.append(Box(name, state, detail, round(time.perf_counter() - start, 3)))
        no_torch = no_torch or (name == TORCH_IMPORTS and state != TICKED)
        if on_box is not None:
            on_box(results[-1])
    return results


def document(boxes: Sequence[Box]) -> dict[str, Any]:
    """The boxes as the JSON document of the command line."""
    return {"schema_version": SCHEMA_VERSION, "boxes": [asdict(box) for box in boxes]}


def _try(name: str, launch: Launch, ours: Sequence[str], timeout: float) -> tuple[str, str]:
    """State and detail of one box, from a process of its own that is gone with all its children afterwards."""
    with tempfile.TemporaryDirectory(prefix="rocm-patch-verify-") as folder:
        # The answer has a file of its own: libraries write to stdout and stderr as they please.
        answer, said = Path(folder, "answer"), Path(folder, "stderr")
        command = [*launch.argv, str(_PACKAGE), name, str(answer), *ours]
        with said.open("wb") as stderr:
            try:
                process = subprocess.Popen(
                    command, env=launch.environ, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                )  # fmt: skip
            except OSError as error:
                return FAILED, f"cannot start {launch.argv[0]}: {error.strerror}"
        try:
            in_time = _wait(process.pid, timeout)
        finally:  # Ctrl-C too
            os.killpg(process.pid, signal.SIGKILL)
            # A process that a GPU driver holds in the kernel outlives even this.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)
        state, detail = _read(answer)
        if not in_time:
            end = f"no answer within {timeout:g} s" if not state else f"did not end within {timeout:g} s"
            end += ", and cannot be killed: the kernel holds it" if process.returncode is None else ""
        elif process.returncode != 0:
            end = _ending(process.returncode)
        elif not state:
            end = "ended without an answer" if not answer.exists() else "gave an answer that cannot be read"
        else:
            return state, detail
        after = [f"after it answered: {state}, {detail}"] if state else []
        return FAILED, "; ".join([end, *after, *_last_lines(said)])


def _wait(pid: int, timeout: float) -> bool:
    """Whether a child ends in time. It is left unreaped: its id stays taken until its group has been killed."""
    end = time.monotonic() + timeout
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _ending(returncode: int) -> str:
    if returncode > 0:
        return f"ended with exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-returncode}"


def _read(answer: Path) -> tuple[str, str]:
    """The state and detail that a box wrote; empty for none and for nonsense."""
    try:
        written = json.loads(answer.read_text(encoding="utf-8"))
        state, detail = written["state"], written["detail"]
    except (OSError, ValueError, TypeError, KeyError):
        return "", ""
    return (state, detail) if state in STATES and isinstance(detail, str) else ("", "")


def _last_lines(said: Path) -> list[str]:
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
    return [" | ".join([line.strip() for line in lines if line.strip()][-_MOST_LINES:])] if any(lines) else []

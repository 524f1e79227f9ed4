"""A child process in a session of its own: spoken to in lines of JSON, and killed with all that it started.

Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
# Takes rocm_patch from where this one lies, since the child's Python may have none or another (ours came by pipx),
# and nothing else from there. Leaves the current folder out of the search.
_PROGRAM = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
folder, module, requests, answers, owner, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "rocm_patch", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["rocm_patch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["rocm_patch"])
importlib.import_module("rocm_patch.child").become_child(int(requests), int(answers), int(owner))
importlib.import_module(module).main(int(requests), int(answers), *arguments)
"""
# How often a line or the child's end is looked for.
_TICK_SECONDS = 0.05
_STACK_SECONDS = 0.5
_MOST_SAID_BYTES = 1 << 16
_MOST_LINES, _MOST_FRAMES, _MOST_CHARACTERS = 6, 6, 2000
# The heads of Python stacks by `faulthandler`: at a crash, and at our signal.
_STACK_HEADS = ("Current thread", "Stack (most recent")


class Child:
    """A child process that serves requests.

    Args:
        python: its interpreter.
        module: the module of rocm_patch whose `main(requests, answers, *arguments)` it runs: the descriptors of two
            pipes, to read requests from and to write answers to.
        arguments: of `main`.
        environ: its environment.

    Attributes:
        pid: its process id, and that of its group and session.

    Raises:
        OSError: the interpreter cannot be started.
    """

    def __init__(self, python: str, module: str, arguments: list[str], environ: Mapping[str, str]) -> None:
        requests, self._to_child = os.pipe()
        self._from_child, answers = os.pipe()
        # Libraries write to stdout and stderr as they please. Appended to, so that it can be emptied under way.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        fcntl.fcntl(self._output, fcntl.F_SETFL, fcntl.fcntl(self._output, fcntl.F_GETFL) | os.O_APPEND)
        command = [python, "-c", _PROGRAM, str(_PACKAGE), module, str(requests), str(answers), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [*command, *arguments], env=dict(environ), start_new_session=True, pass_fds=(requests, answers),
                stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
            )  # fmt: skip
        except OSError:
            self._close()
            raise
        finally:
            os.close(requests)
            os.close(answers)
        self.pid = self._process.pid
        self._buffer = b""
        os.set_blocking(self._from_child, False)
        # Not select(): a large program has descriptors beyond what it can name.
        self._poll = select.poll()
        self._poll.register(self._from_child, select.POLLIN)

    def send(self, request: Mapping[str, Any]) -> None:
        """Give it a request; one that is dead already shows when it is listened to."""
        os.ftruncate(self._output.fileno(), 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._to_child, json.dumps(request).encode() + b"\n")

    def line(self) -> dict[str, Any] | None:
        """Its next line, None if it has written none within a moment."""
        if b"\n" not in self._buffer:
            if self._poll.poll(_TICK_SECONDS * 1000):
                with contextlib.suppress(BlockingIOError):
                    read = os.read(self._from_child, 1 << 16)
                    self._buffer += read
                    if not read:  # closed: its end is about to be seen
                        time.sleep(_TICK_SECONDS / 10)
            if b"\n" not in self._buffer:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def is_over(self) -> bool:
        """Whether it has ended. It is left unreaped: its id stays taken until its group has been killed."""
        return self._process.returncode is not None or _is_over(self.pid)

    def end(self, seconds: float) -> int | None:
        """Kill its group and whatever else it has started.

        Args:
            seconds: how long to wait until it is gone.

        Returns:
            Its return code as `subprocess` has it; None if it is still there: a process that a driver holds in the
            kernel outlives SIGKILL.
        """
        family = _family(self.pid)
        os.killpg(self.pid, signal.SIGKILL)
        is_gone = _wait(self.pid, seconds)
        for pid, started in family.items():
            if _stat(pid)[19:20] == [started]:  # it has left the group
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        if is_gone:
            self._process.wait()
            with contextlib.suppress(ChildProcessError):  # where orphans of the group come to us, as to process 1
                while os.waitpid(-self.pid, os.WNOHANG)[0]:
                    pass
        else:
            # Nobody is to wait for it, neither when this object nor when the interpreter goes.
            self._process.returncode = -signal.SIGKILL
        self._close()
        return self._process.returncode if is_gone else None

    def ask_for_stack(self) -> None:
        """Have it write its Python stack to stderr, if it still handles signals at all."""
        before = os.fstat(self._output.fileno()).st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR2)
        deadline = time.monotonic() + _STACK_SECONDS
        while time.monotonic() < deadline and os.fstat(self._output.fileno()).st_size == before:
            time.sleep(0.01)
        time.sleep(0.01)  # the rest of it

    def last_words(self) -> str:
        """The last lines of its stdout and stderr, the innermost calls of a stack rather than the outermost."""
        size = os.fstat(self._output.fileno()).st_size
        start = max(0, size - _MOST_SAID_BYTES)
        text = os.pread(self._output.fileno(), size - start, start).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        head = next((i for i, line in enumerate(lines) if line.startswith(_STACK_HEADS)), len(lines))
        before = [line for line in lines[:head] if not line.startswith(("Thread 0x", "File "))]
        frames = [line for line in lines[head + 1 :] if line.startswith("File ")]
        return " | ".join(before[-_MOST_LINES:] + frames[:_MOST_FRAMES])[-_MOST_CHARACTERS:]

    def _close(self) -> None:
        os.close(self._to_child)
        os.close(self._from_child)
        self._output.close()


def become_child(requests: int, answers: int, owner: int) -> None:
    """In a new child: make sure that it ends with its owner, even one that is killed, and leaves nothing behind.

    To be called before anything starts a thread: it forks.
    """
    import faulthandler
    import resource

    for descriptor in (requests, answers):
        os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # No core dump: it holds what the GPU has mapped, takes minutes and fills the user's folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # When memory runs out, the kernel is to take this process and not the user's.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.fork() == 0:
        os.close(answers)
        _watch(requests, owner)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=False)


def _watch(requests: int, owner: int) -> None:
    """Kill this process's group once the owner has closed the pipe or is gone.

    A process of its own, since the child may be held up anywhere. Not PR_SET_PDEATHSIG: it fires when the thread
    ends that started the child, and spares what the child has started.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    poll = select.poll()
    poll.register(requests, 0)  # reports only that nobody can write any more
    # A fork of the owner holds the pipe open as well.
    with contextlib.suppress(OSError):  # Linux before 5.3
        poll.register(os.pidfd_open(owner), select.POLLIN)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _wait(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _is_over(pid):
            return True
        time.sleep(0.005)
    return False


def _stat(pid: int) -> list[str]:
    """The fields of proc(5) from the third on, empty for a process that is gone.

    Not its environment, by which descendants could be told as well: a process that a driver holds may hold the lock
    that reading it takes.
    """
    try:
        # Not buffered text: hundreds are read while the program's other threads want the interpreter.
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read().decode("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def _family(pid: int) -> dict[int, str]:
    """The processes of a session and the descendants of its leader, with the times that they were started at.

    Only a process that has left the session and lost its parent is not found.
    """
    with os.scandir("/proc") as entries:
        stats = {int(entry.name): _stat(int(entry.name)) for entry in entries if entry.name.isdecimal()}
    family, parents = {process for process, fields in stats.items() if fields and fields[3] == str(pid)}, {pid}
    while parents:
        parents = {process for process, fields in stats.items() if fields and int(fields[1]) in parents} - family
        family |= parents
    return {process: stats[process][19] for process in family - {pid}}

"""A worker that has been asked for: how it is started, what it says, and how it ended."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from multiprocessing import connection, popen_fork, resource_tracker, spawn, util
from typing import TYPE_CHECKING, Any

from rocm_patch.workers import boot, fork_server, installed, state
from rocm_patch.workers.descriptors import memory_file
from rocm_patch.workers.payload import InheritedFd
from rocm_patch.workers.pickling import Pickler, handing_descriptors_to

if TYPE_CHECKING:
    from rocm_patch.workers.context import Context, Worker


class CannotStartError(RuntimeError):
    """A worker could not start in this way, and why; another way may work."""


class RefusedError(CannotStartError):
    """The fork server refused to fork, since an import has touched the GPU; a new one will do without that import."""


class _ProcessPickler(Pickler):
    """Pickles a process object; the shared objects in it become their numbers."""

    def __init__(self, file: Any, shared: Sequence[Any], *, main_by_value: bool) -> None:
        super().__init__(file, main_by_value=main_by_value)
        self._shared = {id(obj): number for number, obj in enumerate(shared)}

    def persistent_id(self, obj: Any) -> int | None:
        return self._shared.get(id(obj))


class Popen(popen_fork.Popen):
    """A started worker: `multiprocessing`'s protocol over the fork server's answers or a child of our own.

    The pipe of messages brings what the worker and the server say; the sentinel's end means the worker's.

    Attributes:
        peak_bytes: the most memory that it had, known after its end.
    """

    def __init__(self, process_obj: Worker, context: Context) -> None:
        self._is_spawned = context.get_start_method() == "spawn"
        self.peak_bytes: int | None = None
        self._owner = os.getpid()
        self._fds: list[int] = []
        self._said = b""
        self._context: Context | None = context
        super().__init__(process_obj)

    def duplicate_for_child(self, fd: int) -> int:
        """Have a descriptor sent along; multiprocessing asks while it pickles."""
        self._fds.append(fd)
        return len(self._fds) - 1

    @staticmethod
    def DupFd(index: int) -> InheritedFd:
        """What is pickled for a descriptor that is sent along."""
        return InheritedFd("process", index)

    def _launch(self, process_obj: Worker) -> None:
        spawn._check_not_importing_main()  # type: ignore[attr-defined]
        context = self._context
        assert context is not None
        payload = context.payload()
        stream = io.BytesIO()
        pickler = _ProcessPickler(stream, context.shared, main_by_value=context.main_by_value)
        with handing_descriptors_to(self):
            pickler.dump(process_obj)
        modules = payload.modules | pickler.modules | ({"__main__"} if not context.main_by_value else set())
        needed = installed.needed(modules)
        request = {
            "preparation": boot.preparation(process_obj.name, with_main=not context.main_by_value),
            "main": {"path": getattr(sys.modules["__main__"], "__file__", None)} if context.main_by_value else None,
            "state": state.captured(set(needed)),
            "payload": payload.heading,
            "process": stream.getvalue(),
        }
        try:
            self._start(request, needed, [*payload.fds, *self._fds], context.workers)
        except (fork_server.NoServerError, OSError) as error:
            raise CannotStartError(str(error)) from error
        if not self._is_spawned:
            self.pid = self._forked(needed)
        context.started.append(self)
        self._context = None
        if len(context.started) == context.workers:  # before anything is drawn from the sampler
            for popen in context.started:
                popen.wait_until_ready()

    def _start(self, request: dict[str, Any], needed: list[str], given: list[int], workers: int) -> None:
        with contextlib.ExitStack() as closing:

            def until_started(fd: int) -> int:
                closing.callback(os.close, fd)
                return fd

            server = fork_server.of_this_process()
            safe = json.dumps([name for name in needed if name not in server.unsafe])
            request_fd = until_started(_in_memory(pickle.dumps(request)))
            modules_fd = until_started(_in_memory(safe.encode()))
            self._messages, messages_w = os.pipe2(os.O_CLOEXEC)
            until_started(messages_w)
            self.sentinel, sentinel_w = os.pipe2(os.O_CLOEXEC)
            until_started(sentinel_w)
            self.finalizer = util.Finalize(self, util.close_fds, (self._messages, self.sentinel))  # type: ignore[attr-defined]
            own = [request_fd, modules_fd, messages_w, tracker(), _alive_descriptor(), *_standard_streams()]
            if self._is_spawned:
                command = [os.fsencode(word) for word in boot.command("boot", *own, *given)]
                self.pid = util.spawnv_passfds(command[0], command, sorted({*own, *given, sentinel_w}))
            else:
                server.fork([sentinel_w, *own, *given], workers)

    def _forked(self, modules: Sequence[str]) -> int:
        """The process id, when the server has forked."""
        message = self._message()
        if "refused" in message:
            fork_server.of_this_process().avoid(modules)
            raise RefusedError(f"an import in the fork server opened {message['refused']}")
        if "pid" not in message:
            raise CannotStartError(message.get("failed", "the fork server ended"))
        return int(message["pid"])

    def wait_until_ready(self) -> None:
        """Come back when the worker has loaded what it was given.

        Raises:
            CannotStartError: it could not, and why.
        """
        message = self._message()
        if "ready" not in message:
            self.wait(5)
            raise CannotStartError(message.get("failed") or "the worker ended while it started")

    def _message(self) -> dict[str, Any]:
        """The next thing that the worker or the server says; nothing when nobody will say more."""
        while b"\n" not in self._said:
            got = os.read(self._messages, 4096)
            if not got:
                return {}
            self._said += got
        line, self._said = self._said.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        if "exit" in message:
            self.returncode = message["exit"]
            self.peak_bytes = message["peak"]
        return message

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The exit code, None while it runs; waits for it unless told not to."""
        if self._owner != os.getpid():  # a child that the program forks, which multiprocessing has wait at its exit
            return 255
        if self.returncode is not None:
            return self.returncode
        if not connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            return None
        if self._is_spawned:
            self._reap_child()
        while self.returncode is None:
            if not self._message():  # the server was killed, and its workers end with it
                self.returncode = 255
        return self.returncode

    def _send_signal(self, sig: int) -> None:
        # A child that the program forks has this object too, and multiprocessing ends workers when it exits.
        if self._owner == os.getpid():
            super()._send_signal(sig)  # type: ignore[misc]

    def _reap_child(self) -> None:
        try:
            _, status, usage = os.wait4(self.pid, 0)
        except ChildProcessError:  # somebody's waitpid(-1) was first
            self.returncode = 255
        else:
            self.returncode = os.waitstatus_to_exitcode(status)
            self.peak_bytes = usage.ru_maxrss * 1024


def _in_memory(data: bytes) -> int:
    """The descriptor of an anonymous file that holds data."""
    fd = memory_file("rocm-patch-request")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def tracker() -> int:
    """multiprocessing's tracker of semaphores, which a batch system's signals to all processes of a job would end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
    try:
        fd: Any = resource_tracker.getfd()
        return int(fd)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _standard_streams() -> tuple[int, int]:
    """Those of the program now: it may have redirected them since the server was started."""
    return (_open_or_null(1), _open_or_null(2))


def _open_or_null(fd: int) -> int:
    try:
        os.fstat(fd)
    except OSError:
        return _null()
    return fd


@functools.cache
def _null() -> int:
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


_alive: dict[int, tuple[int, int]] = {}


def _alive_descriptor() -> int:
    """The read end of a pipe that nobody writes to, at its end when this process has ended."""
    pid = os.getpid()
    if pid not in _alive:
        _alive[pid] = os.pipe2(os.O_CLOEXEC)
    return _alive[pid][0]

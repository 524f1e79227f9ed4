"""The program's end of its fork server: started once, asked for workers."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rocm_patch.settings import LOGGER
from rocm_patch.workers import boot, server
from rocm_patch.workers.descriptors import end_of_this_process

# Of the libraries that numpy and others multiply matrices with; each worker would take all cores.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


class NoServerError(RuntimeError):
    """The fork server cannot serve, and why."""


@dataclass
class ForkServer:
    """One server, for one process: a forked child starts one of its own.

    Attributes:
        owner: the process that it belongs to.
        unsafe: modules that it must not import, since they touch the GPU.
    """

    owner: int = field(default_factory=os.getpid)
    unsafe: set[str] = field(default_factory=set)
    _process: subprocess.Popen[bytes] | None = None
    _control: socket.socket | None = None
    _identity: tuple[Any, ...] = ()
    _kept_open: int | None = None
    _retired: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, workers: int = 1) -> None:
        """Start it unless it runs; comes back at once, the server imports torch beside the program.

        Nothing is raised: whoever asks for a worker later is told.

        Args:
            workers: how many share the cores.
        """
        with self._lock:
            try:
                self._start(workers)
            except OSError as error:
                LOGGER.debug("no fork server: %s", error)

    def _start(self, workers: int) -> None:
        identity = (os.getresuid(), os.getresgid(), os.getgroups())
        if self._process is not None and self._process.poll() is None and self._identity == identity:
            return
        self._retire()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            parent = end_of_this_process()
        except OSError:  # an older kernel: the end that is written to is this process's, and its forks'
            parent, self._kept_open = os.pipe2(os.O_CLOEXEC)
        threads = str(max(1, len(os.sched_getaffinity(0)) // max(1, workers)))
        environ = {**dict.fromkeys(_THREAD_VARIABLES, threads), **os.environ}
        try:
            self._process = subprocess.Popen(
                boot.command("server", theirs.fileno(), parent),
                stdin=subprocess.DEVNULL, cwd=_folder(), pass_fds=(theirs.fileno(), parent), env=environ,
                start_new_session=True,  # signals to the program's process group are the program's
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(parent)
        self._control, self._identity = ours, identity
        LOGGER.debug("fork server %d starts", self._process.pid)

    @property
    def pid(self) -> int | None:
        """Its process, if it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def fork(self, fds: Sequence[int], workers: int) -> None:
        """Ask for a worker; the answers come through its `messages` descriptor.

        Args:
            fds: a sentinel, closed when the worker has ended; those of `boot.STANDARD`; the worker's own.
            workers: how many the loader has.

        Raises:
            NoServerError: it cannot be reached.
        """
        if len(fds) > server.MOST_FDS:
            raise NoServerError(f"the dataset asks for {len(fds)} descriptors")
        with self._lock:
            for last in (False, True):
                try:
                    self._start(workers)
                    assert self._control is not None
                    socket.send_fds(self._control, [b"fork"], list(fds))
                except OSError as error:
                    self._retire()
                    if last:
                        raise NoServerError(f"the fork server cannot be reached ({error.strerror})") from error
                else:
                    return

    def avoid(self, modules: Iterable[str]) -> None:
        """Start afresh without these modules, one of which touched the GPU."""
        with self._lock:
            self.unsafe |= set(modules)
            self._retire()

    def retire(self) -> None:
        """Ask it for no more workers; it ends when those that it has have ended."""
        with self._lock:
            self._retire()

    def _retire(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._retired.append(self._process)
            self._process = None
        self._retired = [process for process in self._retired if process.poll() is None]

    def stop(self) -> None:
        """End it and its workers."""
        if self.owner != os.getpid():  # a forked child: they are its parent's
            return
        with self._lock:
            self._retire()
            for process in self._retired:
                with contextlib.suppress(PermissionError):  # the program has become somebody else; it ends by itself
                    process.terminate()
            for process in self._retired:
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(PermissionError):
                        process.kill()
            self._retired = []


def _folder() -> str:
    """The program's folder, where it has not been deleted."""
    try:
        return os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return "/"


_server = ForkServer()


def of_this_process() -> ForkServer:
    """The server of this process."""
    global _server
    if _server.owner != os.getpid():
        _server = ForkServer()  # a forked child: the other's socket is its parent's
        atexit.register(_server.stop)
    return _server


atexit.register(_server.stop)

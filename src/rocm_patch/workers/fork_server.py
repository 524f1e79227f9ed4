"""The program's end of its fork server: started once, asked for workers."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rocm_patch.settings import LOGGER
from rocm_patch.workers import boot, server

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
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, workers: int = 1) -> None:
        """Start it unless it runs; comes back at once, the server imports torch beside the program.

        Args:
            workers: how many share the cores.
        """
        with self._lock:
            self._start(workers)

    def _start(self, workers: int) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.pidfd_open(os.getpid())
        threads = str(max(1, len(os.sched_getaffinity(0)) // max(1, workers)))
        environ = {**dict.fromkeys(_THREAD_VARIABLES, threads), **os.environ}
        try:
            self._process = subprocess.Popen(
                boot.command("server", theirs.fileno(), parent),
                stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), parent), env=environ,
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(parent)
        self._control = ours
        LOGGER.debug("fork server %d starts", self._process.pid)

    @property
    def pid(self) -> int | None:
        """Its process, if it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def fork(self, fds: Sequence[int], modules: Iterable[str], workers: int) -> None:
        """Ask for a worker; the answers come through its `messages` descriptor.

        Args:
            fds: a sentinel, closed when the worker has ended; those of `boot.STANDARD`; the worker's own.
            modules: what to import before.
            workers: how many the loader has.

        Raises:
            NoServerError: it cannot be reached.
        """
        if len(fds) > server._MOST_FDS:
            raise NoServerError(f"the dataset asks for {len(fds)} descriptors")
        asked = json.dumps({"modules": sorted(set(modules) - self.unsafe)}).encode()
        with self._lock:
            for last in (False, True):
                self._start(workers)
                assert self._control is not None
                try:
                    socket.send_fds(self._control, [asked], list(fds))
                except OSError as error:
                    if last:
                        raise NoServerError(f"the fork server cannot be reached ({error.strerror})") from error
                    self._stop()
                else:
                    return

    def avoid(self, modules: Iterable[str]) -> bool:
        """Start afresh without these modules, one of which touched the GPU; False if none of them was new."""
        with self._lock:
            new = set(modules) - self.unsafe
            self.unsafe |= new
            self._stop()
        return bool(new)

    def stop(self) -> None:
        """End it and its workers."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            for end in (None, signal.SIGTERM, signal.SIGKILL):
                if end is not None:
                    self._process.send_signal(end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.2)
                    break
            self._process = None


_server = ForkServer()


def of_this_process() -> ForkServer:
    """The server of this process."""
    global _server
    if _server.owner != os.getpid():
        _server = ForkServer()  # a forked child: the other's socket is its parent's
        atexit.register(_server.stop)
    return _server


atexit.register(_server.stop)

"""The fork server: a process that has imported torch, has never touched a GPU, and forks into workers.

The idea is multiprocessing.forkserver's. This one imports what a loader's dataset needs before it forks, never the
main script; says what ended a worker and how much memory it had; and ends its workers with the program.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rocm_patch.workers import boot

MOST_FDS = 250  # SCM_RIGHTS takes 253
# What torch's loop imports in a worker where it is there, and what nearly every image dataset does.
_PRELOADED = (
    "numpy", "numpy.random", "PIL.Image", "hmac", "torch.utils._device", "multiprocessing.queues",
    "multiprocessing.synchronize", "multiprocessing.resource_sharer",
)  # fmt: skip
_GPU_DEVICES = ("/dev/kfd", "/dev/dri/", "/dev/nvidia", "/dev/dxg")


def gpu_descriptors(pid: str | int = "self") -> list[str]:
    """The GPU device files that a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed
            found.append(str(entry.readlink()))
    return sorted({path for path in found if path.startswith(_GPU_DEVICES)})


def main(control: int, parent: int) -> None:
    """Serve until the program ends.

    Args:
        control: the descriptor of a socket (SOCK_SEQPACKET) that requests come through.
        parent: one that is readable when the program has ended.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what the program blocks, SIGCHLD perhaps, is blocked here
    with _quiet():
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        if "PIL.Image" in sys.modules:
            sys.modules["PIL.Image"].preinit()  # imports the common formats, as the first image opened would
        from rocm_patch.workers import loop  # noqa: F401

    gc.freeze()  # a worker's collections leave the pages of what was imported alone
    gc.enable()
    _Server(socket.socket(fileno=control), parent).run()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What modules print when they are imported, they have printed in the program."""
    before = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


class _Server:
    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._parent = parent
        self._is_retired = False
        self._workers: dict[int, tuple[int, int]] = {}  # pid: messages, sentinel
        self._woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._own = [self._woken, wake, parent]
        self._before = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for fd in (self._control, self._parent, self._woken):
                selector.register(fd, selectors.EVENT_READ)
            while not self._is_retired or self._workers:
                ready = {key.fd for key, _ in selector.select()}
                if self._woken in ready:
                    self._reap()
                if self._parent in ready:
                    self._end()
                if self._control.fileno() in ready:
                    message, fds, *_ = socket.recv_fds(self._control, 16, MOST_FDS, socket.MSG_CMSG_CLOEXEC)
                    if message:
                        self._fork(fds, selector)
                    else:  # no more workers are wanted; those that there are go on
                        self._is_retired = True
                        selector.unregister(self._control)

    def _fork(self, fds: list[int], selector: selectors.BaseSelector) -> None:
        sentinel, *given = fds
        messages, modules = (given[boot.STANDARD.index(name)] for name in ("messages", "modules"))
        with open(modules, "rb", closefd=False) as file, _quiet():
            for name in json.load(file):
                if name not in sys.modules:
                    # Whatever it raises, the worker meets the same where it is somebody's.
                    with contextlib.suppress(BaseException):
                        importlib.import_module(name)
        touched = gpu_descriptors()
        if touched:
            boot.say(messages, refused=", ".join(touched))
            _close(fds)
            return
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, no memory
            boot.say(messages, failed=f"the fork server cannot fork: {error.strerror}")
            _close(fds)
            return
        if pid == 0:
            code = 1
            try:
                boot.say(messages, pid=os.getpid())
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, self._before)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                selector.close()
                self._control.close()
                _close([*self._own, sentinel, *(fd for pair in self._workers.values() for fd in pair)])
                code = boot.serve(given)
            except BaseException:  # noqa: BLE001  (a worker's end must not become the server's)
                sys.excepthook(*sys.exc_info())
            finally:
                boot.util._flush_std_streams()  # type: ignore[attr-defined]
                os._exit(code)
        self._workers[pid] = (messages, sentinel)
        _close([fd for fd in given if fd != messages])

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            messages, sentinel = self._workers.pop(pid, (-1, -1))
            if messages >= 0:
                boot.say(messages, exit=os.waitstatus_to_exitcode(status), peak=usage.ru_maxrss * 1024)
                _close([messages, sentinel])

    def _end(self) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        os._exit(0)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)

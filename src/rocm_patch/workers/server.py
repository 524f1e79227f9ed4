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
from pathlib import Path
from typing import Any

from rocm_patch.workers import boot

_MOST_FDS = 250  # SCM_RIGHTS takes 253
_MOST_BYTES = 1 << 18  # a socket's buffer, socket(7)
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
        parent: one (a pidfd) that is readable when the program has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program

    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "PIL.Image" in sys.modules:
        sys.modules["PIL.Image"].preinit()  # imports the common formats, which the first image opened does otherwise
    from rocm_patch.workers import loop  # noqa: F401

    gc.freeze()  # a worker's collections leave the pages of what was imported alone
    gc.enable()
    _Server(socket.socket(fileno=control), parent).run()


class _Server:
    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._parent = parent
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
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self._woken in ready:
                    self._reap()
                if self._parent in ready:
                    self._end()
                if self._control.fileno() in ready:
                    message, fds, *_ = socket.recv_fds(self._control, _MOST_BYTES, _MOST_FDS)
                    if not message:
                        self._end()
                    self._fork(json.loads(message), fds, selector)

    def _fork(self, asked: dict[str, Any], fds: list[int], selector: selectors.BaseSelector) -> None:
        sentinel, *given = fds
        messages = given[boot.STANDARD.index("messages")]
        for name in asked["modules"]:
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # the worker meets the same error where it is somebody's
                    importlib.import_module(name)
        touched = gpu_descriptors()
        if touched:
            boot.say(messages, refused=", ".join(touched))
            _close(fds)
            return
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
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
        boot.say(messages, pid=pid)
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

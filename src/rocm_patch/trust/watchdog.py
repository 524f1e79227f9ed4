"""A thread that notices convolutions which do not come back.

Three kinds, from sure to less sure: an unproven call, whose beginning and end the guard reports; a proven call that
does not return to Python; and a GPU that stands still after a proven call, which may as well be the fault of
whatever the program started next.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

from rocm_patch.settings import LOGGER
from rocm_patch.trust.progress import Limits, Patience

# How far up a thread's stack the convolution may lie: fault injection and torch's own frames come first.
_DEPTH = 8
# A GPU may have minutes of other work before it: the limit is this many times longer where nothing is certain.
_LENIENT = 3


@dataclass(frozen=True)
class Hang:
    """What the watchdog saw.

    Attributes:
        number: the journal's number of the call; 0 for the one in flight under the guard.
        why: how long, and without what.
        stack: the Python stack of the thread, innermost call last.
        is_certain: whether the call itself was seen not to return.
        is_gpus: whether it is the GPU that stands still, so that any call before may have been the one.
    """

    number: int
    why: str
    stack: str
    is_certain: bool
    is_gpus: bool = False


class Watchdog:
    """Watches the convolutions of this process.

    Args:
        limits: how long a call may take.
        caches: folders whose growth counts as progress.
        inside: code objects of the functions that proven calls run in.
        started: says (count of convolutions started so far, number of the last one).
        gpu: makes a probe of the GPU: a function that says whether all that was queued before has been done; None
            where there is no GPU to ask.
        on_hang: called with each hang, once per call.
        on_idle: called about once a second.
    """

    def __init__(
        self,
        limits: Limits,
        caches: Sequence[Path],
        inside: frozenset[CodeType],
        started: Callable[[], tuple[int, int]],
        gpu: Callable[[], Callable[[], bool] | None],
        on_hang: Callable[[Hang], None],
        on_idle: Callable[[], None],
    ) -> None:
        self._limits, self._caches, self._inside = limits, caches, inside
        self._started, self._gpu, self._on_hang, self._on_idle = started, gpu, on_hang, on_idle
        # The unproven call in flight: its thread, how long it has been, whether it waits for the GPU.
        self._guarded: tuple[int, Patience] | None = None
        self._waits = False
        # How many threads are doing what takes its time and is watched by others: the sandbox, comparing.
        self._away = 0
        self._reported: object = None
        # The proven call that some thread is in: the thread, what identifies the call, how long it has been.
        self._proven: tuple[tuple[int, int, int], Patience] | None = None
        self._count = -1
        self._still: Patience | None = None
        self._probe: Callable[[], bool] | None = None
        self._tick = min(1.0, limits.still / 8)
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="rocm-patch watchdog", daemon=True).start()

    def begin(self) -> None:
        """The calling thread begins an unproven call."""
        patience = Patience(self._limits, os.getpid(), self._caches)
        self._waits = False
        self._guarded = (threading.get_ident(), patience)

    def waits_for_gpu(self) -> None:
        """That call has returned, and its thread waits for the GPU to finish."""
        if self._guarded is not None:
            self._guarded[1].restart()
        self._waits = True

    def end(self) -> None:
        """That call is over."""
        self._guarded = None

    def leave(self) -> None:
        """The calling thread turns, within a convolution, to what is none."""
        self._away += 1

    def come_back(self) -> None:
        """It is back."""
        self._away -= 1

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._tick):
            try:
                self._look()
            except RuntimeError as error:  # of a GPU whose context is lost: the program hears of it by itself
                LOGGER.debug("the watchdog cannot look: %s", error)

    def _look(self) -> None:
        guarded = self._guarded
        if guarded is not None:
            self._look_at_guarded(*guarded)
        elif self._away:
            self._proven = self._still = self._probe = None
        else:
            self._look_at_threads()
            self._look_at_gpu()
            self._on_idle()

    def _look_at_guarded(self, thread: int, patience: Patience) -> None:
        why = patience.lost(waits_for_gpu=self._waits)
        if why and self._reported is not patience:
            self._reported = patience
            doing = "waiting for the GPU, " if self._waits else ""
            self._on_hang(Hang(0, doing + why, _stack(sys._current_frames().get(thread)), True))

    def _look_at_threads(self) -> None:
        count, number = self._started()
        for thread, frame in sys._current_frames().items():
            found = self._convolution_in(frame)
            if found is None:
                continue
            key = (thread, id(found), count)
            if self._proven is None or self._proven[0] != key:
                self._proven = (key, Patience(self._limits, os.getpid(), self._caches))
                return
            why = self._proven[1].lost()
            if why and number and self._reported != key:
                self._reported = key
                self._on_hang(Hang(number, why, _stack(frame), True))
            return
        self._proven = None

    def _convolution_in(self, frame: FrameType | None) -> FrameType | None:
        for _ in range(_DEPTH):
            if frame is None:
                return None
            if frame.f_code in self._inside:
                return frame
            frame = frame.f_back
        return None

    def _look_at_gpu(self) -> None:
        """Once no convolution has been started for half the limit, ask the GPU whether it has done the last one.

        The answer is waited for three times the limit; work that was queued later does not matter to it.
        """
        count, number = self._started()
        if count != self._count:
            self._count, self._probe = count, None
            self._still = Patience(Limits(self._limits.still / 2, self._limits.busy), os.getpid())
            return
        if not number or self._still is None or self._proven is not None:
            return
        if self._probe is None:
            if self._still.lost(waits_for_gpu=True):
                self._probe = self._gpu()
                lenient = Limits(self._limits.still * _LENIENT, self._limits.busy * _LENIENT)
                self._still = None if self._probe is None else Patience(lenient, os.getpid())
        elif self._probe():
            self._still = self._probe = None  # done: nothing more to ask until the next convolution
        elif (why := self._still.lost(waits_for_gpu=True)) is not None:
            self._still = self._probe = None
            main = sys._current_frames().get(threading.main_thread().ident or 0)
            self._on_hang(Hang(number, f"the GPU has not finished what was queued: {why}", _stack(main), False, True))


def _stack(frame: FrameType | None) -> str:
    return "".join(traceback.format_stack(frame)[-12:]).rstrip() if frame is not None else ""

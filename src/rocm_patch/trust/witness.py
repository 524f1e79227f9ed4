"""The witness of this process's convolutions: a journal for the process after it, a watchdog for itself."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import util as multiprocessing_util
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from rocm_patch.conv.spec import ConvSpec
from rocm_patch.settings import LOGGER
from rocm_patch.trust import progress
from rocm_patch.trust.journal import EXIT_HUNG, LAUNCH_VARIABLE, RESTART_VARIABLE, Journal
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.remains import MOST_SUSPECTS
from rocm_patch.trust.store import Verdict
from rocm_patch.trust.verdicts import Verdicts
from rocm_patch.trust.watchdog import Hang, Watchdog

_Pair = tuple[ConvSpec, str]


class Witness:
    """Knows at any moment which convolution this process is in, and says so when it does not come back.

    Args:
        verdicts: where a hang is entered.
        folder: where journals lie; None for a witness that looks away.
        limits: how long a call may take.
        inside: code objects of the functions that proven calls run in.
        environ: says whether the program runs under `rocm-patch run --restart`.

    Attributes:
        slots: the journal's numbers; `slots[0]` is that of the last proven call that was started.
        count: how many convolutions have been started.
        on_idle: called about once a second while nothing is being tried.
        on_fork: called in a forked child, where numbers that were handed out are the parent's.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        folder: Path | None,
        limits: Limits,
        inside: frozenset[CodeType] = frozenset(),
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._verdicts, self._folder, self._limits = verdicts, folder, limits
        self._inside, self._environ = inside, environ
        # Without a journal a number goes where nobody looks.
        self.slots: Any = [0, 0]
        self.count = 0
        self.on_idle: Callable[[], None] = lambda: None
        self.on_fork: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._journal: Journal | None = None
        self._watchdog: Watchdog | None = None
        self._pairs: dict[int, tuple[_Pair, ...]] = {}
        self._in_flight: _Pair | None = None
        self._reported: _Pair | None = None
        self._device = "cpu"
        if folder is not None:
            _forget_in_children(self)

    @property
    def looks(self) -> bool:
        """Whether it is a witness at all."""
        return self._folder is not None

    def number(self, *pairs: _Pair) -> int:
        """The number that stands for a proven call, or for several that are made as one; 0 where nobody looks."""
        if not self.looks:
            return 0
        with self._lock:
            journal = self._open()
            number = 0 if journal is None else journal.number([self._verdicts.call(*pair) for pair in pairs])
            if number:
                self._pairs[number] = pairs
            self._device = pairs[0][0].device
            return number

    @contextmanager
    def away(self) -> Iterator[None]:
        """The calling thread is in a convolution, but not at its work: what it does may take its time."""
        self._open()
        watchdog = self._watchdog
        if watchdog is None:
            yield
            return
        watchdog.leave()
        try:
            yield
        finally:
            watchdog.come_back()

    @contextmanager
    def attempt(self, spec: ConvSpec, strategy: str) -> Iterator[Callable[[], None]]:
        """An unproven call, one at a time; gives a function to be called once it only waits for the GPU."""
        journal, watchdog = self._open(), self._watchdog
        self.count += 1
        if journal is None or watchdog is None:
            yield lambda: None
            return
        self._in_flight = (spec, strategy)
        try:
            with journal.attempt(self._verdicts.call(spec, strategy)):
                watchdog.begin()
                try:
                    yield watchdog.waits_for_gpu
                finally:
                    watchdog.end()
        finally:
            if self._reported == (spec, strategy):
                LOGGER.warning("%s of %s has come back after all: it was slow, and does not hang", strategy, spec)
                self._verdicts.withdraw(spec, strategy)
                self._reported = None

    def ask_for_restart(self, why: str) -> bool:
        """Tell `rocm-patch run --restart`, if that is what runs this program; False if not."""
        path = self._environ.get(RESTART_VARIABLE)
        if not path:
            return False
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(" ".join(why.split()) + "\n")
        except OSError as error:
            LOGGER.warning("cannot ask for a restart: %s", error)
            return False
        return True

    def close(self) -> None:
        """A clean end: nothing is left to be looked at."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        if self._journal is not None:
            journal, self._journal, self.slots = self._journal, None, [0, 0]
            journal.close()

    def _open(self) -> Journal | None:
        """The journal and the watchdog of this process, made at the first need."""
        with self._lock:
            return self._opened()

    def _opened(self) -> Journal | None:
        if self._journal is None and self._folder is not None:
            try:
                self._journal = Journal(self._folder, self._environ.get(LAUNCH_VARIABLE, ""))
            except OSError as error:
                LOGGER.warning(
                    "cannot keep a record of unproven calls in %s: %s; a crash will not be remembered\n"
                    "hint: free space there, or name another folder with ROCM_PATCH_CACHE_DIR",
                    self._folder, error,
                )  # fmt: skip
                self._folder = None
                return None
            self.slots = self._journal.slots
            # multiprocessing's children end without atexit, through its own finalizers.
            atexit.register(self.close)
            multiprocessing_util.Finalize(None, self.close, exitpriority=0)
            self._watchdog = Watchdog(
                self._limits, progress.caches(self._environ), self._inside, lambda: (self.count, self.slots[0]),
                self._gpu_probe, self._on_hang, lambda: self.on_idle(),
            )  # fmt: skip
        return self._journal

    def _gpu_probe(self) -> Callable[[], bool] | None:
        """A mark behind all that the GPU has been given so far, which says whether it has been reached."""
        if not self._device.startswith("cuda"):
            return None
        with torch.cuda.device(self._device):
            mark: Any = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
            mark.record(torch.cuda.default_stream(self._device))
        return lambda: bool(mark.query())

    def _on_hang(self, hang: Hang) -> None:
        pairs = self._pairs.get(hang.number, ()) if hang.number else (self._in_flight,)
        known = [pair for pair in pairs if pair is not None]
        evidence = "\n".join(part for part in (hang.why, hang.stack) if part)
        # Ranks wait for each other: a GPU that stands still, or takes no more work, may wait for another rank's.
        # An unproven call has the GPU to itself.
        has_ranks = self._environ.get("WORLD_SIZE", "1") not in ("", "0", "1") or _is_distributed()
        is_certain = hang.is_certain and (not hang.number or not has_ranks)
        suspects = known
        if hang.is_gpus and not has_ranks:
            made = (pair for pairs in list(self._pairs.values()) for pair in pairs)
            suspects = list(dict.fromkeys(made))[-MOST_SUSPECTS:]
        for spec, strategy in suspects:
            if is_certain:
                self._verdicts.enter(spec, strategy, Verdict("hang", evidence=evidence))
            else:
                self._verdicts.suspect(spec, strategy, evidence)
        if not hang.number:
            self._reported = self._in_flight
        names = "; ".join(f"{strategy} of {spec}" for spec, strategy in known)
        what = "a convolution hangs" if is_certain else "the GPU stands still; the last convolution was"
        LOGGER.error(
            "%s: %s\n%s\nhint: end this program and start it again as `rocm-patch run --conv bypass ...`, or use "
            "`rocm-patch run --restart ...`, which does so by itself",
            what, names, evidence,
        )  # fmt: skip
        if (is_certain or not has_ranks) and self.ask_for_restart(f"hang: {names}"):
            _flush()
            os._exit(EXIT_HUNG)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        if self._journal is not None:
            self._journal.let_parent_have_faults()
            self._journal.abandon()
        self._journal = self._watchdog = self._in_flight = None
        self._pairs, self.slots = {}, [0, 0]
        for listener in self.on_fork:
            listener()


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _flush() -> None:
    """What the program has printed, unless the thread that hangs holds the stream."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(1.0)


def _forget_in_children(witness: Witness) -> None:
    """In a forked child the journal, its lock and the thread are the parent's."""
    reference = weakref.ref(witness)

    def forget() -> None:
        found = reference()
        if found is not None:
            found._forget()

    os.register_at_fork(after_in_child=forget)

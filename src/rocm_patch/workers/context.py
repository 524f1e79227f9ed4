"""How a loader's workers start with us: a multiprocessing context per loader, whose processes share one payload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing import context as mp_context
from multiprocessing import process
from typing import Any

from rocm_patch.workers import loop, popen
from rocm_patch.workers.buffers import Snapshots
from rocm_patch.workers.payload import Payload
from rocm_patch.workers.pickling import Trial, handing_descriptors_to


class Context(mp_context.BaseContext):
    """The workers of one loader.

    Args:
        method: `forkserver`, `spawn` (a new interpreter each) or `fork`.
        main_by_value: whether what the main script defines travels by value; else workers import the script again.
        shared: what all workers get: the dataset and the loader's functions.
        workers: how many there will be.
        snapshots: of the dataset's large buffers.
    """

    def __init__(
        self,
        method: str,
        *,
        main_by_value: bool = False,
        shared: Sequence[Any] = (),
        workers: int = 1,
        snapshots: Snapshots | None = None,
    ) -> None:
        self._name = method
        self.main_by_value = main_by_value
        self.shared = list(shared)
        self.workers = workers
        self.started: list[popen.Popen] = []
        self._snapshots = snapshots if snapshots is not None else Snapshots()
        self._payload: Payload | None = None
        self._once = loop.Once()
        if method != "fork":
            popen.tracker()  # before a queue's locks start it

    def payload(self) -> Payload:
        """The shared objects, pickled: once for all workers where that can be.

        Raises:
            Exception: whatever pickling them raises.
        """
        made = self._payload
        self._payload = None
        if made is None:
            made = Payload(self.shared, self._snapshots, main_by_value=self.main_by_value)
        if not made.is_for_one:
            self._payload = made
        return made

    def pickles(self, obj: Any) -> None:
        """Pickle one of the shared objects into nothing.

        Raises:
            Exception: whatever pickling it raises.
        """
        with handing_descriptors_to(_Nobody()):
            Trial(main_by_value=self.main_by_value).dump(obj)

    def prepare(self) -> None:
        """Pickle the shared objects now, before anything is started."""
        if self._name != "fork":
            self._payload = self.payload()

    def finished(self) -> None:
        """All workers have been started: what was made for them can go, at once and not when a cycle is collected."""
        self._payload = None
        self.shared = []
        self.started = []
        self._snapshots = Snapshots()

    def abandon(self) -> None:
        """End the workers that have been started: another could not be."""
        for worker in self.started:
            worker.terminate()
        self.started = []

    def Process(self, *, target: Callable[..., Any], args: Sequence[Any] = ()) -> Any:
        """A process that runs torch's loop, started in this context's way."""
        surrounded = (target, self._once, *args)
        if self._name == "fork":
            return _ForkedWorker(target=loop.worker_loop, args=surrounded)
        made = Worker(target=loop.worker_loop, args=surrounded)
        made.context = self
        return made


class _Nobody:
    """What multiprocessing hands descriptors to when nothing is started."""

    @staticmethod
    def duplicate_for_child(fd: int) -> int:
        return fd

    DupFd = staticmethod(int)


class _ForkedWorker(mp_context.ForkProcess):
    """A forked worker whose process object torch may take for any other."""


class Worker(process.BaseProcess):
    """A worker process; pickled, it is what the worker itself sees."""

    context: Context | None = None
    _start_method = None  # what the program has set holds in the worker too

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("context", "_popen")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values, _popen=None)

    @staticmethod
    def _Popen(process_obj: Worker) -> popen.Popen:
        assert process_obj.context is not None
        return popen.Popen(process_obj, process_obj.context)

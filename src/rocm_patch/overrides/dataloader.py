"""How loaders' workers start, and what is said when one of them ends.

What breaks under fork is a child that touches the GPU after its parent did: torch refuses
("Cannot re-initialize CUDA in forked subprocess"), and the ROCm runtime's handles do not survive a fork.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import numbers
import os
import resource
from collections import defaultdict
from typing import Any

import torch.utils.data
import torch.utils.data.dataloader

from rocm_patch.errors import RocmPatchError
from rocm_patch.overrides.ledger import LEDGER, Entry, replace
from rocm_patch.overrides.loader_workers import CONTEXT, CannotTravelError, attempts, started
from rocm_patch.settings import LOADER_METHODS, LOGGER, check
from rocm_patch.workers import culprit, death, fork_server

PATCH = "dataloader"
_OURS = "_rocm_patch_start_method"
# Batches on their way hold descriptors; 1024, the usual limit, is soon used up.
_FEW_FILES, _OPEN_FILES = 4096, 65536
# How often a worker's end is looked for while its batch is waited for.
_TICK_SECONDS = 0.5


class WorkerStartError(RocmPatchError, RuntimeError):
    """Workers cannot start in the way that was asked for (also a `RuntimeError`)."""


def install(start_method: str = "spawn", *, persistent: bool = True) -> Entry:
    """Start the workers of loaders whose caller said nothing of that, and keep them, where the caller said nothing.

    Args:
        start_method: `spawn`, `forkserver`, `fork`, or `auto`: by the fork server, and by fork, with a note, where
            that cannot be.
        persistent: whether workers are kept between epochs. Kept workers don't see a dataset that changes between
            epochs, so `auto` and the launcher leave this to the program.
    """
    check("start_method", start_method, LOADER_METHODS)
    persistent = persistent and start_method != "auto"
    arguments = (start_method, persistent)
    with LEDGER.lock:
        before = LEDGER.already(PATCH, arguments)
        if before is not None:
            return before
        supplied: dict[str, Any] = {}
        if start_method != "auto":
            supplied["multiprocessing_context"] = start_method
        if persistent:
            supplied["persistent_workers"] = True
        loader = torch.utils.data.DataLoader
        iterator: Any = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
        undo = [
            replace(loader, "__init__", _supplying(loader.__init__, start_method, supplied)),
            replace(loader, "_get_iterator", _starting(loader._get_iterator, start_method)),
            replace(iterator, "_try_get_data", _watching(iterator._try_get_data)),
            replace(iterator, "_shutdown_workers", _in_its_own_process(iterator._shutdown_workers)),
            # Of an iterator whose workers could not start: torch sets it when they have, and asks for it at the end.
            replace(iterator, "_workers_status", defaultdict(bool)),
            fork_server.of_this_process().retire,
        ]
        given = ", ".join(f"{name}={value!r}" for name, value in supplied.items())
        why = f"loaders with workers get {given}" if given else "loaders' workers come from a fork server"
        return LEDGER.record(PATCH, arguments, Entry(True, why), *undo)


def _supplying(original: Any, start_method: str, supplied: dict[str, Any]) -> Any:
    """`DataLoader.__init__` with defaults for what the caller leaves out, positional arguments included."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def rocm_patch_dataloader_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # let the original say what is wrong with the call
            given = {}
        workers = given.get("num_workers", 0)
        has_workers = isinstance(workers, numbers.Integral) and int(workers) > 0
        if has_workers:
            added = {name: value for name, value in supplied.items() if name not in given}
            kwargs.update(added)
            vars(self)[_OURS] = "multiprocessing_context" in added
        original(self, *args, **kwargs)
        if has_workers and self.multiprocessing_context is None and start_method in ("auto", "forkserver"):
            fork_server.of_this_process().start(int(workers))  # it imports torch while the program goes on

    return rocm_patch_dataloader_init


def _starting(original: Any, start_method: str) -> Any:
    """`DataLoader._get_iterator` that starts workers in our ways, one after the other until one works."""

    @functools.wraps(original)
    def rocm_patch_get_iterator(self: Any) -> Any:
        if self.num_workers == 0:
            return original(self)
        _allow_open_files()
        asked = vars(self)[CONTEXT]
        ways = list(attempts(asked, start_method, is_ours=bool(vars(self).get(_OURS))))
        if not ways:
            method = asked.get_start_method() if asked is not None else multiprocessing.get_start_method()
            LEDGER.note(PATCH, f"{_described(self)} start by {method}, as was asked for")
            return _naming_what_cannot_be_pickled(self, original)
        reasons: list[str] = []
        for attempt in ways:
            if attempt.method == "fork":
                _say_once(type(self.dataset).__qualname__, reasons[-1] if reasons else "")
            try:
                iterator = started(self, original, attempt)
            except CannotTravelError as error:
                reasons.append(str(error))
            else:
                because = f", since {_first_line(reasons[-1])}" if reasons else ""
                LEDGER.note(PATCH, f"{_described(self)} {attempt}{because}")
                return iterator
        raise WorkerStartError(
            f"cannot start workers by {ways[0].method}: {reasons[0]}",
            "mend what is named, or choose fork for this loader if its workers leave the GPU alone: "
            "multiprocessing_context='fork'",
        )

    return rocm_patch_get_iterator


def _naming_what_cannot_be_pickled(loader: Any, original: Any) -> Any:
    """The original; where pickling fails, which part of what the loader sends it is."""
    try:
        return original(loader)
    except culprit.pickle_errors() as error:
        method = loader.multiprocessing_context
        if method is None or method.get_start_method() == "fork":
            raise
        for name in ("dataset", "collate_fn", "worker_init_fn"):
            found = culprit.find(getattr(loader, name), name)
            if found is not None:
                raise type(error)(f"{error}\n{found}") from error
        raise


def _watching(original: Any) -> Any:
    """`_MultiProcessingDataLoaderIter._try_get_data` that looks for dead workers often, and says what ended them."""

    @functools.wraps(original)
    def rocm_patch_try_get_data(self: Any, timeout: float = 5.0) -> Any:
        left = float(timeout)
        try:
            while left > _TICK_SECONDS:
                success, data = original(self, _TICK_SECONDS)
                if success:
                    return success, data
                left -= _TICK_SECONDS
            return original(self, left)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            dead = [worker for worker in self._workers if not worker.is_alive() and worker.exitcode]
            before = getattr(self, "_rocm_patch_oom_kills", None)
            told = "\n".join(death.described(worker, before) for worker in dead)
            raise RuntimeError(f"{error}\n{told}" if told else str(error)) from error

    return rocm_patch_try_get_data


def _in_its_own_process(original: Any) -> Any:
    """`_MultiProcessingDataLoaderIter._shutdown_workers` that leaves the workers of a process's parent alone.

    A child that the program forks has the iterator too, and would tell the workers to end when it exits itself.
    """

    @functools.wraps(original)
    def rocm_patch_shutdown_workers(self: Any) -> None:
        if all(worker._parent_pid == os.getpid() for worker in getattr(self, "_workers", ())):
            original(self)

    return rocm_patch_shutdown_workers


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < min(wanted, _FEW_FILES):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        LOGGER.debug("open files allowed: %d instead of %d, for batches that wait", wanted, soft)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])


def _described(loader: Any) -> str:
    kind = type(loader.dataset)
    return f"workers of {type(loader).__qualname__} over {kind.__module__}.{kind.__qualname__}"


@functools.lru_cache(maxsize=256)
def _say_once(dataset: str, why: str) -> None:
    LOGGER.warning(
        "the workers of a loader over %s are forked: %s\nforked workers are safe as long as they leave the GPU alone",
        dataset,
        why,
    )

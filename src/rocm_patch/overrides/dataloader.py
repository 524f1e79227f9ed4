"""DataLoader workers that start fresh instead of being forked.

What breaks under fork is a child that touches the GPU after its parent did: torch refuses
("Cannot re-initialize CUDA in forked subprocess"), and the ROCm runtime's handles do not survive a fork.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import pickle
from typing import Any

import torch.utils.data

from rocm_patch.overrides.ledger import LEDGER, Entry, replace
from rocm_patch.settings import LOGGER, START_METHODS, check
from rocm_patch.workers.main_script import why_not_importable_again

PATCH = "dataloader"
# Marks a loader whose start method is ours and not the caller's.
_OURS = "_rocm_patch_start_method"


def install(start_method: str = "spawn", *, persistent: bool = True, may_yield: bool = False) -> Entry:
    """Give loaders that use workers a start method, and keep their workers, unless the caller said otherwise.

    Args:
        start_method: how their workers start.
        persistent: whether workers are kept between epochs. Kept workers don't see a dataset that changes
            between epochs, so the launcher leaves this to the program.
        may_yield: whether a loader whose workers cannot start so goes back to how they start without us: for a
            program that did not ask for any of this and must not fail by it.
    """
    check("start_method", start_method, START_METHODS)
    arguments = (start_method, persistent, may_yield)
    with LEDGER.lock:
        before = LEDGER.already(PATCH, arguments)
        if before is not None:
            return before
        supplied: dict[str, Any] = {"multiprocessing_context": start_method}
        if persistent:
            supplied["persistent_workers"] = True
        loader = torch.utils.data.DataLoader
        undo = [replace(loader, "__init__", _supplying(loader.__init__, supplied))]
        if may_yield:
            undo.append(replace(loader, "_get_iterator", _yielding(loader._get_iterator)))
        given = ", ".join(f"{name}={value!r}" for name, value in supplied.items())
        return LEDGER.record(PATCH, arguments, Entry(True, f"loaders with workers get {given}"), *undo)


def _supplying(original: Any, supplied: dict[str, Any]) -> Any:
    """`DataLoader.__init__` with defaults for what the caller leaves out, positional arguments included."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def rocm_patch_dataloader_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # let the original say what is wrong with the call
            given = {}
        workers = given.get("num_workers", 0)
        if isinstance(workers, numbers.Integral) and int(workers) > 0:
            added = {name: value for name, value in supplied.items() if name not in given}
            kwargs.update(added)
            vars(self)[_OURS] = "multiprocessing_context" in added
        original(self, *args, **kwargs)

    return rocm_patch_dataloader_init


def _yielding(original: Any) -> Any:
    """`DataLoader._get_iterator` that gives our start method up where it cannot work."""

    @functools.wraps(original)
    def rocm_patch_get_iterator(self: Any) -> Any:
        if not vars(self).get(_OURS):
            return original(self)
        why = why_not_importable_again()
        if why is None:
            try:
                return original(self)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                if "pickle" not in str(error) and "local object" not in str(error):
                    raise
                why = str(error)
        vars(self)[_OURS] = False
        self.multiprocessing_context = None
        _say_once(why)
        return original(self)

    return rocm_patch_get_iterator


@functools.lru_cache(maxsize=256)
def _say_once(why: str) -> None:
    LOGGER.warning(
        "loader workers start as without rocm-patch, not by spawn: %s\n"
        "hint: that is safe for workers that leave the GPU alone; --start-method chooses for all",
        why,
    )

"""DataLoader workers that start fresh instead of being forked.

What breaks under fork is a child that touches the GPU after its parent did: torch refuses
("Cannot re-initialize CUDA in forked subprocess"), and the ROCm runtime's handles do not survive a fork.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from typing import Any

import torch.utils.data

from rocm_patch.overrides.ledger import LEDGER, Entry, replace
from rocm_patch.settings import LOGGER, START_METHODS, check

PATCH = "dataloader"


def install(start_method: str = "spawn", *, persistent: bool = True) -> Entry:
    """Give loaders that use workers a start method, and keep their workers, unless the caller said otherwise.

    Args:
        start_method: how their workers start.
        persistent: whether workers are kept between epochs. Kept workers don't see a dataset that changes
            between epochs, so the launcher leaves this to the program.
    """
    check("start_method", start_method, START_METHODS)
    arguments = (start_method, persistent)
    with LEDGER.lock:
        before = LEDGER.applied(PATCH)
        if before is not None:
            if LEDGER.arguments(PATCH) == arguments:
                return before
            LOGGER.warning("DataLoader is patched already; the new choices replace the old ones")
        LEDGER.revert(PATCH)
        supplied: dict[str, Any] = {"multiprocessing_context": start_method}
        if persistent:
            supplied["persistent_workers"] = True
        loader = torch.utils.data.DataLoader
        restore = replace(loader, "__init__", _supplying(loader.__init__, supplied))
        given = ", ".join(f"{name}={value!r}" for name, value in supplied.items())
        return LEDGER.record(PATCH, arguments, Entry(True, f"loaders with workers get {given}"), restore)


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
            kwargs.update({name: value for name, value in supplied.items() if name not in given})
        original(self, *args, **kwargs)

    return rocm_patch_dataloader_init

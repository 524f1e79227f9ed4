"""What surrounds torch's own loop in a worker: batches that need no /dev/shm, and failures that speak up."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

from rocm_patch.settings import LOGGER
from rocm_patch.workers import culprit
from rocm_patch.workers.descriptors import memory_file

# Below this a tensor travels in the pipe: a descriptor of its own costs more time, and descriptors are few.
_SMALL_BYTES = 1 << 14
# A view of memory that is more than so many times as large is sent by torch's own means.
_MOST_TIMES = 4


class Once:
    """Something that the first of several processes does; travels to workers by multiprocessing's means."""

    def __init__(self) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):  # then each process is the first
            self._fd = memory_file("rocm-patch-once")
            os.ftruncate(self._fd, 1)
            weakref.finalize(self, os.close, self._fd)

    def __getstate__(self) -> Any:
        return None if self._fd is None else DupFd(self._fd)

    def __setstate__(self, descriptor: Any) -> None:
        self._fd = None if descriptor is None else descriptor.detach()

    def is_first(self) -> bool:
        """Whether nobody was told True before."""
        if self._fd is None:
            return True
        taken = os.pread(self._fd, 1, 0) != b"\0"
        os.pwrite(self._fd, b"\1", 0)
        return not taken


def worker_loop(torch_loop: Callable[..., None], once: Once, *args: Any) -> None:
    """Run `torch.utils.data._utils.worker._worker_loop` with its own arguments."""
    data_queue = args[3]
    _send_batches_through_memory()
    _watch_the_gpu(once)
    # Before the queue's thread is started by the first batch, which takes this from the queue.
    data_queue._on_queue_feeder_error = lambda error, obj: _say_what_cannot_be_sent(data_queue, error, obj)
    torch_loop(*args)


def _send_batches_through_memory() -> None:
    """Let large tensors live in anonymous files and small ones travel in the pipe.

    torch puts each into a file of its own under /dev/shm: a container's 64 MiB of it end in a bus error, and a batch
    of many tensors in "too many open files". The program's choice of the other sharing strategy stays. So does
    torch's way with a view of something much larger, the dataset's own memory say: it moves that once, and a copy for
    every batch would cost more.
    """
    import torch
    import torch.multiprocessing
    from torch.multiprocessing import reductions

    reduce_storage: Any = reductions.reduce_storage
    reduce_tensor: Any = reductions.reduce_tensor
    sharing_strategy: Any = torch.multiprocessing.get_sharing_strategy

    if sharing_strategy() != "file_descriptor" or not _has_memory_files():
        return
    storage_class: Any = torch.UntypedStorage
    moved: set[int] = set()  # storages that torch is to move, by the address of their memory

    def in_memory(cls: Any, size: int) -> Any:
        if size <= _SMALL_BYTES:
            return storage_class(size)
        fd = memory_file("rocm-patch-batch")
        try:
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)  # now, not by a bus error at the first write
            return storage_class._new_shared_fd_cpu(fd, size)
        finally:
            os.close(fd)

    def reduce(storage: Any) -> Any:
        if storage.device.type != "cpu" or storage.is_shared() or storage.nbytes() == 0:
            return reduce_storage(storage)
        nbytes = storage.nbytes()
        if nbytes <= _SMALL_BYTES:
            return small_storage, (ctypes.string_at(storage.data_ptr(), nbytes),)
        if storage.data_ptr() in moved:
            moved.discard(storage.data_ptr())
            return reduce_storage(storage)
        copy = in_memory(storage_class, nbytes)
        copy.copy_(storage)
        # What is sent twice shares its memory at the other end, as torch has it.
        return reduce_storage(copy)

    def reduce_part(tensor: Any) -> Any:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage().untyped()
            if _MOST_TIMES * tensor.numel() * tensor.element_size() < storage.nbytes():
                moved.add(storage.data_ptr())
        return reduce_tensor(tensor)

    storage_class._new_using_fd_cpu = classmethod(in_memory)
    ForkingPickler.register(storage_class, reduce)
    for tensor_class in (torch.Tensor, torch.nn.parameter.Parameter):
        if ForkingPickler._extra_reducers.get(tensor_class) is reduce_tensor:  # type: ignore[attr-defined]
            ForkingPickler.register(tensor_class, reduce_part)


def _has_memory_files() -> bool:
    try:
        os.close(memory_file("rocm-patch-batch"))
    except OSError:
        return False
    return True


def small_storage(data: bytes) -> Any:
    """A CPU storage of these bytes."""
    import torch

    storage_class: Any = torch.UntypedStorage
    storage = storage_class(len(data))
    ctypes.memmove(storage.data_ptr(), data, len(data))
    return storage


def _watch_the_gpu(once: Once) -> None:
    """Say so, with the stack, when code in a worker initialises the GPU: memory that nobody meant to spend."""
    import torch

    cuda: Any = torch.cuda
    lazy_init = cuda._lazy_init

    def rocm_patch_lazy_init() -> None:
        cuda._lazy_init = lazy_init
        if not cuda.is_initialized() and once.is_first():
            stack = "".join(traceback.format_stack(sys._getframe(1), limit=8))
            LOGGER.warning(
                "a loader's worker initialises the GPU, here:\n%s"
                "hint: each worker takes some hundred MiB of GPU memory for it; make CPU tensors in the dataset and "
                "move the batch in the training loop",
                stack,
            )
        lazy_init()

    cuda._lazy_init = rocm_patch_lazy_init


def _say_what_cannot_be_sent(data_queue: Any, error: BaseException, obj: Any) -> None:
    """Send an error in the place of a batch that could not be pickled: the program waits for that batch."""
    from torch import _utils

    wrapper_class: Any = _utils.ExceptionWrapper
    index, data = obj
    if isinstance(data, wrapper_class):
        text = f"{data.exc_type.__name__} (a class that cannot be sent to the program)\n{data.exc_msg}"
    else:
        found = culprit.find(data, "batch")
        text = f"a worker's batch cannot be sent to the program: {found or error}"
    wrapper = wrapper_class((RuntimeError, RuntimeError(text), None), where="in a DataLoader worker process")
    data_queue.put((index, wrapper))

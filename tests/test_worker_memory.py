"""What a dataset holds reaches workers as fork would have it: once in memory, and each worker's own to write to."""

import gc
import os
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import rocm_patch
from conftest import python
from rocm_patch.workers import buffers, fork_server

MIB = 1 << 20


@pytest.fixture
def auto():
    rocm_patch.patch_dataloader(start_method="auto")


class Calls(Dataset):
    """Its items are what functions say of it in a worker."""

    def __init__(self, *functions, **attributes):
        self.functions = functions
        vars(self).update(attributes)

    def __len__(self):
        return len(self.functions)

    def __getitem__(self, index):
        return self.functions[index](self)


def asked(dataset, **options):
    """The dataset's items from one worker."""
    return list(DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=_as_it_is, **options))


def _as_it_is(item):
    return item


@pytest.mark.parametrize(
    "array",
    [
        numpy.arange(300_000),
        numpy.arange(300_000).reshape(500, 600).T,
        numpy.arange(300_000).reshape(500, 600)[::2, 3:],
        numpy.asfortranarray(numpy.arange(300_000.0).reshape(500, 600)),
        numpy.arange(10),
        numpy.zeros((0, 3)),
        numpy.array(["a", None, {"b": 1}], dtype=object),
        numpy.array(["text"] * 20_000),
        numpy.zeros(50_000, dtype=[("x", "f4"), ("y", "i8")]),
    ],
    ids=lambda array: f"{array.dtype.kind}{array.shape}",
)
def test_numpy_arrays_arrive(auto, array):
    frozen = array.copy()
    frozen.setflags(write=False)
    shape, writeable, frozen_writeable, copy = asked(
        Calls(
            lambda d: d.array.shape, lambda d: d.array.flags.writeable, lambda d: d.frozen.flags.writeable,
            lambda d: d.array.copy(), array=array, frozen=frozen,
        )
    )  # fmt: skip
    assert tuple(shape) == array.shape and writeable and (not frozen_writeable or array.dtype.hasobject)
    assert numpy.array_equal(numpy.asarray(copy), array)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(300_000.0),
        torch.arange(300_000).view(500, 600).T,
        torch.arange(300_000).view(500, 600)[::2, 3:],
        torch.arange(7),
        torch.zeros(0, 3),
        torch.randn(200, 200, dtype=torch.complex64),
        torch.randn(300, 300).bfloat16(),
        torch.nn.Parameter(torch.ones(300, 300)),
        torch.eye(300).to_sparse(),
        torch.tensor(3.5),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}".replace("torch.", ""),
)
def test_tensors_arrive(auto, tensor):
    if tensor.is_sparse and torch.__version__.startswith("1."):  # which cannot send it from one process to another
        with pytest.raises(RuntimeError, match="a worker's batch cannot be sent to the program: batch: tensor of"):
            asked(Calls(lambda d: d.tensor, tensor=tensor))
        return
    got, stride, kind = asked(
        Calls(
            lambda d: d.tensor.detach().clone(), lambda d: () if d.tensor.is_sparse else d.tensor.stride(),
            lambda d: type(d.tensor).__name__, tensor=tensor,
        )
    )  # fmt: skip
    assert torch.equal(got.to_dense() if got.is_sparse else got, tensor.to_dense() if tensor.is_sparse else tensor)
    assert kind == type(tensor).__name__ and tuple(stride) == (() if tensor.is_sparse else tensor.stride())


def test_what_shared_memory_goes_on_sharing_it(auto):
    base = torch.zeros(100_000)
    dataset = Calls(
        lambda d: d.view.add_(1) is None,
        lambda d: (d.base[5].item(), d.numpy[5].item(), d.small_view[0].item()),
        lambda d: d.small.add_(2) is None,
        lambda d: d.small_view[0].item(),
        base=base, view=base[:10], numpy=base.numpy(), small=(small := torch.zeros(4)), small_view=small[:2],
    )  # fmt: skip
    _, seen, _, small_seen = asked(dataset)
    assert tuple(seen) == (1.0, 1.0, 0.0) and small_seen == 2.0
    assert base.sum() == 0 and small.sum() == 0  # a worker's writes are its own


def test_shared_memory_stays_shared(auto):
    counter = torch.zeros(1).share_memory_()
    asked(Calls(*[lambda d: d.counter.add_(1) is None] * 5, counter=counter))
    assert counter.item() == 5


@pytest.mark.parametrize("megabytes", [1, 64])
def test_a_second_loader_sees_what_the_program_has_written(auto, megabytes):
    dataset = Calls(lambda d: (d.array[7], d.array[-1], int(d.array.sum())), array=numpy.ones(megabytes * MIB, "u1"))
    tensor = torch.ones(megabytes * MIB)
    dataset.tensor = tensor[3:-3]
    for value in (1, 2, 2, 3):
        dataset.array[7] = dataset.array[-1] = value
        tensor[1000] = value
        ((one, last, total),) = asked(dataset)
        assert (one, last, total) == (value, value, megabytes * MIB + 2 * (value - 1))
        dataset.functions = (dataset.functions[0],)
    (got,) = asked(Calls(lambda d: d.tensor[997].item(), tensor=tensor[3:-3]))
    assert got == 3


def test_running_workers_do_not_see_later_writes_of_the_program(auto):
    """As under fork, where the pages are copied when one side writes."""
    dataset = Calls(*[lambda d: int(d.array[3])] * 40, array=numpy.zeros(64 * MIB, "u1"))
    iterator = iter(DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=1))
    assert next(iterator) == 0
    dataset.array[3] = 9
    assert set(iterator) == {0} and dataset.array[3] == 9


def test_exchanged_pages_are_ordinary_memory(auto):
    """Content, neighbours in the same page, and the allocator survive; the bytes exist once."""
    blocks = [numpy.full(40 * MIB + 123, n, "u1") for n in range(3)]
    middle = blocks[1][11:-7]
    dataset = Calls(lambda d: int(d.array.sum()), array=middle)
    snapshots = buffers.Snapshots()
    address = middle.__array_interface__["data"][0]
    loose = buffers.Arena()
    place = snapshots.place(address, middle.nbytes, loose, may_exchange=True)
    assert place.arena is not loose and [int(block.min()) for block in blocks] == [0, 1, 2]
    assert snapshots.place(address, middle.nbytes, loose, may_exchange=True) == place
    assert asked(dataset) == [middle.nbytes]
    blocks[1][:] = 5
    assert (int(blocks[0].max()), int(blocks[1].min()), int(blocks[2].min())) == (0, 5, 2)
    assert snapshots.place(address, middle.nbytes, loose, may_exchange=True) != place
    del blocks, middle, dataset
    gc.collect()
    assert numpy.zeros(200 * MIB, "u1").sum() == 0  # what malloc gives as zeroes is zeroes


def test_an_exchange_loses_no_write_of_another_thread():
    """One that waits for Python's lock all the time, and is let in between any two steps that do not keep it out."""
    lost = []
    for _ in range(12):
        array, stop, count = numpy.zeros(6 << 20, "i8"), threading.Event(), 0

        def write(array=array, stop=stop):
            nonlocal count
            view = memoryview(array)
            while not stop.is_set():
                for place in range(7, len(view), 1 << 17):
                    view[place] += 1
                    count += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            start = time.monotonic()
            address = array.__array_interface__["data"][0]
            snapshots = buffers.Snapshots()
            snapshots.place(address, array.nbytes, buffers.Arena(), may_exchange=True)
            assert snapshots.kept and time.monotonic() - start < 20
        finally:
            stop.set()
            thread.join()
        lost.append(count - int(array.sum()))
    assert lost == [0] * 12 and count > 1000


def test_memory_that_was_never_written_to_stays_unmade(auto):
    array = numpy.zeros(512 * MIB, "u1")  # as a cache that fills by and by
    array[300 * MIB] = 7
    snapshots = buffers.Snapshots()
    address = array.__array_interface__["data"][0]
    place = snapshots.place(address, array.nbytes, buffers.Arena(), may_exchange=True)
    assert os.fstat(place.arena.fd).st_blocks * 512 < 16 * MIB
    assert array[300 * MIB] == 7 and int(array[200 * MIB : 400 * MIB].sum()) == 7
    assert asked(Calls(lambda d: (int(d.array[300 * MIB]), int(d.array.sum())), array=array)) == [(7, 7)]


def test_views_of_a_datasets_memory_are_sent_as_torch_sends_them(auto):
    """It moves the memory once; a copy for every batch would be a gigabyte for a few of them."""
    dataset = Calls(*[lambda d: list(d.rows[:50])] * 6, rows=torch.ones(64, 1 << 18))
    batches = asked(dataset)
    assert len({row.untyped_storage().data_ptr() if hasattr(row, "untyped_storage") else row.storage().data_ptr()
                for batch in batches for row in batch}) == 1  # fmt: skip
    assert all(float(row.sum()) == 1 << 18 for batch in batches for row in batch)


OTHER_MALLOC = """
import ctypes, gc, numpy, os, sys, torch, rocm_patch
from torch.utils.data import DataLoader, Dataset
rocm_patch.patch_dataloader(start_method='auto')
class Large(Dataset):
    def __init__(self): self.array = numpy.full(64 << 20, 7, 'u1')
    def __len__(self): return 2
    def __getitem__(self, i): return int(self.array.sum())
dataset = Large()
right = sum(map(int, DataLoader(dataset, num_workers=1))) == 2 * 7 << 26
print(right, "rocm-patch-buffers" in open("/proc/self/maps").read())
del dataset
gc.collect()
print(int(numpy.zeros(200 << 20, "u1").sum()))
"""


def test_memory_of_another_malloc_is_copied():
    """jemalloc counts on zeroes in the pages of freed memory."""
    library = next(Path("/usr/lib").glob("*/libjemalloc.so.2"), None)
    if library is None:
        pytest.skip("not on this machine: libjemalloc2")
    assert python("-c", OTHER_MALLOC).stdout == "True True\n0\n"
    assert python("-c", OTHER_MALLOC, LD_PRELOAD=str(library)).stdout == "True False\n0\n"
    assert python("-c", OTHER_MALLOC, MALLOC_MMAP_THRESHOLD_="65536").stdout == "True False\n0\n"


def test_what_was_copied_for_workers_goes_when_they_have_started(auto):
    """At once: a garbage collector may not come by for many loaders."""
    dataset = Calls(lambda d: d.array[0], array=numpy.ones(8 * MIB, "u1"))
    gc.collect()
    before = len(buffers._ARENAS)
    gc.disable()
    try:
        iterator = iter(DataLoader(dataset, num_workers=1))
        assert len(buffers._ARENAS) == before and int(next(iterator)) == 1
    finally:
        gc.enable()


def test_memory_of_files_is_opened_again(auto, tmp_path):
    path = tmp_path / "data.bin"
    numpy.arange(8 * MIB, dtype="f4").tofile(path)
    array = numpy.memmap(path, "f4", "r+", offset=400, shape=(1000, 8))
    dataset = Calls(
        lambda d: float(d.array[2, 3]),
        lambda d: float(d.part[1, 0]),
        lambda d: d.array.__setitem__((0, 0), -7.0),
        lambda d: d.frozen.flags.writeable,
        array=array, part=array[10::2, 1:], frozen=numpy.memmap(path, "f4", "r"),
    )  # fmt: skip
    assert asked(dataset)[:2] == [100 + 16 + 3, 100 + 12 * 8 + 1]
    assert array[0, 0] == -7.0 and asked(dataset)[3] is False


@pytest.mark.alone  # the machine's memory is looked at
def test_memory_is_had_once(tmp_path):
    """256 MiB and four workers: what is added to the machine's memory is a part of that, not four times it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy, torch, rocm_patch\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "rocm_patch.patch_dataloader(start_method='auto')\n"
        "class Half(Dataset):\n"
        "    def __init__(self):\n"
        "        self.array, self.tensor = numpy.ones(128 << 20, 'u1'), torch.ones(32 << 20)\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, i): return int(self.array.sum()) + int(self.tensor.sum())\n"
        "def used():\n"
        "    lines = dict(line.split(':') for line in open('/proc/meminfo'))\n"
        "    return sum(int(lines[name].split()[0]) for name in ('AnonPages', 'Shmem')) >> 10\n"
        "list(DataLoader([1], num_workers=4))\n"
        "dataset, kept = Half(), []\n"
        "before = used()\n"
        "iterator = iter(DataLoader(dataset, batch_size=None, num_workers=4))\n"
        "kept = [next(iterator) for _ in range(16)]\n"
        "print(used() - before)\n"
    )
    grown = int(python(str(script)).stdout)
    assert grown < 200, grown  # MiB: four Python processes' own pages; their copies would be 1024


@pytest.mark.alone  # others' tensors and locks come and go in /dev/shm
def test_a_hundred_loaders_leave_nothing(auto):
    dataset = Calls(lambda d: int(d.array[0]), lambda d: 1, array=numpy.zeros(40 * MIB, "u1"))
    asked(dataset)
    server = fork_server.of_this_process().pid

    def leavings():
        gc.collect()
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]  # noqa: PTH115, PTH208
        return len(files), len(children), len(os.listdir(f"/proc/{server}/fd")), len(os.listdir("/dev/shm"))  # noqa: PTH208

    before = leavings()
    for _ in range(100):
        next(iter(DataLoader(dataset, num_workers=1)))
    del dataset
    after = leavings()
    assert after[1:] == before[1:] and after[0] <= before[0]


def _is_open(fd):
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def test_batches_need_no_dev_shm_and_few_descriptors(auto):
    """Small tensors travel in the pipe; large ones in anonymous files."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    (values,) = asked(Calls(_many))
    open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert len(values) == 500 and open_files < before + 50
    (large,) = asked(Calls(lambda d: torch.ones(1 << 20)))
    assert large.is_shared() and large.sum() == 1 << 20


def _many(dataset):
    return [torch.full((100,), n) for n in range(500)]

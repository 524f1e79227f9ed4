"""Loaders get a start method and kept workers where the caller said nothing of them, and nowhere else."""

import inspect
import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import rocm_patch
from conftest import python
from rocm_patch.errors import UsageError
from rocm_patch.overrides import dataloader

DATA = TensorDataset(torch.arange(12.0))


def described(loader):
    context = loader.multiprocessing_context
    return (context.get_start_method() if context else None, loader.persistent_workers)


@pytest.fixture
def patched():
    rocm_patch.patch_dataloader()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, False)),
        ({"num_workers": 0}, (None, False)),
        ({"num_workers": 2}, ("spawn", True)),
        ({"num_workers": 2, "multiprocessing_context": "fork"}, ("fork", True)),
        ({"num_workers": 2, "multiprocessing_context": None}, (None, True)),
        ({"num_workers": 2, "persistent_workers": False}, ("spawn", False)),
        ({"num_workers": 2, "persistent_workers": False, "multiprocessing_context": "fork"}, ("fork", False)),
    ],
    ids=str,
)
def test_what_is_supplied(patched, given, expected):
    assert described(DataLoader(DATA, batch_size=3, **given)) == expected


def test_positional_arguments_count(patched):
    # dataset, batch_size, shuffle, sampler, batch_sampler, num_workers, collate_fn, pin_memory, drop_last,
    # timeout, worker_init_fn, multiprocessing_context
    assert described(DataLoader(DATA, 3, False, None, None, 2)) == ("spawn", True)
    arguments = (DATA, 3, False, None, None, 2, None, False, False, 0, None, "forkserver")
    assert described(DataLoader(*arguments)) == ("forkserver", True)


def test_numpy_integers_count(patched):
    numpy = pytest.importorskip("numpy")
    assert described(DataLoader(DATA, num_workers=numpy.int64(1))) == ("spawn", True)


def test_subclasses_are_served(patched):
    class Loader(DataLoader):
        def __init__(self, dataset, workers):
            super().__init__(dataset, num_workers=workers)

    assert described(Loader(DATA, 2)) == ("spawn", True)


def test_errors_are_the_originals(patched):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        DataLoader(DATA, colour="red")
    with pytest.raises(ValueError, match="num_workers"):
        DataLoader(DATA, num_workers=-1)


def test_the_signature_stays(patched):
    assert "num_workers" in inspect.signature(DataLoader.__init__).parameters
    assert "num_workers" in inspect.signature(DataLoader).parameters


def test_the_launchers_patch_supplies_the_start_method_alone():
    dataloader.install("spawn", persistent=False)
    assert described(DataLoader(DATA, num_workers=2)) == ("spawn", False)


def test_idempotent_and_other_arguments(caplog):
    original = DataLoader.__init__
    assert rocm_patch.patch_dataloader() is True
    first = DataLoader.__init__
    with caplog.at_level(logging.WARNING, "rocm_patch"):
        assert rocm_patch.patch_dataloader() is True
        assert DataLoader.__init__ is first and not caplog.records
        assert rocm_patch.patch_dataloader("forkserver") is True
    assert len(caplog.records) == 1
    assert described(DataLoader(DATA, num_workers=2)) == ("forkserver", True)
    rocm_patch.disable_all_patches()
    assert DataLoader.__init__ is original


def test_unknown_start_method():
    with pytest.raises(UsageError, match="unknown start method 'vfork'"):
        rocm_patch.patch_dataloader("vfork")


def test_spawned_workers_deliver(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, os, rocm_patch\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "class Pids(Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i): return i, os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    rocm_patch.patch_dataloader()\n"
        "    loader = DataLoader(Pids(), batch_size=2, num_workers=2)\n"
        "    epochs = [[(i.tolist(), pids.tolist()) for i, pids in loader] for _ in range(2)]\n"
        "    seen = [{pid for _, pids in epoch for pid in pids} for epoch in epochs]\n"
        "    assert seen[0] == seen[1] and len(seen[0]) == 2 and os.getpid() not in seen[0]\n"
        "    assert [n for i, _ in epochs[0] for n in i] == list(range(8))\n"
        "    print('kept')\n"
    )
    assert python(str(script)).stdout == "kept\n"

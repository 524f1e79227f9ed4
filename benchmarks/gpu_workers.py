"""Loader workers beside a GPU that the program uses; writes one JSON file.

    python benchmarks/gpu_workers.py OUT.json [--only PART]

Each check is a script in a process of its own, unguarded where it can be, as users write them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import harness

PREAMBLE = """
import gc, os, sys, warnings
warnings.filterwarnings("ignore")
import torch
from pathlib import Path
from torch.utils.data import DataLoader, Dataset, TensorDataset
parameter = torch.nn.Parameter(torch.ones(8, device="cuda"))  # the program uses the GPU
torch.cuda.synchronize()
class OnGpu(Dataset):
    def __len__(self): return 32
    def __getitem__(self, i): return (torch.full((2,), float(i)).cuda() * 2).cpu()
def total(loader): return sum(float(batch.sum()) for batch in loader)
"""
AUTO = "import rocm_patch; rocm_patch.patch_dataloader(start_method='auto')\n"


def program(text: str, *, run: bool = False) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, plainly or by `rocm-patch run`."""
    command = [sys.executable, *(["-m", "rocm_patch", "run", "-q", "--backend", "cuda"] if run else []), "-"]
    return subprocess.run(
        command, input=PREAMBLE + textwrap.dedent(text), capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
    )  # fmt: skip


def printed(done: subprocess.CompletedProcess[str]) -> str:
    """What a script printed; its error where it failed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_a_worker_that_touches_the_gpu() -> Mapping[str, Any]:
    """Fork fails, as torch says; ours works, without a guard, with and without the launcher."""
    text = "print(total(DataLoader(OnGpu(), batch_size=4, num_workers=2)))"
    forked = program(text)
    assert forked.returncode and "Cannot re-initialize CUDA in forked subprocess" in forked.stderr
    ours = program(AUTO + text)
    assert printed(ours) == "1984.0\n" == printed(program(text, run=True))
    assert ours.stderr.count("a loader's worker initialises the GPU") == 1
    spawned = "import rocm_patch; rocm_patch.patch_dataloader()\n" + text
    assert printed(program(spawned)) == "1984.0\n"
    return {"told": ours.stderr.splitlines()[0]}


def check_gpu_tensors_in_the_dataset() -> Mapping[str, Any]:
    """They travel by CUDA's own means, to several workers and again to the next loader's."""
    text = """
        data = torch.arange(64.0, device="cuda")
        dataset = TensorDataset(data)
        for _ in range(3):
            print(sum(float(x.sum()) for (x,) in DataLoader(dataset, batch_size=8, num_workers=3)))
        del dataset
        print(float(data.sum()))
        """
    assert printed(program(AUTO + textwrap.dedent(text))) == "2016.0\n" * 4
    return {}


def check_pinned_loaders() -> Mapping[str, Any]:
    """Batches arrive pinned, of the values that they have without workers."""
    text = """
        data = TensorDataset(torch.arange(1 << 20).float().view(-1, 64), torch.arange(1 << 14))
        plain = [float(x.sum()) for x, _ in DataLoader(data, batch_size=512)]
        for workers in (1, 4):
            loader = DataLoader(data, batch_size=512, num_workers=workers, pin_memory=True)
            batches = [(x.is_pinned() and y.is_pinned(), float(x.cuda(non_blocking=True).sum())) for x, y in loader]
            print(all(pinned for pinned, _ in batches), [value for _, value in batches] == plain)
        """
    assert printed(program(AUTO + textwrap.dedent(text))) == "True True\n" * 2
    return {}


def check_pinned_memory_keeps_its_pages() -> Mapping[str, Any]:
    """A dataset in pinned memory is copied, not exchanged; one beside it is exchanged; GPU copies stay right."""
    text = """
        from rocm_patch.overrides import loader_workers
        pinned = torch.ones(1 << 24).pin_memory()
        plain = torch.ones(1 << 24)
        class Both(Dataset):
            def __init__(self): self.pinned, self.plain, self.array = pinned, plain, pinned.numpy()
            def __len__(self): return 8
            def __getitem__(self, i): return self.pinned.sum() + self.plain.sum() + float(self.array.sum())
        dataset = Both()
        for n in range(1, 3):
            print(sum(map(float, DataLoader(dataset, batch_size=None, num_workers=2))) == 8 * 3 * n * (1 << 24))
            (snapshots,) = loader_workers._SNAPSHOTS.values()
            print([place.nbytes == 1 << 26 for place in snapshots.kept.values()], pinned.is_pinned())
            on_gpu = pinned.cuda(non_blocking=True), plain.cuda(non_blocking=True)
            pinned.add_(1); plain.add_(1)
            torch.cuda.synchronize()
        """
    assert printed(program(AUTO + textwrap.dedent(text))) == "True\n[True] True\n" * 2
    return {}


def check_a_hundred_loaders_leave_nothing() -> Mapping[str, Any]:
    """Processes, descriptors, shared memory and GPU memory after 100 loaders that were made and dropped."""
    text = """
        from rocm_patch.workers import fork_server, server
        def leavings():
            gc.collect()
            pid = fork_server.of_this_process().pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{pid}/fd")), len(children),
                    len(os.listdir("/dev/shm")), torch.cuda.memory_allocated()]
        dataset = TensorDataset(torch.ones(1 << 24), torch.ones(1 << 24))
        for _ in range(3): next(iter(DataLoader(dataset, batch_size=4, num_workers=2, pin_memory=True)))
        before = leavings()
        for _ in range(100): next(iter(DataLoader(dataset, batch_size=4, num_workers=2, pin_memory=True)))
        after = leavings()
        print(before, after, server.gpu_descriptors(fork_server.of_this_process().pid))
        assert all(a <= b for a, b in zip(after, before)), (before, after)
        """
    start = time.perf_counter()
    return {
        "before, after, the server's GPU descriptors": printed(program(AUTO + textwrap.dedent(text))).strip(),
        "seconds": time.perf_counter() - start,
    }


def check_training_is_the_same() -> Mapping[str, Any]:
    """An unguarded training on the GPU with four workers: the losses of a run without us, to the last digit."""
    text = """
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        class Noisy(Dataset):
            def __len__(self): return 256
            def __getitem__(self, i): return torch.randn(16) + i / 256, torch.tensor(i / 256)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
        optimizer = torch.optim.Adam(model.parameters())
        for epoch in range(3):
            for x, y in DataLoader(Noisy(), batch_size=32, shuffle=True, num_workers=4, pin_memory=True):
                loss = (model(x.cuda())[:, 0] - y.cuda()).square().mean()
                optimizer.zero_grad(); loss.backward(); optimizer.step()
            print(repr(loss.item()))
        """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    plain, ours = printed(program(text)), printed(program(AUTO + textwrap.dedent(text)))
    assert plain == ours
    return {"losses": plain.split()}


def check_frameworks() -> Mapping[str, Any]:
    """Lightning, accelerate and ultralytics make loaders of their own; their workers come from the fork server."""
    done = {}
    parents = """
        class Parents(Dataset):
            def __len__(self): return 32
            def __getitem__(self, i): return {"x": torch.full((4,), float(i)), "parent": os.getppid()}
        from rocm_patch.workers import fork_server
        seen = set()
        """
    texts = {
        "accelerate": """
            import accelerate
            loader = accelerate.Accelerator().prepare(DataLoader(Parents(), batch_size=4, num_workers=2))
            for batch in loader: seen |= set(batch["parent"].tolist())
            """,
        "lightning": """
            import lightning
            class Module(lightning.LightningModule):
                def __init__(self): super().__init__(); self.layer = torch.nn.Linear(4, 1)
                def training_step(self, batch, index):
                    seen.update(batch["parent"].tolist())
                    return self.layer(batch["x"]).mean()
                def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.01)
            trainer = lightning.Trainer(max_epochs=2, accelerator="gpu", devices=1, logger=False,
                                        enable_checkpointing=False, enable_progress_bar=False)
            trainer.fit(Module(), DataLoader(Parents(), batch_size=4, num_workers=2))
            """,
        "ultralytics": """
            from ultralytics.data.build import InfiniteDataLoader
            loader = InfiniteDataLoader(dataset=Parents(), batch_size=4, num_workers=2)
            for _ in range(2):
                for batch in loader: seen |= set(batch["parent"].tolist())
            """,
    }
    for name, text in texts.items():
        try:
            __import__(name)
        except ImportError:
            done[name] = "not installed"
            continue
        lines = printed(
            program(
                AUTO + textwrap.dedent(parents) + textwrap.dedent(text)
                + "print('SERVED', seen == {fork_server.of_this_process().pid})\n"
            )
        )  # fmt: skip
        assert "SERVED True" in lines, lines
        done[name] = "served"
    return done


if __name__ == "__main__":
    sys.exit(harness.run_all(globals(), harness.parser(__doc__).parse_args()))

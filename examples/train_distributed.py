"""Train a small convolutional network on scikit-learn's digits with several processes, one per GPU or per CPU share.

A plain PyTorch script for torchrun (torch 2.6 or newer). Run it as it is, or patched:

    torchrun --nproc-per-node 2 examples/train_distributed.py
    rocm-patch run -- torchrun --nproc-per-node 2 examples/train_distributed.py --parallel fsdp

With `--checkpoint` it goes on where it was when torchrun starts it again after a failure:

    torchrun --nproc-per-node 2 --max-restarts 1 examples/train_distributed.py --checkpoint /tmp/digits
"""

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="images of one process in a step")
    parser.add_argument("--workers", type=int, default=1, help="loader workers of each process")
    parser.add_argument("--checkpoint", type=Path, help="folder: read if it is there, written after every epoch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


def make_parallel(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer)  # each process keeps a share of the weight, and has all of it while it is used
    return fully_shard(model)


class Progress:
    """What a checkpoint holds: the model, its optimizer, and how many epochs are done."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        self.epoch = 0
        if folder is not None and (folder / "last").exists():
            state = self._state()
            dcp.load(state, checkpoint_id=folder / (folder / "last").read_text())
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            self.epoch = state["epoch"]

    def _state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "epoch": self.epoch}

    def epoch_done(self) -> None:
        self.epoch += 1
        if self.folder is not None:
            dcp.save(self._state(), checkpoint_id=self.folder / f"epoch{self.epoch}")
            if dist.get_rank() == 0:  # the name last, by a rename: a process killed before it leaves the older one
                (self.folder / "new").write_text(f"epoch{self.epoch}")
                (self.folder / "new").replace(self.folder / "last")
            dist.barrier()


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    digits = load_digits()  # 1,797 images of 8x8 pixels, values 0 to 16; comes with scikit-learn
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, arguments.batch, sampler=sampler, num_workers=arguments.workers)
    model = make_parallel(make_model().to(arguments.device), arguments.parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    progress = Progress(model, optimizer, arguments.checkpoint)

    for epoch in range(progress.epoch, arguments.epochs):
        sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(x.to(arguments.device)), y.to(arguments.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach()
            dist.all_reduce(mean)  # gloo knows no average
            if dist.get_rank() == 0:
                print(f"epoch {epoch} step {step} loss {mean.item() / dist.get_world_size():.6f}", flush=True)
        progress.epoch_done()


def main() -> None:
    arguments = parse_arguments()
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(arguments)
    # A model that still holds the process group may hang at exit, over gloo with torch 2.13: it waits for a thread of
    # gloo with Python's lock held, which that thread wants. So the model goes first.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

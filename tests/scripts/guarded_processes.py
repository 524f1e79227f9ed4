"""Ranks that are spawned under a guard: clean."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler


def run(rank, size):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", "29500"
    dist.init_process_group("nccl", rank=rank, world_size=size)
    torch.cuda.set_device(rank)
    data = torch.zeros(64, 4)
    loader = DataLoader(data, sampler=DistributedSampler(data, size, rank), num_workers=2)
    for batch in loader:
        batch.cuda(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.set_start_method("spawn")
    mp.spawn(run, args=(torch.cuda.device_count(),), nprocs=torch.cuda.device_count())

import multiprocessing
import multiprocessing as mp
import os

import torch
from torch.utils.data import DataLoader

CONTEXT = "fork"


def work(index):
    return torch.ones(index, device="cuda").sum().item()


def main():
    multiprocessing.set_start_method("fork", force=True)  # expect: fork-asked-for
    loader = DataLoader([1, 2], num_workers=2, multiprocessing_context=CONTEXT)  # expect: fork-asked-for
    print(list(loader))
    with mp.get_context("fork").Pool(2) as pool:  # expect: fork-asked-for
        print(pool.map(work, [1, 2]))
    if os.fork() == 0:  # expect: fork-asked-for
        os._exit(0)


if __name__ == "__main__":
    main()

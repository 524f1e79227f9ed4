import concurrent.futures
import torch.multiprocessing as mp


def worker(rank, size):
    print(rank, size)


def launch(size):
    mp.spawn(worker, args=(size,), nprocs=size)


launch(2)  # expect: missing-guard
with concurrent.futures.ProcessPoolExecutor(2) as pool:
    print(list(pool.map(abs, [1])))

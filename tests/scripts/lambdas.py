import random
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Frames(Dataset):
    def __init__(self, transform=None):
        self.transform = transform
        self.keep = lambda frame: frame.mean() > 0  # expect: lambda-to-loader

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.transform(torch.full((3, 8, 8), float(index)))


def make(seed):
    def seed_worker(worker):  # expect: lambda-to-loader
        random.seed(seed + worker)
        np.random.seed(seed + worker)

    transform = transforms.Compose([
        transforms.RandomHorizontalFlip(),
        transforms.Lambda(lambda image: image / 255),  # expect: lambda-to-loader
    ])
    return DataLoader(
        Frames(transform),
        batch_size=4,
        num_workers=4,
        worker_init_fn=seed_worker,
        collate_fn=lambda frames: torch.stack(frames),  # expect: lambda-to-loader
    )


def local_dataset():
    class Local(Dataset):  # expect: lambda-to-loader
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return index

    return DataLoader(Local(), num_workers=1)


if __name__ == "__main__":
    for loader in (make(0), local_dataset()):
        for batch in loader:
            print(sorted(batch, key=lambda x: x.sum()), partial(print, 1))

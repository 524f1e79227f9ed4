import functools

import torch
from torch.utils.data import DataLoader


class Loader(DataLoader):
    def __init__(self, data, workers=2):
        super().__init__(data, num_workers=workers, collate_fn=lambda x: x)  # expect: lambda-to-loader


make = functools.partial(DataLoader, num_workers=2, pin_memory=True)

first = next(iter(make(torch.zeros(4))))  # expect: missing-guard
second = list(Loader(torch.zeros(4)))

"""Loaders without workers need no guard and no pickle: clean."""

import argparse

import torch
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=0)
arguments = parser.parse_args()
WORKERS = 0

for batch in DataLoader(torch.zeros(4), num_workers=WORKERS, collate_fn=lambda x: x):
    print(batch)
for batch in DataLoader(torch.zeros(4), num_workers=arguments.workers):
    print(batch)
print(next(iter(DataLoader(torch.zeros(4)))))
model = torch.nn.Linear(4, 4).to("cpu")

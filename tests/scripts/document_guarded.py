import multiprocessing as mp
mp.set_start_method('spawn', force=True)

import torch
from torch.utils.data import DataLoader

def train():
    loader = DataLoader(dataset, num_workers=4)
    for batch in loader:
        pass

if __name__ == '__main__':
    train()

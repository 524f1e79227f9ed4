"""Uses the GPU where it should: clean."""

import torch
from torch.utils.data import DataLoader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT = torch.cuda.device_count()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1).to(DEVICE)


def train(model, loader):
    for batch in loader:
        model.layer(batch.to(DEVICE, non_blocking=True))
    torch.cuda.synchronize()


if __name__ == "__main__":
    torch.cuda.set_device(0)
    train(Net().cuda(), DataLoader(torch.zeros(8, 1), num_workers=2))

"""A training script as many are: clean."""

import argparse
import logging
from pathlib import Path

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms

logger = logging.getLogger(__name__)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def collate(batch):
    images, labels = zip(*batch)
    return torch.stack(images), torch.tensor(labels)


def loaders(arguments):
    transform = transforms.Compose([transforms.Resize(64), transforms.ToTensor()])
    full = datasets.ImageFolder(arguments.data, transform)
    train, valid = random_split(full, [0.9, 0.1])
    options = {"batch_size": arguments.batch, "num_workers": arguments.workers, "pin_memory": True}
    return (
        DataLoader(train, shuffle=True, collate_fn=collate, **options),
        DataLoader(valid, collate_fn=collate, **options),
    )


def run_epoch(model, loader, optimizer=None):
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        loss = nn.functional.cross_entropy(model(images), labels)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("-j", "--workers", type=int, default=4)
    arguments = parser.parse_args()
    train, valid = loaders(arguments)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    for _ in range(3):
        run_epoch(model, train, optimizer)
        run_epoch(model, valid)
        schedule.step()


if __name__ == "__main__":
    main()

"""Train a small convolutional network on scikit-learn's 1,797 handwritten digits.

A plain PyTorch script. Run it as it is, or patched:

    python examples/train_digits.py
    rocm-patch run examples/train_digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_datasets(seed: int) -> list[torch.utils.data.Dataset]:
    digits = load_digits()  # 1,797 images of 8x8 pixels, values 0 to 16; comes with scikit-learn
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    return random_split(dataset, [1437, 360], torch.Generator().manual_seed(seed))


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    train_set, test_set = make_datasets(arguments.seed)
    train = DataLoader(train_set, batch_size=32, shuffle=True, num_workers=arguments.workers)
    test = DataLoader(test_set, batch_size=120, num_workers=arguments.workers)
    model = make_model().to(arguments.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()

    for epoch in range(arguments.epochs):
        model.train()
        total = 0.0
        for images, labels in tqdm(train, desc=f"epoch {epoch + 1}/{arguments.epochs}"):
            loss = loss_of(model(images.to(arguments.device)), labels.to(arguments.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        print(f"epoch {epoch + 1} training loss {total / len(train_set):.6f}")

    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in test:
            correct += (model(images.to(arguments.device)).argmax(1).cpu() == labels).sum().item()
    print(f"test accuracy {correct / len(test_set):.4f}")


if __name__ == "__main__":
    main()

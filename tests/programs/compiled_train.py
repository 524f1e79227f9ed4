# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy==2.4.6"]
#
# [tool.programs]
# about = "torch.compile: a small residual network, the whole graph by inductor; needs g++ on a CPU, Triton on a GPU"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 15
# ///
import argparse

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, out_width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out_width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width, bias=False)
        self.norm2 = nn.BatchNorm2d(out_width)
        self.skip = nn.Conv2d(width, out_width, 1, stride=stride)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, padding=2)
        self.block = Block(16, 24, 2)
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        return self.head(F.gelu(self.up(self.block(self.stem(x)))).mean((2, 3)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Net().to(args.device)
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        labels = torch.randint(0, 6, (8,), generator=generator)
        images = torch.randn(8, 3, 32, 32, generator=generator) + labels[:, None, None, None] / 3
        images, labels = images.to(args.device), labels.to(args.device)
        loss = F.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f}")
    model.eval()
    with torch.no_grad():
        logits, eager = compiled(images), model(images)
    print("logits", " ".join(f"{value:.6g}" for value in logits[0].tolist()))
    print("compiled as eager:", torch.allclose(logits, eager, rtol=1e-3, atol=1e-4))


if __name__ == "__main__":
    main()

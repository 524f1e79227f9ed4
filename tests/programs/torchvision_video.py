# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6", "pillow==13.0.0",
# ]
#
# [tool.programs]
# about = "torchvision: 3-d ResNets (R3D-18 and R(2+1)D-18) on short clips, gradients accumulated over two batches"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 80
# ///
import argparse

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models.video import r2plus1d_18, r3d_18


class MovingSquares(Dataset):
    """Clips of a square that moves left, right, up or down, which is the class."""

    def __init__(self, length, frames=8, size=32):
        self.length, self.frames, self.size = length, frames, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 4
        dy, dx = ((0, -2), (0, 2), (-2, 0), (2, 0))[label]
        y, x = torch.randint(8, self.size - 16, (2,), generator=generator).tolist()
        clip = 0.1 * torch.randn(3, self.frames, self.size, self.size, generator=generator)
        for frame in range(self.frames):
            top, left = (y + dy * frame) % (self.size - 8), (x + dx * frame) % (self.size - 8)
            clip[:, frame, top : top + 8, left : left + 8] += 1
        return clip, label


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    for build in (r3d_18, r2plus1d_18):
        torch.manual_seed(0)
        model = build(weights=None, num_classes=4).to(args.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0002, momentum=0.9)
        loader = DataLoader(MovingSquares(16), batch_size=4, shuffle=True, num_workers=2)
        print(build.__name__)
        model.train()
        for step, (clips, labels) in enumerate(loader):
            loss = F.cross_entropy(model(clips.to(args.device)), labels.to(args.device))
            (loss / 2).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
            print(f"batch {step} loss {loss.item():.6f}")
        model.eval()
        with torch.inference_mode():
            logits = model(torch.stack([MovingSquares(16)[n][0] for n in range(2)]).to(args.device)).cpu()
        for row in logits.softmax(1).tolist():
            print("probabilities", " ".join(f"{value:.6g}" for value in row))


if __name__ == "__main__":
    main()

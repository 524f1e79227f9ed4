# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6", "pillow==13.0.0",
# ]
#
# [tool.programs]
# about = "torchvision: LR-ASPP and DeepLabV3 on MobileNetV3, cross-entropy per pixel, mean IoU"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 80
# ///
import argparse

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import segmentation

CLASSES = 3


def shapes(count, size, seed):
    """Images with a disc (1) and a square (2) on a background (0), and their masks."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images, masks = [], []
    for _ in range(count):
        cx, cy, sx, sy = (torch.rand(4, generator=generator) * (size - 24) + 12).tolist()
        mask = torch.zeros(size, size, dtype=torch.long)
        mask[(x - cx) ** 2 + (y - cy) ** 2 < 11**2] = 1
        mask[((x - sx).abs() < 8) & ((y - sy).abs() < 8)] = 2
        colours = torch.rand(CLASSES, 3, generator=generator)
        images.append(colours[mask].permute(2, 0, 1) + 0.05 * torch.randn(3, size, size, generator=generator))
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def mean_iou(prediction, target):
    found = []
    for number in range(CLASSES):
        a, b = prediction == number, target == number
        found.append((a & b).sum().item() / max((a | b).sum().item(), 1))
    return sum(found) / CLASSES


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)

    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"):
        torch.manual_seed(0)
        build = getattr(segmentation, name)
        auxiliary = {"aux_loss": True} if name.startswith("deeplab") else {}
        model = build(weights=None, weights_backbone=None, num_classes=CLASSES, **auxiliary).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=4, power=0.9)
        loader = DataLoader(TensorDataset(*shapes(16, 64, seed=1)), batch_size=4, shuffle=True, drop_last=True)
        print(name)
        model.train()
        for step, (images, masks) in enumerate(loader):
            images, masks = images.to(device), masks.to(device)
            output = model(images)
            loss = F.cross_entropy(output["out"], masks)
            if "aux" in output:
                loss = loss + 0.5 * F.cross_entropy(output["aux"], masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            print(f"step {step}: loss {loss.item():.6f} lr {scheduler.get_last_lr()[0]:.6f}")
        model.eval()
        images, masks = shapes(4, 64, seed=2)
        with torch.no_grad():
            out = model(images.to(device))["out"].cpu()
        print(f"validation loss {F.cross_entropy(out, masks):.6f} mean IoU {mean_iou(out.argmax(1), masks):.4f}")
        print("mean of each class", " ".join(f"{value:.6f}" for value in out.mean((0, 2, 3)).tolist()))


if __name__ == "__main__":
    main()

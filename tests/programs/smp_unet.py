# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "segmentation-models-pytorch==0.6.0",
#   "anyio==4.16.0", "click==8.5.1", "h11==0.16.0", "hf-xet==1.8.0", "httpcore2==2.16.2", "httpx2==2.16.2",
#   "huggingface-hub==2.4.0", "idna==3.20", "numpy==2.4.6", "packaging==26.4", "pillow==13.0.0", "pyyaml==6.0.4",
#   "safetensors==0.8.0", "timm==1.0.31", "torchvision==0.28.0", "tqdm==4.70.1", "truststore==0.10.5",
# ]
#
# [tool.programs]
# about = "segmentation-models-pytorch: Unet and FPN on ResNet-18, Dice loss, IoU from its metrics"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 80
# ///
import argparse

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader, Dataset


class Cells(Dataset):
    """Grey ellipses on a dark background, and the mask of the ellipses."""

    def __init__(self, length, seed):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        y, x = np.mgrid[0:64, 0:64]
        mask = np.zeros((64, 64), bool)
        for _ in range(4):
            cy, cx = rng.uniform(8, 56, 2)
            a, b = rng.uniform(4, 11, 2)
            mask |= ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1
        image = 0.2 + 0.5 * mask + rng.normal(0, 0.1, (3, 64, 64))
        return {"image": image.astype(np.float32), "mask": mask[None].astype(np.float32)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    for arch in ("unet", "fpn"):
        torch.manual_seed(0)
        model = smp.create_model(arch, encoder_name="resnet18", encoder_weights=None, in_channels=3, classes=1)
        model = model.to(args.device)
        loss_fn = smp.losses.DiceLoss(mode="binary", from_logits=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0001, momentum=0.9)
        train_loader = DataLoader(Cells(16, 1), batch_size=4, shuffle=True, num_workers=2)
        valid_loader = DataLoader(Cells(4, 2), batch_size=4, num_workers=2)
        print(arch)
        model.train()
        for step, batch in enumerate(train_loader):
            loss = loss_fn(model(batch["image"].to(args.device)), batch["mask"].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step} dice loss {loss.item():.6f}")
        model.eval()
        counts, losses, means = [], [], []
        with torch.no_grad():
            for batch in valid_loader:
                mask = batch["mask"].to(args.device)
                logits = model(batch["image"].to(args.device))
                losses.append(loss_fn(logits, mask).item())
                means.append(logits.sigmoid().mean().item())
                counts.append(smp.metrics.get_stats(logits.sigmoid() > 0.5, mask.long(), mode="binary"))
        tp, fp, fn, tn = (torch.cat(parts) for parts in zip(*counts, strict=True))
        iou = smp.metrics.iou_score(tp, fp, fn, tn, reduction="micro")
        print(f"validation dice loss {sum(losses) / len(losses):.6f} mean probability {means[0]:.6f} IoU {iou:.2f}")


if __name__ == "__main__":
    main()

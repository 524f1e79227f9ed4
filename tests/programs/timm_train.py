# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "timm==1.0.31",
#   "anyio==4.16.0", "click==8.5.1", "h11==0.16.0", "hf-xet==1.8.0", "httpcore2==2.16.2", "httpx2==2.16.2",
#   "huggingface-hub==2.4.0", "idna==3.20", "numpy==2.4.6", "packaging==26.4", "pillow==13.0.0", "pyyaml==6.0.4",
#   "safetensors==0.8.0", "torchvision==0.28.0", "tqdm==4.70.1", "truststore==0.10.5",
# ]
#
# [tool.programs]
# about = "timm: its loader, augmentation, Mixup, optimizer, scheduler, loss, gradient clipping and moving average"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 80
# ///
import argparse

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, random_seed


class Blobs(torch.utils.data.Dataset):
    """PIL images with one bright blob; the class is its quadrant."""

    def __init__(self, length):
        self.length = length
        self.transform = None

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        label = index % 4
        y, x = np.mgrid[0:80, 0:80]
        centre = (20 + 40 * (label // 2), 20 + 40 * (label % 2))
        blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 150)
        pixels = np.clip(200 * blob[..., None] * rng.uniform(0.3, 1, 3) + rng.uniform(0, 50, (80, 80, 3)), 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
        return self.transform(image) if self.transform else image, label


def validate(model, loader, loss_fn, device):
    model.eval()
    losses, top1 = AverageMeter(), AverageMeter()
    with torch.no_grad():
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            output = model(images)
            losses.update(loss_fn(output, target).item(), images.size(0))
            top1.update(accuracy(output, target, topk=(1,))[0].item(), images.size(0))
    return losses.avg, top1.avg


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)

    for name in ("resnet10t", "mobilenetv3_small_050"):
        random_seed(42)
        model = timm.create_model(name, pretrained=False, num_classes=4, drop_path_rate=0.05).to(device)
        config = resolve_data_config({"img_size": 64}, model=model)
        common = {
            "input_size": config["input_size"],
            "batch_size": 8,
            "use_prefetcher": False,
            "interpolation": "bilinear",
            "mean": config["mean"],
            "std": config["std"],
            "num_workers": 2,
            "pin_memory": device.type == "cuda",
            "device": device,
        }
        train_loader = create_loader(Blobs(24), is_training=True, hflip=0.0, color_jitter=0.2, **common)
        eval_loader = create_loader(Blobs(8), is_training=False, crop_pct=0.9, **common)
        mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=1e-4)
        scheduler, epochs = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=2, warmup_epochs=1, warmup_lr=1e-3, step_on_epochs=False,
            updates_per_epoch=len(train_loader),
        )  # fmt: skip
        ema = ModelEmaV3(model, decay=0.9)
        train_loss, eval_loss = SoftTargetCrossEntropy(), LabelSmoothingCrossEntropy(0.0)
        scaler = NativeScaler(device=device.type)
        updates = 0
        print(name, f"{sum(p.numel() for p in model.parameters())} parameters")
        for epoch in range(epochs):
            model.train()
            for images, target in train_loader:
                images, target = mixup(images.to(device), target.to(device))
                loss = train_loss(model(images), target)
                optimizer.zero_grad()
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
                ema.update(model, step=updates)
                updates += 1
                scheduler.step_update(updates)
                lr = optimizer.param_groups[0]["lr"]
                print(f"epoch {epoch} update {updates} loss {loss.item():.6f} lr {lr:.6f}")
        for what, net in (("model", model), ("average", ema.module)):
            loss, top1 = validate(net, eval_loader, eval_loss, device)
            print(f"{what}: loss {loss:.6f} top-1 {top1:.3f}")


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6", "pillow==13.0.0",
# ]
#
# [tool.programs]
# about = "torchvision: ResNet-18 and MobileNetV3 trained on images from loader workers, with transforms"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 60
# ///
import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms


class Stripes(Dataset):
    """Striped images; the class is the direction of the stripes."""

    def __init__(self, length, seed, transform):
        self.length, self.seed, self.transform = length, seed, transform

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed * 10_000 + index)
        label = index % 4
        angle = torch.tensor(label * torch.pi / 4)
        y, x = torch.meshgrid(torch.linspace(-1, 1, 72), torch.linspace(-1, 1, 72), indexing="ij")
        phase = torch.rand(3, 1, 1, generator=generator) * 6.28
        wave = torch.sin(9 * (x * torch.cos(angle) + y * torch.sin(angle)) + phase)
        image = 0.5 + 0.4 * wave + 0.1 * torch.randn(wave.shape, generator=generator)
        return self.transform(image.clamp(0, 1)), label


def train(model, loader, device, lr):
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = criterion(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.6f}")


@torch.inference_mode()
def evaluate(model, loader, device):
    model.eval()
    correct, total = 0, 0
    for images, labels in loader:
        logits = model(images.to(device)).cpu()
        correct += (logits.argmax(1) == labels).sum().item()
        total += len(labels)
        print("logits", " ".join(f"{value:.6g}" for value in logits[0].tolist()))
    print(f"accuracy {correct / total:.4f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    train_transform = transforms.Compose([transforms.CenterCrop(64), normalize])
    test_transform = transforms.Compose([transforms.Resize(64), normalize])
    options = {"num_workers": args.workers, "pin_memory": args.device != "cpu"}

    # A residual network that starts as the identity, as in its usual recipe: one that does not amplifies rounding.
    for name, lr, more in (("resnet18", 0.002, {"zero_init_residual": True}), ("mobilenet_v3_small", 0.005, {})):
        torch.manual_seed(0)
        train_loader = DataLoader(Stripes(40, 1, train_transform), batch_size=8, shuffle=True, **options)
        test_loader = DataLoader(Stripes(16, 2, test_transform), batch_size=8, **options)
        model = models.get_model(name, weights=None, num_classes=4, **more).to(args.device)
        print(name)
        train(model, train_loader, args.device, lr)
        evaluate(model, test_loader, args.device)


if __name__ == "__main__":
    main()

"""How far a ResNet-18 that learns from scratch in float64 parts from its native training; writes one JSON file.

    python benchmarks/training_drift.py OUT.json [--device cuda] [--steps 20] [--size 224]

Three networks from the same weights and batches (scikit-learn's digits, enlarged, with noise): native, native with
weights moved by one rounding, and ours. What the second one does shows what the training makes of any rounding. On
2 x86-64 cores it takes 24 minutes. Needs torchvision and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F

import rocm_patch

ROOT = Path(__file__).resolve().parents[1]
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def pictures(device: str, size: int = 224, batch: int = 64) -> Batches:
    """Digits, enlarged, in three channels, with noise so that no two pixels tie."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train_digits

    generator = torch.Generator(device).manual_seed(0)
    found = []
    for x, y in torch.utils.data.DataLoader(train_digits.make_datasets(0)[0], batch_size=batch):
        large = F.interpolate(x.to(device), size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
        noise = torch.randn(large.shape, generator=generator, device=device)
        found.append((large + 0.1 * noise, y.to(device)))
    return found


def side_by_side(batches: Batches, steps: int, lr: float, backend: str) -> Iterator[dict[str, Any]]:
    """For each step, how far the loss and the worst parameter's gradient are from native's, relative."""
    import torchvision

    device = batches[0][0].device
    models: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]] = {}
    for name in ("native", "native_one_rounding_apart", "ours"):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10).to(device, torch.float64).train()
        if name == "native_one_rounding_apart":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 2.0**-52)
        models[name] = model, torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        images, labels = batches[step % len(batches)]
        losses = {}
        for name, (model, optimizer) in models.items():
            if name == "ours":
                assert rocm_patch.enable_miopen_bypass(backend=backend)
            loss = F.cross_entropy(model(images.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rocm_patch.disable_all_patches()
            losses[name] = loss.item()
        row: dict[str, Any] = {"step": step, "loss": losses["native"]}
        for name in list(models)[1:]:
            pairs = zip(models["native"][0].parameters(), models[name][0].parameters(), strict=True)
            row[name] = {
                "loss": abs(losses[name] - losses["native"]) / losses["native"],
                "worst_gradient": max(float((p.grad - q.grad).norm() / p.grad.norm()) for p, q in pairs),
            }
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    chosen = parser.parse_args()
    backend = "hip" if chosen.device == "cuda" and torch.version.hip else chosen.device
    rows: list[dict[str, Any]] = []
    options = (f"--device={chosen.device}", f"--steps={chosen.steps}", f"--size={chosen.size}")
    report = {**harness.about(__file__, chosen.device, *options), "steps": rows}
    for row in side_by_side(pictures(chosen.device, chosen.size), chosen.steps, 1e-3, backend):
        rows.append(row)
        print(json.dumps(row), flush=True)
        chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

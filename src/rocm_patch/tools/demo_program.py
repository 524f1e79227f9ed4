"""The program that `rocm-patch demo` runs: a small convolutional network learns to tell which half is brighter.

It knows nothing of rocm-patch until its last lines, where it says how its convolutions were served.
"""

from __future__ import annotations

import json
import sys


def train(steps: int, device: str) -> float:
    """The loss after some steps of gradient descent on made-up images; the same on every run."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 7 * 7, 2),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images = torch.randn(32, 1, 16, 16)
    labels = (images[..., :8].mean((1, 2, 3)) > images[..., 8:].mean((1, 2, 3))).long()
    images, labels = images.to(device).requires_grad_(), labels.to(device)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss.item())


def main() -> None:
    """Train, and write the loss, the faults that were met and the calls of each strategy as one JSON line."""
    loss = train(int(sys.argv[1]), sys.argv[2])
    answer = {"loss": loss, "faults": 0, "calls": {}}
    aten = sys.modules.get("rocm_patch.overrides.aten")
    for dispatcher in aten.ACTIVE.values() if aten is not None else ():
        routes = dispatcher.routes
        answer["faults"] = routes.fault.met if routes.fault else 0
        calls: dict[str, int] = {}
        for route in routes.taken():
            name = f"{route.spec.direction} {route.strategy.name}"
            calls[name] = calls.get(name, 0) + route.calls
        answer["calls"] = calls
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

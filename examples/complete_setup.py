"""Everything by hand, in the order of docs/PATCHES_V1.1_SUMMARY.md, and the guard that it forgot.

`rocm-patch run your_script.py` does the same with nothing to edit; this shows the parts.
"""

# Step 1: how worker processes start. Before torch is imported.
# Step 2: the environment variables that this machine needs. Before torch is imported.
from patches import setup_environment, setup_multiprocessing

if __name__ == "__main__":  # a spawned worker imports this file again, and must not do all this
    setup_multiprocessing()
    for change in setup_environment():
        print(change)

# Step 3: torch.
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Steps 4 and 5: loaders, and convolutions without MIOpen.
from patches import enable_miopen_bypass, patch_dataloader, patch_status, print_bypass_report
from patches.miopen_bypass.conv2d_fallback import SafeConv2d


def main() -> None:
    patch_dataloader()
    enable_miopen_bypass()
    print(patch_status())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(SafeConv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 42 * 42, 2))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 3, 42, 42) + labels.view(-1, 1, 1, 1)  # the size that hung, two separable classes

    for workers in (0, 4):
        loader = DataLoader(TensorDataset(images, labels), batch_size=16, num_workers=workers)
        for epoch in range(3):
            for batch, target in loader:
                loss = nn.functional.cross_entropy(model(batch.to(device)), target.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"workers={workers} epoch {epoch + 1}: loss {loss.item():.4f}")
    print_bypass_report(model)


if __name__ == "__main__":
    main()

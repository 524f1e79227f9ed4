"""Everything in it is meant: clean."""

import torch
import os
from torch.utils.data import DataLoader

os.environ["HSA_XNACK"] = "1"  # rocm-patch: ignore
# noqa  rocm-patch: ignore[torch-before-environment]
os.environ.update(
    HSA_ENABLE_SDMA="0",
)
os.environ.update(
    HIP_VISIBLE_DEVICES="0",
)  # rocm-patch: ignore[torch-before-environment]
for batch in DataLoader(torch.zeros(4), num_workers=1):  # rocm-patch: ignore[missing-guard, gpu-at-import]
    print(batch)

"""Everything in it is meant: clean."""

import torch
import os
from torch.utils.data import DataLoader

os.environ["HSA_XNACK"] = "1"  # rocm-patch: ignore
for batch in DataLoader(torch.zeros(4), num_workers=1):  # rocm-patch: ignore[missing-guard, gpu-at-import]
    print(batch)

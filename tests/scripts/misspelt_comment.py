import os

import torch

os.environ["HSA_XNACK"] = "0"  # rocm-patch: ignore[torch_before_environment] # expect: unknown-rule # expect: torch-before-environment
print(torch.zeros(1))

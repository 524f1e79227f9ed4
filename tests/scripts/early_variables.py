"""Sets its variables in time: clean."""

import os

SETTINGS = {"HSA_OVERRIDE_GFX_VERSION": "10.3.0", "HIP_VISIBLE_DEVICES": "0"}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def main():
    import torch
    import torch.nn as nn

    print(nn.Linear(2, 2)(torch.zeros(1, 2)))


if __name__ == "__main__":
    os.environ["HSA_XNACK"] = "0"
    main()

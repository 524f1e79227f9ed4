import os
import sys

import numpy as np
import torch

os.environ["HSA_OVERRIDE_GFX_VERSION"] = "10.3.0"  # expect: torch-before-environment
os.environ.setdefault("MIOPEN_FIND_MODE", "FAST")  # expect: torch-before-environment
os.environ.update(
    HIP_VISIBLE_DEVICES="0",  # expect: torch-before-environment
)
os.environ.update({
    "HSA_ENABLE_SDMA": "0",  # expect: torch-before-environment
    "TOKENIZERS_PARALLELISM": "false",
})
os.putenv("HSA_XNACK", "0")  # expect: torch-before-environment
os.environ["MY_OWN_SETTING"] = "1"
environ = os.environ
environ["PYTORCH_HIP_ALLOC_CONF"] = "expandable_segments:True"  # expect: torch-before-environment

print(torch.zeros(1), np.zeros(1), sys.argv)

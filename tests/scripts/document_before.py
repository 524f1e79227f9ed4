import os
os.environ['MIOPEN_DEBUG_CONV_IMPLICIT_GEMM'] = '1'

import torch
from patches.miopen_bypass.conv2d_fallback import SafeConv2d  # expect: v1-api

# DataLoader with workers still crashes
loader = DataLoader(dataset, num_workers=4)

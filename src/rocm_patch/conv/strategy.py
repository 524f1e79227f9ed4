"""What every convolution algorithm offers, and the memory it may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from rocm_patch.conv.spec import ConvSpec


@dataclass(frozen=True)
class Strategy:
    """One convolution algorithm.

    Attributes:
        name: its name for ever: stored verdicts and settings use it.
        rejects: the reason why a spec cannot be computed this way, or None.
        run: computes `spec.result` from the two other tensors, in the order image, grad, weight of those
            that are given: (image, weight) forward, (grad, weight) for grad_input, (image, grad) for
            grad_weight. Tensors may be non-contiguous. The result has `spec.result`'s shape and dtype; its
            memory format is the strategy's affair.
        workspace_bytes: memory beyond inputs and result that `run` takes, given a budget in bytes.
        rtol: bound on the relative error against float64, ||computed - exact|| / ||exact|| (Frobenius),
            per element type.
    """

    name: str
    rejects: Callable[[ConvSpec], str | None]
    run: Callable[[ConvSpec, torch.Tensor, torch.Tensor, int], torch.Tensor]
    workspace_bytes: Callable[[ConvSpec, int], int]
    rtol: Mapping[str, float]


# Bound for algorithms that sum products as a GEMM does: the error of a sum of K products is at most
# K * u * sum|a||b| and for random signs grows as sqrt(K) * u (Higham, Accuracy and Stability of Numerical
# Algorithms, 2nd ed., section 4.2). Half types accumulate in float32, so what is left is the rounding of the
# result and of the partial sums that are stored, a few u. Checked in tests/test_conv.py.
GEMM_RTOL = {"float64": 1e-13, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@cache
def workspace_budget(device: torch.device) -> int:
    """Bytes of workspace that one convolution may take: the smaller of 1 GiB and a tenth of the memory."""
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(1 << 30, total // 10)

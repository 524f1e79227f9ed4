"""What every convolution algorithm offers, and the memory it may use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.spec import ConvSpec


def _never(spec: ConvSpec) -> str | None:
    return None


def _no_work(spec: ConvSpec) -> Work:
    return Work()


def _always(spec: ConvSpec, wait: bool) -> bool:
    return True


def _no_code(spec: ConvSpec) -> tuple[bytes, ...] | None:
    return ()


@dataclass(frozen=True)
class Strategy:
    """One convolution algorithm.

    Attributes:
        name: its name for ever: stored verdicts and settings use it.
        run: computes `spec.result` from the two other tensors, in the order image, grad, weight of those
            that are given: (image, weight) forward, (grad, weight) for grad_input, (image, grad) for
            grad_weight. Tensors may be non-contiguous. The result has `spec.result`'s shape and dtype; its
            memory format is the strategy's affair.
        workspace_bytes: memory beyond inputs and result that `run` takes at most, given a budget in bytes, the
            BLAS library's own workspace aside. A large call is cut into pieces that fit the budget; what cannot
            be cut (a layout's copy of the weight, one output position's column) is taken beyond it.
        rtol: bound on the relative error against float64, ||computed - exact|| / ||exact|| (Frobenius),
            per element type.
        rejects: the reason why a spec cannot be computed this way, or None.
        work: what it does for a spec, from which its time is estimated (`seconds`).
        is_bounded: whether it cuts large calls so that they fit the budget; if not it is to be used where they do.
        is_ready: whether it can be called for a spec without having to compile something first, which the question
            has begun; with True it comes back when that is decided.
        is_approximate: whether its error is larger than that of sums of products (`exact=True` leaves it out).
        bind: `run` for one spec, from its two operands, where more than the spec can be settled once for all calls;
            waits for what has to be compiled. Raises RuntimeError where that cannot be had.
        uses_blas: whether it calls torch's matrix products.
        machine_code: the files that its own kernels for a spec were compiled to; None before they are.
    """

    name: str
    run: Callable[[ConvSpec, torch.Tensor, torch.Tensor, int], torch.Tensor]
    workspace_bytes: Callable[[ConvSpec, int], int]
    rtol: Mapping[str, float]
    rejects: Callable[[ConvSpec], str | None] = _never
    work: Callable[[ConvSpec], Work] = _no_work
    is_approximate: bool = False
    is_ready: Callable[[ConvSpec, bool], bool] = _always
    is_bounded: bool = True
    bind: Callable[[ConvSpec], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None
    uses_blas: bool = True
    machine_code: Callable[[ConvSpec], tuple[bytes, ...] | None] = _no_code

    def bound(self, spec: ConvSpec, budget: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """`run` for one spec and budget."""
        if self.bind is not None:
            return self.bind(spec)
        return lambda first, second: self.run(spec, first, second, budget)

    def seconds(self, spec: ConvSpec) -> float:
        """How long it is likely to take."""
        return cost.seconds(spec, self.work(spec))


# Bound for algorithms that sum products as a GEMM does: the error of a sum of K products is at most
# K * u * sum|a||b| and for random signs grows as sqrt(K) * u (Higham, Accuracy and Stability of Numerical
# Algorithms, 2nd ed., section 4.2). Half types accumulate in float32, so what is left is the rounding of the
# result and of the partial sums that are stored, a few u. Checked in tests/test_conv.py.
GEMM_RTOL = {
    "float64": 1e-13, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2, "complex128": 1e-13, "complex64": 2e-5,
}  # fmt: skip


# Below so many output positions a GEMM per sample is too small to fill a GPU: all samples go into one, at the price
# of a transpose. ResNet-50's layers on an H200: at 14x14 and 7x7 one GEMM is faster, at 28x28 and above one per
# sample.
_SMALL_MAP = 256


def is_small_map(spec: ConvSpec) -> bool:
    """Whether the samples of a batch are better put together."""
    return spec.batch > 1 and math.prod(spec.out) < _SMALL_MAP


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which sums of several products are kept: float32 for half types."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def memory_format(spec: ConvSpec) -> torch.memory_format:
    """The memory format that `spec.channels_last` stands for."""
    if not spec.channels_last:
        return torch.contiguous_format
    return torch.channels_last if len(spec.kernel) == 2 else torch.channels_last_3d


def empty_result(spec: ConvSpec, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for a spec's result, in its memory format."""
    return torch.empty(spec.result, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(spec))


def channels_to_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, *spatial) as a matrix (N * prod(spatial), C); a view where the memory is channels_last."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


@cache
def workspace_budget(device: torch.device) -> int:
    """Bytes of workspace that one convolution may take: the smaller of 1 GiB and a tenth of the memory."""
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(1 << 30, total // 10)

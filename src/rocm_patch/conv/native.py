"""aten's own convolution kernels (MIOpen's, cuDNN's, oneDNN's): captured beneath any override.

`_op_dk` calls the kernel that the operator has for one dispatch key. Ours go to the device's key, aten's stay
at CompositeExplicitAutograd, so these calls reach aten's and cannot come back to us. Seen to work, forward
and backward, on torch 1.13 and 2.13 (CPU) and 2.11 (CUDA).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, ConvSpec, output_size, transposed_output_size
from rocm_patch.conv.strategy import Strategy
from rocm_patch.conv.windows import at

_CONVOLUTION = torch.ops.aten._convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_KEY = torch._C.DispatchKey.CompositeExplicitAutograd
# Whether aten may use cuDNN, or MIOpen on ROCm: its own flag, whatever a program is shown (overrides/cudnn_flag.py).
cudnn_enabled: Callable[[], bool] = inspect.unwrap(torch._C._get_cudnn_enabled)

# How far a vendor library's healthy kernels may be from float64, per element type: above the worst of them, below
# 5 % (bfloat16: 15 %). Worst errors of 64 samples, simulated for images that are Gaussian, ReLU's, smooth, offset or
# 2 % spikes, 3 to 256 channels (why the size of tiles counts: Barabasz et al., arXiv:1803.10986):
#   float32: TF32 (10 bits of mantissa, u = 2^-11) 1e-3, in front of it Winograd F(4x4,3x3) 1.1e-2; Winograd in
#     float32 itself 4e-6 up to F(6x6,3x3). On AMD only CDNA3 has the like (xf32),
#     and no Winograd on top of it.
#   float16: Winograd with everything in float16 but the sums over channels: F(2x2,3x3) 1.5e-3, F(4x4,3x3) 2.5e-2.
#   bfloat16: rounding of the result 2^-9; F(2x2,3x3) all in bfloat16 1.7e-2, F(4x4,3x3) with float32 transforms
#     stored in bfloat16 7.7e-2.
# cuDNN 9.19 on an H200, conv/cases.py and 64 to 256 channels: TF32 1.0e-3, float16 3.6e-4, bfloat16 2.6e-3.
# F(6x6,3x3) in half types can exceed the bounds. MIOpen's driver allows 8.2e-3 (float16) and 6.56e-2 (bfloat16) of
# the largest value, root mean square, and twice that for grad_weight (https://github.com/ROCm/MIOpen/pull/308).
NATIVE_RTOL = {"float64": 1e-10, "float32": 2e-2 if torch.version.cuda else 5e-3, "float16": 3e-2, "bfloat16": 1e-1}
NATIVE_RTOL |= {"complex128": NATIVE_RTOL["float64"], "complex64": NATIVE_RTOL["float32"]}


def convolution(*args: Any) -> torch.Tensor:
    """aten's `_convolution`, with its arguments."""
    return _CONVOLUTION._op_dk(_KEY, *args)  # type: ignore[no-any-return]


def convolution_backward(*args: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """aten's `convolution_backward`, with its arguments; a gradient that `output_mask` leaves out is None."""
    grads = _CONVOLUTION_BACKWARD._op_dk(_KEY, *args)
    return tuple(g if wanted else None for g, wanted in zip(grads, args[-1], strict=True))  # type: ignore[return-value]


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    # Called from aten's autograd kernels, the pair above runs below autograd already; this may be called from
    # anywhere, and aten's kernels assert it.
    below_autograd = torch._C._AutoDispatchBelowAutograd()
    try:
        return _one_direction(spec, first, second)
    finally:
        del below_autograd


def _one_direction(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    geometry = [list(spec.stride), list(spec.padding), list(spec.dilation)]
    zeros = [0] * len(spec.kernel)
    flags = (False, False, cudnn_enabled(), torch._C._get_cudnn_allow_tf32())
    # Less than the output of the plain operation, where this is a derivative of one with output_padding.
    most = output_size(spec.spatial, spec.kernel, spec.stride, spec.padding, spec.dilation)
    beyond = [size - wanted for size, wanted in zip(most, spec.out, strict=True)]
    if spec.direction == FORWARD:
        result = convolution(first, second, None, *geometry, False, zeros, spec.groups, *flags)
        return at(result, *map(slice, spec.out)) if any(beyond) else result
    if spec.direction == GRAD_INPUT:
        covered = transposed_output_size(spec.out, spec.kernel, spec.stride, spec.padding, spec.dilation, zeros)
        extra = [size - reached for size, reached in zip(spec.spatial, covered, strict=True)]
        return convolution(first, second, None, *geometry, True, extra, spec.groups, *flags)
    if any(beyond):
        second = F.pad(second, [amount for extra in reversed(beyond) for amount in (0, extra)])
    weight = first.new_empty(spec.weight)
    grads = convolution_backward(
        second, first, weight, None, *geometry, False, zeros, spec.groups, [False, True, False]
    )
    assert grads[1] is not None
    return grads[1]


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    # The vendor library decides; torch gives no way to ask beforehand.
    return 0


NATIVE = Strategy("native", _run, _workspace_bytes, NATIVE_RTOL)

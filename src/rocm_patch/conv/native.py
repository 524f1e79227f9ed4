"""aten's own convolution kernels (MIOpen's, cuDNN's, oneDNN's): captured beneath any override.

`_op_dk` calls the kernel that the operator has for one dispatch key. Ours go to the device's key, aten's stay
at CompositeExplicitAutograd, so these calls reach aten's and cannot come back to us. Seen to work, forward
and backward, on torch 1.13 and 2.13 (CPU) and 2.11 (CUDA).
"""

from __future__ import annotations

from typing import Any

import torch

from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, ConvSpec, transposed_output_size
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy

_CONVOLUTION = torch.ops.aten._convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_KEY = torch._C.DispatchKey.CompositeExplicitAutograd


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
    flags = (False, False, torch._C._get_cudnn_enabled(), True)
    if spec.direction == FORWARD:
        return convolution(first, second, None, *geometry, False, zeros, spec.groups, *flags)
    if spec.direction == GRAD_INPUT:
        covered = transposed_output_size(spec.out, spec.kernel, spec.stride, spec.padding, spec.dilation, zeros)
        extra = [size - reached for size, reached in zip(spec.spatial, covered, strict=True)]
        return convolution(first, second, None, *geometry, True, extra, spec.groups, *flags)
    weight = first.new_empty(spec.weight)
    grads = convolution_backward(
        second, first, weight, None, *geometry, False, zeros, spec.groups, [False, True, False]
    )
    assert grads[1] is not None
    return grads[1]


def _rejects(spec: ConvSpec) -> str | None:
    return None


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    # The vendor library decides; torch gives no way to ask beforehand.
    return 0


NATIVE = Strategy("native", _rejects, _run, _workspace_bytes, GEMM_RTOL)

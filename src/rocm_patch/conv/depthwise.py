"""depthwise: one channel per group, so a tap is a multiplication by a number, and no GEMM is worth its start.

Every tap is one fused multiply-add over the output positions that it reaches; nothing is padded or unrolled.

Letters in the shape comments: n samples, C channels, m filters per channel (the multiplier).
"""

from __future__ import annotations

import math

import torch

from rocm_patch.conv.cost import Work
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy, empty_result, sum_dtype
from rocm_patch.conv.windows import Box, at, boxes, largest_box, meeting, on_output, taps


def _whole(spec: ConvSpec) -> Box:
    return tuple(slice(0, size) for size in (spec.batch, *spec.out))


def _by_channel(spec: ConvSpec, grad: torch.Tensor) -> torch.Tensor:
    """(n, C m, *out) as (n, C, m, *out)."""
    multiplier = spec.weight[0] // spec.image[1]
    steps = grad.stride()
    size = (grad.shape[0], spec.image[1], multiplier, *grad.shape[2:])
    return grad.as_strided(size, (steps[0], steps[1] * multiplier, *steps[1:]))


def _factors(spec: ConvSpec, weight: torch.Tensor) -> torch.Tensor:
    """(R, C, m, 1, ...): what every tap multiplies by."""
    channels, ones = spec.image[1], [1] * len(spec.kernel)
    return weight.reshape(channels, -1, spec.taps).permute(2, 0, 1).reshape(spec.taps, channels, -1, *ones)


def _forward(spec: ConvSpec, image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result = empty_result(spec, image, sum_dtype(image)).zero_()
    sums = _by_channel(spec, result)
    for tap, factors in zip(taps(spec), _factors(spec, weight), strict=True):
        met = meeting(spec, tap, _whole(spec))
        if met is not None:
            reads, writes = met
            at(sums, *writes).addcmul_(at(image, *reads).unsqueeze(2), factors)
    return result.to(image.dtype)


def _grad_input(spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result = empty_result(spec, grad, sum_dtype(grad)).zero_()
    by_channel = _by_channel(spec, grad)
    for tap, factors in zip(taps(spec), _factors(spec, weight), strict=True):
        met = meeting(spec, tap, _whole(spec))
        if met is not None:
            reads, writes = met
            for part, factor in zip(at(by_channel, *writes).unbind(2), factors.unbind(1), strict=True):
                at(result, *reads).addcmul_(part, factor)
    return result.to(grad.dtype)


def _grad_weight(spec: ConvSpec, image: torch.Tensor, grad: torch.Tensor, budget: int) -> torch.Tensor:
    dtype = sum_dtype(image)
    total = image.new_zeros((spec.taps, spec.image[1], spec.weight[0] // spec.image[1]), dtype=dtype)
    over = [0, *range(3, 3 + len(spec.out))]

    def summed(products: torch.Tensor) -> torch.Tensor:
        """(n, C, m, *out) summed over samples and positions."""
        if not spec.channels_last:
            return products.sum(over)
        # torch's reduction of this layout takes a buffer larger than what it sums (torch 2.11, CUDA).
        rows = products.movedim((1, 2), (-2, -1)).reshape(-1, spec.weight[0])
        return (rows.new_ones(1, rows.shape[0]) @ rows).view(products.shape[1:3])

    def add(box: Box) -> None:
        by_channel = _by_channel(spec, grad[on_output(box)]).to(dtype)
        for index, tap in enumerate(taps(spec)):
            met = meeting(spec, tap, box)
            if met is not None:
                reads, writes = met
                part = at(image[box[0]], *reads).unsqueeze(2)
                total[index].add_(summed(at(by_channel, *writes) * part))

    for box in boxes((spec.batch, *spec.out), _position_elements(spec), budget, spec.itemsize):
        add(box)
    return total.permute(1, 2, 0).reshape(spec.weight).to(image.dtype)


def _position_elements(spec: ConvSpec) -> int:
    """Workspace of one output position in grad_weight: the products, and for half types grad in float32."""
    ones = 2 if spec.channels_last else 0
    return spec.weight[0] * (4 if spec.itemsize == 2 else 1) + ones


def _run(spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
    if spec.direction == FORWARD:
        return _forward(spec, first, second)
    if spec.direction == GRAD_INPUT:
        return _grad_input(spec, first, second)
    return _grad_weight(spec, first, second, budget)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.weight[1] != 1:
        return f"a group has {spec.weight[1]} channels, not one"
    return None


def _work(spec: ConvSpec) -> Work:
    # A pass over memory for each tap, with the sum read and written in float32.
    passes = 2 * spec.taps * (math.prod(spec.image) + 2 * math.prod(spec.grad))
    return Work(bytes=passes * max(4, spec.itemsize) / 2, launches=4 * spec.taps)


def _workspace_bytes(spec: ConvSpec, budget: int) -> int:
    if spec.direction in (FORWARD, GRAD_INPUT):
        # Of half types the sums, in float32.
        return 2 * math.prod(spec.result) * spec.itemsize if spec.itemsize == 2 else math.prod(spec.weight) * 8
    samples, *out = largest_box((spec.batch, *spec.out), _position_elements(spec), budget, spec.itemsize)
    return (samples * math.prod(out) * _position_elements(spec) + 8 * math.prod(spec.weight)) * spec.itemsize


DEPTHWISE = Strategy("depthwise", _run, _workspace_bytes, GEMM_RTOL, _rejects, _work)

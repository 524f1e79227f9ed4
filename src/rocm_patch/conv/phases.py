"""grad_input as forward convolutions of grad: one for each phase of the stride.

The image positions of one remainder by the stride meet a sub-kernel of their own, and for them the transposed
convolution is a plain one of grad with that sub-kernel flipped, of stride 1. (Known from super-resolution as
sub-pixel convolution: W. Shi et al., arXiv:1609.07009.) Each element of the result is written once, and nothing is
multiplied by the zeros that a stride puts between the elements of grad.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from rocm_patch.conv.spec import FORWARD, ConvSpec
from rocm_patch.conv.strategy import empty_result
from rocm_patch.conv.windows import at

# A forward convolution: (spec, image, weight, budget, tensor to write into or None) -> result.
Forward = Callable[[ConvSpec, torch.Tensor, torch.Tensor, int, "torch.Tensor | None"], torch.Tensor]


class Phase(NamedTuple):
    """The image positions of one remainder by the stride, and the convolution of grad that fills them."""

    spec: ConvSpec
    kernel: tuple[slice, ...]  # of the weight's kernel positions, those that meet this phase
    image: tuple[slice, ...]  # the positions


@lru_cache(maxsize=4096)
def phases(spec: ConvSpec) -> tuple[Phase, ...]:
    """The phases that any tap reaches.

    Image position x gets tap r from output position (x + p - r d) / s where that is whole. For x = f + s j the taps
    are r = first + t s / gcd(s, d), and the output positions j + (f + p - first d) / s - t d / gcd(s, d).
    """
    found = []
    for remainders in itertools.product(
        *(range(min(s, size)) for s, size in zip(spec.stride, spec.spatial, strict=True))
    ):
        dims = zip(remainders, spec.spatial, spec.kernel, spec.stride, spec.padding, spec.dilation, strict=True)
        chosen: list[tuple[slice, slice, int, int, int, int]] = []
        for f, size, k, s, p, d in dims:
            first = next((r for r in range(min(k, s)) if (f + p - r * d) % s == 0), None)
            if first is None:
                break
            step, common = s // math.gcd(s, d), math.gcd(s, d)
            count = (k - first + step - 1) // step
            dilation = d // common
            # The flipped sub-kernel starts at its last tap.
            padding = (count - 1) * dilation - (f + p - first * d) // s
            chosen.append(
                (slice(first, None, step), slice(f, None, s), count, dilation, padding, (size - f + s - 1) // s)
            )
        else:
            kernel, image, count, dilation, padding, out = zip(*chosen, strict=True)
            of_phase = dataclasses.replace(
                spec, direction=FORWARD, image=spec.grad,
                weight=(spec.image[1], spec.weight[0] // spec.groups, *count), stride=(1,) * len(out),
                padding=padding, dilation=dilation, out=out,
            )  # fmt: skip
            found.append(Phase(of_phase, kernel, image))
    return tuple(found)


def grad_input(
    forward: Forward, spec: ConvSpec, grad: torch.Tensor, weight: torch.Tensor, budget: int
) -> torch.Tensor:
    """grad (N, K, *out) and weight -> (N, C, *spatial), each phase computed by `forward`."""
    dims = list(range(-len(spec.kernel), 0))
    filters = spec.weight[0] // spec.groups
    by_group = weight.reshape(spec.groups, filters, *spec.weight[1:]).transpose(1, 2)  # (G, C, K, *kernel)
    found = phases(spec)
    result: torch.Tensor | None = None
    if math.prod(spec.stride) > 1:
        result = empty_result(spec, grad)
        if len(found) < math.prod(min(s, size) for s, size in zip(spec.stride, spec.spatial, strict=True)):
            result.zero_()
    for phase in found:
        flipped = at(by_group, *phase.kernel).flip(dims).reshape(phase.spec.weight)
        into = None if result is None else at(result, *phase.image)
        product = forward(phase.spec, grad, flipped, budget, into)
        if result is None:
            return product
    assert result is not None  # with a stride of 1 there is one phase
    return result

"""A differentiable convolution from any three functions that compute its directions.

For modules that must not go through aten's convolution at all. The three directions are the three partial
derivatives of one trilinear form sum(grad * conv(image, weight)), so each one's gradients are the other two,
and the function can be differentiated any number of times, backward and forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT

# (direction, first, second) -> result; operands in the order image, grad, weight of those that are given.
Compute = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def convolution(
    compute: Compute, image: torch.Tensor, weight: torch.Tensor, direction: str = FORWARD
) -> torch.Tensor:
    """The plain convolution of image (N, C, *spatial) with weight, differentiable; real types only.

    With the direction `grad_input` the transposed one, of an image that takes grad's place (N, K, *out).
    """
    return _Direction.apply(compute, direction, image, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, direction: str, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        ctx.compute, ctx.direction = compute, direction
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        return compute(direction, first, second)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[None, None, torch.Tensor | None, torch.Tensor | None]:
        """`outer` has the shape of the result; the two other slots of the form are the saved operands."""
        first, second = ctx.saved_tensors
        result = outer[0]

        def again(direction: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return _Direction.apply(ctx.compute, direction, a, b)  # type: ignore[no-any-return, no-untyped-call]

        _, _, needs_first, needs_second = ctx.needs_input_grad
        of_first = of_second = None
        if ctx.direction == FORWARD:  # first is image, second weight, result takes grad's place
            of_first = again(GRAD_INPUT, result, second) if needs_first else None
            of_second = again(GRAD_WEIGHT, first, result) if needs_second else None
        elif ctx.direction == GRAD_INPUT:  # first is grad, second weight, result takes image's place
            of_first = again(FORWARD, result, second) if needs_first else None
            of_second = again(GRAD_WEIGHT, result, first) if needs_second else None
        else:  # first is image, second grad, result takes weight's place
            of_first = again(GRAD_INPUT, second, result) if needs_first else None
            of_second = again(FORWARD, first, result) if needs_second else None
        return None, None, of_first, of_second

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor | None:
        """The form is linear in each operand."""
        first, second = ctx.saved_tensors
        _, _, of_first, of_second = tangents
        parts = []
        if of_first is not None:
            parts.append(_Direction.apply(ctx.compute, ctx.direction, of_first, second))  # type: ignore[no-untyped-call]
        if of_second is not None:
            parts.append(_Direction.apply(ctx.compute, ctx.direction, first, of_second))  # type: ignore[no-untyped-call]
        return sum(parts[1:], parts[0]) if parts else None

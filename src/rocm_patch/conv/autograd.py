"""A differentiable convolution from any three functions that compute its directions.

For modules that must not go through aten's convolution at all. The three directions are the three partial
derivatives of one trilinear form sum(grad * conv(image, weight)), so each one's gradients are the other two,
and the function can be differentiated any number of times, backward and forward, and mapped by vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT

# (direction, first, second) -> result; operands in the order image, grad, weight of those that are given. The number
# of samples may be another one than that of the first call.
Compute = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
_BATCHED = torch._C._dispatch_key_parse("Batched")


def convolution(
    compute: Compute, image: torch.Tensor, weight: torch.Tensor, direction: str = FORWARD
) -> torch.Tensor:
    """The plain convolution of image (N, C, *spatial) with weight, differentiable; real types only.

    With the direction `grad_input` the transposed one, of an image that takes grad's place (N, K, *out).
    """
    return _apply(compute, direction, image, weight)


def _apply(compute: Compute, direction: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    kind = _TransformedDirection if _is_transforming() else _Direction
    return kind.apply(compute, direction, first, second)  # type: ignore[no-any-return, no-untyped-call]


# Whether a transformation of torch.func (torch 2) is at work.
_is_transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, direction: str, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        _keep(ctx, (compute, direction, first, second))
        if _is_batched(first) or _is_batched(second):
            return _one_by_one(compute, direction, first, second)
        return compute(direction, first, second)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[None, None, torch.Tensor | None, torch.Tensor | None]:
        """`outer` has the shape of the result; the two other slots of the form are the saved operands."""
        first, second = ctx.saved_tensors
        result, compute = outer[0], ctx.compute
        _, _, needs_first, needs_second = ctx.needs_input_grad
        of_first = of_second = None
        if ctx.direction == FORWARD:  # first is image, second weight, result takes grad's place
            of_first = _apply(compute, GRAD_INPUT, result, second) if needs_first else None
            of_second = _apply(compute, GRAD_WEIGHT, first, result) if needs_second else None
        elif ctx.direction == GRAD_INPUT:  # first is grad, second weight, result takes image's place
            of_first = _apply(compute, FORWARD, result, second) if needs_first else None
            of_second = _apply(compute, GRAD_WEIGHT, result, first) if needs_second else None
        else:  # first is image, second grad, result takes weight's place
            of_first = _apply(compute, GRAD_INPUT, second, result) if needs_first else None
            of_second = _apply(compute, FORWARD, first, result) if needs_second else None
        return None, None, of_first, of_second

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor | None:
        """The form is linear in each operand."""
        first, second = ctx.saved_tensors
        _, _, of_first, of_second = tangents
        parts = []
        if of_first is not None:
            parts.append(_apply(ctx.compute, ctx.direction, of_first, second))
        if of_second is not None:
            parts.append(_apply(ctx.compute, ctx.direction, first, of_second))
        return sum(parts[1:], parts[0]) if parts else None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    ctx.compute, ctx.direction, *operands = inputs
    ctx.save_for_backward(*operands)
    ctx.save_for_forward(*operands)


class _TransformedDirection(_Direction):
    """The form that torch.func takes; a call of it costs several times as much."""

    @staticmethod
    def forward(  # type: ignore[override]
        compute: Compute, direction: str, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        return compute(direction, first, second)

    setup_context = staticmethod(_keep)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, compute: Compute, direction: str, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """One call with all samples where the weight is shared, else one for each."""
        _, _, dim_of_first, dim_of_second = in_dims
        if dim_of_second is None and direction != GRAD_WEIGHT:
            batched = first.movedim(dim_of_first, 0)
            result = _apply(compute, direction, batched.flatten(0, 1), second)
            return result.reshape(*batched.shape[:2], *result.shape[1:]), 0
        each = zip(
            _each(first, dim_of_first, info.batch_size), _each(second, dim_of_second, info.batch_size), strict=True
        )
        return torch.stack([_apply(compute, direction, a, b) for a, b in each]), 0


def _each(operand: torch.Tensor, dim: int | None, size: int) -> list[torch.Tensor]:
    return [operand] * size if dim is None else list(operand.unbind(dim))


def _is_batched(operand: torch.Tensor) -> bool:
    """Whether the vmap inside torch.autograd (is_grads_batched=, vectorize=True) is at work on it."""
    return bool(torch._C._dispatch_keys(operand).has(_BATCHED))


def _one_by_one(compute: Compute, direction: str, *operands: torch.Tensor) -> torch.Tensor:
    """That vmap has no rule for many of the operators that convolutions are computed with."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    plain = [torch._remove_batch_dim(operand, level, 1, 0) if _is_batched(operand) else None for operand in operands]
    size = next(len(tensor) for tensor in plain if tensor is not None)
    first, second = (
        [operand] * size if tensor is None else list(tensor.unbind(0))
        for operand, tensor in zip(operands, plain, strict=True)
    )
    results = [compute(direction, a, b) for a, b in zip(first, second, strict=True)]
    return torch._add_batch_dim(torch.stack(results), 0, level)

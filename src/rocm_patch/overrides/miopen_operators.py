"""aten's operators that name MIOpen, served without it: for programs that call them, and graphs that were frozen.

aten's own convolutions and norms reach them only while its cudnn flag is on. A program that calls one directly, a
TorchScript model after `optimize_for_inference` (miopen_convolution_relu) and `torch.batch_norm` with a flag of the
program's own (torch 1.13) reach MIOpen past that flag. Only for the policy `bypass`: nothing of aten's is left
beneath these kernels, so native convolutions could not run any more. `miopen_rnn` is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rocm_patch.dispatch import Dispatcher

_BatchNorm = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def kernels(dispatcher: Dispatcher) -> dict[str, Callable[..., Any]]:
    """From an operator's name in aten to a function with its signature."""

    def miopen_convolution(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        benchmark: bool,
        deterministic: bool,
    ) -> torch.Tensor:
        none = [0] * (input.dim() - 2)
        return dispatcher.convolution(input, weight, bias, stride, padding, dilation, False, none, groups)

    def miopen_convolution_transpose(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        padding: Sequence[int],
        output_padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        benchmark: bool,
        deterministic: bool,
    ) -> torch.Tensor:
        return dispatcher.convolution(input, weight, bias, stride, padding, dilation, True, output_padding, groups)

    def miopen_convolution_relu(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> torch.Tensor:
        none = [0] * (input.dim() - 2)
        return dispatcher.convolution(input, weight, bias, stride, padding, dilation, False, none, groups).relu_()

    def miopen_convolution_add_relu(
        input: torch.Tensor,
        weight: torch.Tensor,
        z: torch.Tensor,
        alpha: float | None,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> torch.Tensor:
        none = [0] * (input.dim() - 2)
        result = dispatcher.convolution(input, weight, bias, stride, padding, dilation, False, none, groups)
        return result.add_(z, alpha=1 if alpha is None else alpha).relu_()

    return {
        "miopen_convolution": miopen_convolution,
        "miopen_depthwise_convolution": miopen_convolution,
        "miopen_convolution_transpose": miopen_convolution_transpose,
        "miopen_convolution_relu": miopen_convolution_relu,
        "miopen_convolution_add_relu": miopen_convolution_add_relu,
        "miopen_batch_norm": _batch_norm,
        "miopen_batch_norm_backward": _batch_norm_backward,
    }


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    exponential_average_factor: float,
    epsilon: float,
) -> _BatchNorm:
    norm: Callable[..., _BatchNorm] = torch.ops.aten.native_batch_norm
    return norm(input, weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon)


def _batch_norm_backward(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    save_mean: torch.Tensor | None,
    save_var: torch.Tensor | None,
    epsilon: float,
) -> _BatchNorm:
    # save_var is 1 / sqrt(variance + epsilon), as native's save_invstd: MIOpen's name is resultSaveInvVariance.
    backward: Callable[..., _BatchNorm] = torch.ops.aten.native_batch_norm_backward
    return backward(
        grad_output, input, weight, running_mean, running_var, save_mean, save_var, True, epsilon, [True] * 3
    )

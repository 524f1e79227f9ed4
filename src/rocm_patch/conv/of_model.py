"""The convolutions of a model, found without running a kernel: its forward on the meta device, shapes only."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rocm_patch.conv.call import Geometry, forward_spec
from rocm_patch.conv.spec import DIRECTIONS, ConvSpec

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Notes every convolution that passes: what its operands look like, and its other arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _CONVOLUTIONS:
            looks = [None if x is None else (x.shape, x.stride(), x.dtype) for x in args[:3]]
            self.found.append((looks, *args[3:9]))
        return function(*args, **(kwargs or {}))


def specs_of_model(
    model: torch.nn.Module, shapes: Sequence[tuple[int, ...]], dtype: str, device: str, channels_last: bool
) -> list[ConvSpec]:
    """Every convolution of a forward pass, in all three directions.

    Args:
        model: left as it is; a copy goes to the meta device.
        shapes: of the inputs, in order.
        dtype: torch's name of the type of parameters and inputs.
        device: the device that the specs are for.
        channels_last: whether 4-d and 5-d inputs and weights are in that memory format.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: whatever the model raises for these inputs.
    """
    element_type = getattr(torch, dtype)
    moved = copy.deepcopy(model).to(device="meta", dtype=element_type)
    inputs = [torch.empty(shape, device="meta", dtype=element_type) for shape in shapes]
    if channels_last:
        inputs = [_channels_last(x) for x in inputs]
        for parameter in moved.parameters():
            parameter.data = _channels_last(parameter.data)
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        moved(*inputs)
    found: dict[ConvSpec, None] = {}
    for looks, *geometry in recorder.found:
        for direction in DIRECTIONS:
            spec = _spec(looks, geometry, device)
            if spec is not None:
                found[dataclasses.replace(spec, direction=direction)] = None
    return list(found)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    last = _LAST.get(tensor.dim())
    return tensor if last is None else tensor.contiguous(memory_format=last)


def _spec(looks: Sequence[Any], geometry: Sequence[Any], device: str) -> ConvSpec | None:
    """The spec on a device: aten says which memory format it has there, and needs no memory to say it."""
    with FakeTensorMode():
        operands = [
            None if look is None else torch.empty_strided(look[0], look[1], dtype=look[2], device=device)
            for look in looks
        ]
        stride, padding, dilation, transposed, output_padding, groups = geometry
        arguments = Geometry(
            tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups
        )
        assert operands[0] is not None
        assert operands[1] is not None
        return forward_spec(operands[0], operands[1], operands[2], arguments)

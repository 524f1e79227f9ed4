"""Operands with channels last in memory, as implicit GEMMs sum over them: copies where they are not so already.

The two operands of a product take one kernel together: to start a second one takes the host longer than it takes a
large card to run it.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch

from rocm_patch.conv.fused import cdiv, dense, next_power_of_2
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.kernels.launch import Launch, fits


class Copy(NamedTuple):
    """A dense (n, C, *rest) as (n, *rest, C).

    Attributes:
        shape: n, C and the rest.
        strides: of n, C and the rest, where it is to be read as another tensor than it is; then it is always copied.
        is_shared: another direction of the same call may want the same copy.
    """

    shape: tuple[int, ...]
    strides: tuple[int, int, int] | None = None
    is_shared: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """C, the rest, and the strides."""
        channels, length = self.shape[1], math.prod(self.shape[2:])
        return channels, length, *(self.strides or (channels * length, length, 1))

    @property
    def block(self) -> tuple[int, int]:
        """Channels and positions of a program."""
        channels, length, *_ = self.sizes
        return min(_SIDE, next_power_of_2(channels)), min(_SIDE, next_power_of_2(length))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of positions, blocks of channels, n."""
        channels, length, *_ = self.sizes
        return cdiv(length, self.block[1]), cdiv(channels, self.block[0]), self.shape[0]


# A block of the copy between the formats.
_SIDE = 64


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether its memory is dense with channels last."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last) and fits(tensor)
    if tensor.dim() == 5:
        return tensor.is_contiguous(memory_format=torch.channels_last_3d) and fits(tensor)
    return False


def to_last(spec: ConvSpec, copy: Copy) -> Launch:
    """The kernel of one copy; type and device are the spec's."""
    return Launch(
        "layout", "channels_to_last", (spec.dtype, spec.dtype),
        dict(zip(("C", "L", "xn", "xc", "xl"), copy.sizes, strict=True)),
        dict(zip(("CHANNELS", "POSITIONS"), copy.block, strict=True)),
        copy.grid, spec.device, aligned=("C", "L", "xc"),
    )  # fmt: skip


def _both_to_last(spec: ConvSpec, first: Copy, second: Copy) -> Launch:
    blocks = math.prod(first.grid)
    names = ("C", "L", "xn", "xc", "xl", "C2", "L2", "x2n", "x2c", "x2l")
    constants = ("CHANNELS", "POSITIONS", "CHANNELS2", "POSITIONS2")
    return Launch(
        "layout", "two_to_last", (spec.dtype,) * 4,
        dict(zip(names, (*first.sizes, *second.sizes), strict=True)) | {"BLOCKS": blocks},
        dict(zip(constants, (*first.block, *second.block), strict=True)),
        (blocks + math.prod(second.grid),), spec.device, aligned=("C", "L", "xc", "C2", "L2", "x2c"),
    )  # fmt: skip


class _SharedCopies(threading.local):
    """Within, both gradients of one convolution use one copy of what they both read.

    A context manager; one for all threads, that has each thread's own.
    """

    is_open = False
    source: torch.Tensor | None = None
    copy: torch.Tensor | None = None

    def __enter__(self) -> None:
        self.is_open = True

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self.source = self.copy = None


SHARED_COPIES = _SharedCopies()


class ToLast:
    """Brings the operands of a product to channels last.

    Args:
        spec: gives type and device.
        first, second: what they are; without a second one, or with None in its place, the first alone.
    """

    def __init__(self, spec: ConvSpec, first: Copy, second: Copy | None = None) -> None:
        self._first, self._second = first, second
        self._each = [to_last(spec, copy) for copy in (first, second) if copy is not None]
        self._both = None if second is None else _both_to_last(spec, first, second)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The kernels."""
        return (*self._each, *([] if self._both is None else [self._both]))

    def one(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first with channels last."""
        found = _found(self._first, tensor)
        return _copied(self._first, self._each[0], tensor) if found is None else found

    def both(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both with channels last."""
        assert self._second is not None
        assert self._both is not None
        found, found_second = _found(self._first, first), _found(self._second, second)
        if found is None and found_second is None:
            from_first, from_second = dense(first), dense(second)
            found, found_second = from_first.new_empty(from_first.numel()), from_second.new_empty(from_second.numel())
            self._both(from_first, found, from_second, found_second)
            _share(self._first, first, found)
            _share(self._second, second, found_second)
            return found, found_second
        if found is None:
            found = _copied(self._first, self._each[0], first)
        if found_second is None:
            found_second = _copied(self._second, self._each[1], second)
        return found, found_second


def _found(copy: Copy, tensor: torch.Tensor) -> torch.Tensor | None:
    """What needs no copy: the tensor itself, or the copy that the other gradient has made."""
    if copy.strides is None and is_channels_last(tensor):
        return tensor
    return SHARED_COPIES.copy if copy.is_shared and SHARED_COPIES.source is tensor else None


def _copied(copy: Copy, launch: Launch, tensor: torch.Tensor) -> torch.Tensor:
    source = dense(tensor)
    result = source.new_empty(source.numel())
    launch(source, result)
    _share(copy, tensor, result)
    return result


def _share(copy: Copy, tensor: torch.Tensor, result: torch.Tensor) -> None:
    if copy.is_shared and SHARED_COPIES.is_open:
        SHARED_COPIES.source, SHARED_COPIES.copy = tensor, result

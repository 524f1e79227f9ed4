"""Which elements meet in a convolution: windows of the image as views, kernel taps as pairs of slices.

Shared by the algorithms. Nothing here computes a product.

A *box* is a part of a convolution's output: a slice of the samples and one per spatial dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from rocm_patch.conv.spec import GRAD_WEIGHT, ConvSpec

Box = tuple[slice, ...]

# Kernels and BLAS libraries take sizes of 32 bits, or are slower beyond them: no buffer of ours has more elements.
_MOST_ELEMENTS = 2**31 - 1


def boxes(
    extents: Sequence[int], elements: int, budget: int, itemsize: int, most_positions: int = _MOST_ELEMENTS
) -> Iterator[Box]:
    """Boxes that tile (N, *out), each as large as a budget allows; the first one is the largest.

    Args:
        extents: samples and output positions, (N, *out).
        elements: workspace per output position, in elements.
        budget: bytes; a box of one position may take more.
        itemsize: bytes per element.
        most_positions: samples times output positions of a box, at most.
    """
    elements = max(1, elements)
    yield from _boxes(tuple(extents), elements, min(budget // itemsize, _MOST_ELEMENTS, most_positions * elements))


def _boxes(extents: tuple[int, ...], elements: int, most: int) -> Iterator[Box]:
    inner = math.prod(extents[1:]) * elements
    if inner <= most or len(extents) == 1:
        step = max(1, most // inner)
        rest = tuple(slice(0, size) for size in extents[1:])
        for first in range(0, extents[0], step):
            yield slice(first, min(first + step, extents[0])), *rest
        return
    for one in range(extents[0]):
        for smaller in _boxes(extents[1:], elements, most):
            yield slice(one, one + 1), *smaller


def longest_sum(spec: ConvSpec) -> int:
    """How many positions grad_weight may sum in one product.

    Matrix units round the sums of half types towards zero, so that long ones come out too small: on an H200 a sum
    of 12 million products by 2 %. Pieces are added up in float32.
    """
    return 1 << 19 if spec.itemsize == 2 and spec.direction == GRAD_WEIGHT else _MOST_ELEMENTS


def largest_box(
    extents: Sequence[int], elements: int, budget: int, itemsize: int, most_positions: int = _MOST_ELEMENTS
) -> tuple[int, ...]:
    """Samples and output positions of the largest of `boxes`."""
    return sizes(next(boxes(extents, elements, budget, itemsize, most_positions)))


def sizes(box: Box) -> tuple[int, ...]:
    """Samples and output positions of a box."""
    return tuple(part.stop - part.start for part in box)


def is_whole(box: Box, extents: Sequence[int]) -> bool:
    """Whether a box is all of (N, *out)."""
    return sizes(box) == tuple(extents)


def on_output(box: Box) -> tuple[slice, ...]:
    """The index of a box in a tensor (N, K, *out)."""
    return (box[0], slice(None), *box[1:])


def at(tensor: torch.Tensor, *index: slice) -> torch.Tensor:
    """The part of a tensor's last dimensions under an index, a view."""
    for dim, part in enumerate(index, start=tensor.dim() - len(index)):
        if part != slice(None):
            tensor = tensor[(slice(None),) * dim + (part,)]
    return tensor


def window_extent(spec: ConvSpec, out: Sequence[int]) -> tuple[int, ...]:
    """Spatial size of the part of a padded image that so many output positions read."""
    return tuple(
        (size - 1) * s + d * (k - 1) + 1
        for size, s, d, k in zip(out, spec.stride, spec.dilation, spec.kernel, strict=True)
    )


def windows(spec: ConvSpec, image: torch.Tensor, box: Box) -> torch.Tensor:
    """The image's windows under a box as (n, C, *kernel, *out).

    A view, of the image itself where the box reads no padding, else of a copy of the part that it reads.
    """
    part = padded_part(spec, image, box)
    steps = part.stride()
    size = (part.shape[0], part.shape[1], *spec.kernel, *sizes(box)[1:])
    stride = (
        *steps[:2],
        *(step * d for step, d in zip(steps[2:], spec.dilation, strict=True)),
        *(step * s for step, s in zip(steps[2:], spec.stride, strict=True)),
    )
    return part.as_strided(size, stride, part.storage_offset())


def padded_part(spec: ConvSpec, image: torch.Tensor, box: Box) -> torch.Tensor:
    """What a box reads of the padded image: cut out, and padded with zeros."""
    image = image[box[0]]
    amounts: list[int] = []
    extents = window_extent(spec, sizes(box)[1:])
    for dim, (rows, s, p, extent) in enumerate(
        zip(box[1:], spec.stride, spec.padding, extents, strict=True), start=2
    ):
        first = rows.start * s - p
        start, stop = max(first, 0), min(first + extent, image.shape[dim])
        if stop <= start:  # only padding is read
            start = stop = 0
        image = image.narrow(dim, start, stop - start)
        before = max(0, -first) if stop > start else extent
        amounts[:0] = before, extent - before - (stop - start)
    return F.pad(image, amounts) if any(amounts) else image


def taps(spec: ConvSpec) -> list[tuple[int, ...]]:
    """The kernel's positions, in the order of the weight's memory."""
    found: list[tuple[int, ...]] = [()]
    for size in spec.kernel:
        found = [(*tap, position) for tap in found for position in range(size)]
    return found


def meeting(spec: ConvSpec, tap: tuple[int, ...], box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The image positions that a tap reads, and the output positions of a box that they go to.

    Both index spatial dimensions, the second one counted from the box's start; None where the tap reads padding
    only.
    """
    reads, writes = [], []
    for position, rows, size, s, p, d in zip(
        tap, box[1:], spec.spatial, spec.stride, spec.padding, spec.dilation, strict=True
    ):
        shift = position * d - p
        start = max(rows.start, -(shift // s))
        stop = min(rows.stop, (size - 1 - shift) // s + 1)
        if start >= stop:
            return None
        reads.append(slice(start * s + shift, (stop - 1) * s + shift + 1, s))
        writes.append(slice(start - rows.start, stop - rows.start))
    return tuple(reads), tuple(writes)

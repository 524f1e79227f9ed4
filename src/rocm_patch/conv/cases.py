"""Convolutions that tests, verification and benchmarks share: small, and each here for a reason."""

from __future__ import annotations

from dataclasses import dataclass

from rocm_patch.conv.spec import ConvSpec, output_size


@dataclass(frozen=True)
class Case:
    """A plain convolution: shapes as in `ConvSpec`, and why it is tried."""

    why: str
    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def spec(
        self, direction: str, dtype: str = "float32", device: str = "cpu", channels_last: bool = False
    ) -> ConvSpec:
        """The case as a `ConvSpec`."""
        out = output_size(self.image[2:], self.weight[2:], self.stride, self.padding, self.dilation)
        return ConvSpec(
            direction, self.image, self.weight, self.stride, self.padding, self.dilation, self.groups, out,
            dtype, device, channels_last,
        )  # fmt: skip


CASES: tuple[Case, ...] = (
    Case("one tap", (3, 6, 9, 7), (5, 6, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("one tap with stride: skips positions", (2, 6, 9, 8), (5, 6, 1, 1), (2, 3), (0, 0), (1, 1)),
    Case("one tap with padding: not pointwise", (2, 4, 5, 5), (3, 4, 1, 1), (1, 1), (1, 2), (1, 1)),
    Case("3x3 as in every network", (4, 5, 11, 9), (7, 5, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("3x3 stride 2, last column unused", (2, 5, 10, 9), (4, 5, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("7x7 stride 2 stem", (2, 3, 23, 21), (8, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    Case("patches: stride equals kernel", (2, 3, 16, 16), (6, 3, 4, 4), (4, 4), (0, 0), (1, 1)),
    Case("dilated, unequal sides", (2, 4, 13, 15), (3, 4, 3, 2), (1, 2), (2, 1), (2, 3)),
    Case("even kernel", (2, 3, 8, 8), (4, 3, 2, 4), (1, 1), (1, 2), (1, 1)),
    Case("grouped", (2, 6, 8, 8), (9, 2, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    Case("depthwise with multiplier 2", (2, 4, 9, 9), (8, 1, 3, 3), (2, 2), (1, 1), (1, 1), 4),
    Case("padding beyond the kernel", (1, 2, 4, 4), (3, 2, 2, 2), (1, 1), (3, 3), (1, 1)),
    Case("one channel, one filter", (2, 1, 6, 6), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("42x42, where RDNA1 was reported to hang", (1, 3, 42, 42), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("1-d", (3, 4, 17), (6, 4, 5), (2,), (2,), (1,)),
    Case("1-d grouped, dilated", (2, 6, 20), (4, 3, 3), (1,), (4,), (4,), 2),
    Case("1-d one tap", (2, 4, 9), (3, 4, 1), (1,), (0,), (1,)),
    Case("3-d", (2, 3, 6, 7, 5), (4, 3, 3, 2, 3), (1, 1, 1), (1, 0, 1), (1, 1, 1)),
    Case("3-d strided, dilated, grouped", (2, 4, 9, 8, 7), (6, 2, 3, 3, 2), (2, 1, 2), (1, 2, 0), (1, 2, 1), 2),
    Case("3-d one tap with stride", (2, 3, 4, 5, 6), (4, 3, 1, 1, 1), (2, 1, 2), (0, 0, 0), (1, 1, 1)),
)

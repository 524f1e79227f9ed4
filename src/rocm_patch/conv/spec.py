"""One convolution as a value: everything that decides how it can be computed, and no tensor.

A convolution links three tensors, named here after the plain (not transposed) operation:

    image   (N, C, *spatial)          what forward reads
    weight  (K, C / groups, *kernel)
    grad    (N, K, *out)              what forward writes, and what backward starts from

and has three directions, each computing one of the three from the other two. A transposed convolution is
`grad_input` of the plain one, so three directions cover every call.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORWARD = "forward"
GRAD_INPUT = "grad_input"
GRAD_WEIGHT = "grad_weight"
DIRECTIONS = (FORWARD, GRAD_INPUT, GRAD_WEIGHT)


@dataclass(frozen=True)
class ConvSpec:
    """The description of one convolution in one direction.

    Attributes:
        direction: `forward`, `grad_input` or `grad_weight`.
        image: shape (N, C, *spatial).
        weight: shape (K, C / groups, *kernel).
        stride: one step per spatial dimension; padding and dilation likewise (zeros on both sides).
        out: spatial size of `grad`. Not derivable for a transposed convolution with output_padding, so kept.
        dtype: torch's name of the element type, `float32` for example.
        device: torch's name of the device, `cuda:0` for example.
        channels_last: whether aten lays the result out as channels_last(_3d).
    """

    direction: str
    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    out: tuple[int, ...]
    dtype: str
    device: str
    channels_last: bool = False

    @property
    def batch(self) -> int:
        """N."""
        return self.image[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial size of the weight."""
        return self.weight[2:]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Spatial size of the image."""
        return self.image[2:]

    @property
    def grad(self) -> tuple[int, ...]:
        """Shape (N, K, *out) of what forward writes."""
        return (self.image[0], self.weight[0], *self.out)

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of what this direction computes."""
        if self.direction == FORWARD:
            return self.grad
        return self.image if self.direction == GRAD_INPUT else self.weight

    @property
    def taps(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.kernel)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"complex128": 16, "complex64": 8, "float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def summed_length(self) -> int:
        """Number of products summed into one element of the result, at most."""
        if self.direction == FORWARD:
            return self.weight[1] * self.taps
        if self.direction == GRAD_INPUT:
            return self.weight[0] // self.groups * self.taps
        return self.batch * math.prod(self.out)

    def to_json(self) -> str:
        """The spec as one line of JSON, the same for equal specs; without the device's number.

        Which device it was is the affair of whoever keeps the text.
        """
        fields = dataclasses.asdict(self)
        fields["device"] = self.device.partition(":")[0]
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    def from_json(text: str, device: str | None = None) -> ConvSpec:
        """The spec that `to_json` wrote, on a device of that kind.

        Args:
            text: one line of JSON.
            device: `cuda:1` for example; without it the device's kind.

        Raises:
            ValueError: the text is no such line.
        """
        try:
            fields = json.loads(text)
            shaped: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            spec = ConvSpec(**shaped)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a convolution: {text!r}") from error
        return spec if device is None else dataclasses.replace(spec, device=device)

    def __str__(self) -> str:
        """One line for logs and reports."""
        parts = [self.direction, "x".join(map(str, self.image)), "by", "x".join(map(str, self.weight))]
        for label, values, default in (
            ("stride", self.stride, 1),
            ("padding", self.padding, 0),
            ("dilation", self.dilation, 1),
        ):
            if any(value != default for value in values):
                parts.append(f"{label} {'x'.join(map(str, values))}")
        if self.groups != 1:
            parts.append(f"groups {self.groups}")
        parts += [self.dtype, self.device]
        if self.channels_last:
            parts.append("channels_last")
        return " ".join(parts)


def output_size(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of a plain convolution's output (formula in the documentation of `torch.nn.Conv2d`)."""
    return tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(spatial, kernel, stride, padding, dilation, strict=True)
    )


def transposed_output_size(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of a transposed convolution's output (formula in `torch.nn.ConvTranspose2d`)."""
    return tuple(
        (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for size, k, s, p, d, extra in zip(spatial, kernel, stride, padding, dilation, output_padding, strict=True)
    )

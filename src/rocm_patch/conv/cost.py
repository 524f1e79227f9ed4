"""How long a strategy is likely to take: its work over the rates of the device. Ranks strategies before any is timed.

A model of a few numbers, right in its order more often than in its seconds: tests/test_cost.py holds it against the
times that were measured on an H200. What was timed on the user's own card goes before it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from rocm_patch.conv.spec import ConvSpec


class Work(NamedTuple):
    """What a strategy does for a spec.

    Attributes:
        flops: of matrix products, two for a multiply-add.
        efficiency: the share of the GEMM rate that they reach.
        bytes: read and written in memory.
        launches: of kernels, each of which costs the host time; torch operations in between are counted as far as
            the host's time for a small call (H200) says that they weigh.
        loads: elements that are loaded for products in registers.
    """

    flops: float = 0.0
    efficiency: float = 1.0
    bytes: float = 0.0
    launches: float = 1.0
    loads: float = 0.0


class Rates(NamedTuple):
    """What a device does in a second.

    Attributes:
        gemm: flops in matrix products of float32.
        gemm_half: likewise of the half types.
        bytes: copied in memory, those read and those written counted.
        loads: elements loaded for products in registers.
        launch_seconds: of the host for one kernel.
        processors: programs side by side that fill it.
    """

    gemm: float
    gemm_half: float
    bytes: float
    loads: float
    launch_seconds: float
    processors: int


# Measured on an H200 (`rocm-patch bench`); for AMD about 0.7 of the published peaks of a card of the family (RX
# 5600 XT, RX 7600, RX 9060, RX Vega 56): not yet run on AMD hardware. The order of strategies hangs on the ratios.
_H200 = Rates(51e12, 765e12, 4.2e12, 1.4e12, 6e-6, 132)
_FAMILIES = {
    "gfx10": Rates(5e12, 10e12, 2.0e11, 2e11, 8e-6, 36),
    "gfx11": Rates(15e12, 30e12, 2.0e11, 4e11, 8e-6, 32),
    "gfx12": Rates(15e12, 60e12, 2.3e11, 4e11, 8e-6, 32),
    "gfx9": Rates(7e12, 14e12, 2.9e11, 3e11, 8e-6, 56),
}
_CPU = Rates(1e11, 2e10, 2e10, 1e9, 3e-6, 2)


@cache
def rates(device: str) -> Rates:
    """The rates of a device, by torch's name of it; of an H200 where no GPU is there to be asked."""
    if not device.startswith("cuda"):
        return _CPU
    if torch.version.hip and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        arch = getattr(properties, "gcnArchName", "gfx10")
        family = next((found for name, found in _FAMILIES.items() if arch.startswith(name)), _FAMILIES["gfx10"])
        # Cards of a family differ by their size more than by anything else.
        scale = properties.multi_processor_count / family.processors
        return Rates(
            family.gemm * scale, family.gemm_half * scale, family.bytes * scale, family.loads * scale,
            family.launch_seconds, properties.multi_processor_count,
        )  # fmt: skip
    return _H200


_HOSTS_SHARE = 0.3


def seconds(spec: ConvSpec, work: Work) -> float:
    """The time of some work on a spec's device, and a share of what it costs the host, which other work may hide."""
    of = rates(spec.device)
    gemm = of.gemm_half if spec.itemsize == 2 else of.gemm
    if spec.dtype in ("float64", "complex128"):
        gemm /= 2
    on_device = work.flops / (gemm * work.efficiency) + work.bytes / of.bytes + work.loads / of.loads
    return on_device + _HOSTS_SHARE * work.launches * of.launch_seconds


def flops(spec: ConvSpec) -> float:
    """Of the convolution itself, the same in all directions."""
    return 2.0 * math.prod(spec.grad) * spec.weight[1] * spec.taps


def operand_bytes(spec: ConvSpec) -> float:
    """Of image, weight and grad, each once."""
    return float((math.prod(spec.image) + math.prod(spec.weight) + math.prod(spec.grad)) * spec.itemsize)


def column_bytes(spec: ConvSpec) -> float:
    """Of the image unrolled into columns."""
    return float(spec.image[1] * spec.taps * spec.batch * math.prod(spec.out) * spec.itemsize)


# What a program of a BLAS library computes, about.
_SIDE = 128
# Libraries cut long sums where the blocks are few.
_LEAST_FILLED = 0.35


def filled(spec: ConvSpec, rows: int, columns: int, products: int) -> float:
    """The share of a device that some products of (rows, columns) keep busy."""
    blocks = -(-rows // _SIDE) * -(-columns // _SIDE) * products
    padding = math.sqrt(min(1.0, rows / _SIDE))
    return max(_LEAST_FILLED, min(1.0, blocks / rates(spec.device).processors)) * padding

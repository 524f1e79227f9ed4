"""The columns of a few samples at a time, and the kernels that write them and add them up."""

from __future__ import annotations

import math

from rocm_patch.conv.fused import cdiv, copies_to_first, next_power_of_2, only, sizes_of
from rocm_patch.conv.spec import GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.kernels.launch import Launch
from rocm_patch.kernels.variant import POINTER_BYTES

# Columns of one piece: of the order of a large card's last cache (50 MB on an H200, 32 to 128 MB on RDNA2 and 3), and
# enough for products that fill it.
PIECE_BYTES = 64 << 20
# Rows and positions of a program, the first where no more of it lies beyond a map's end: of those tried on an H200
# the fastest. And the fewest rows of any.
_BLOCKS = ((4, 512), (8, 256))
ROWS = 4
_FOLD_TILE = 256
# Below so many blocks side by side a batch of products leaves a large card idle.
_FEWEST_BLOCKS = 64


class Pieces:
    """Samples at a time, and a kernel for as many and one for the rest.

    Attributes:
        rows, length: of a sample's columns: channels times taps, positions.
        batch, samples: of all, and of a piece.
        starts: first sample of each piece.
        bytes: workspace: a piece's columns, and copies of operands that are not channels first.
        is_one_product: the columns of a piece's samples stand side by side, (rows, n length), instead of one sample's
            after the other's.
        launches: the kernel that writes columns, or for grad_input adds them up, by number of samples.
    """

    def __init__(self, spec: ConvSpec) -> None:
        self.rows, self.length = spec.image[1] * spec.taps, math.prod(spec.out)
        bytes_each = self.rows * self.length * spec.itemsize
        self.samples = spec.batch
        if spec.batch * bytes_each > PIECE_BYTES:
            # A piece begins where the kernels may take it.
            whole = POINTER_BYTES // math.gcd(POINTER_BYTES, math.prod(spec.image[1:]) * spec.itemsize)
            self.samples = min(spec.batch, max(1, PIECE_BYTES // bytes_each // whole) * whole)
        self.bytes = copies_to_first(spec) + self.samples * bytes_each
        sizes = sizes_of(spec)
        make = _fold if spec.direction == GRAD_INPUT else _unfold
        counts = {self.samples, spec.batch % self.samples} - {0}
        # For one product of all samples of a piece their columns stand side by side.
        is_small = spec.itemsize == 2 or _blocks(spec) * self.samples < _FEWEST_BLOCKS
        self.is_one_product = spec.direction == GRAD_WEIGHT and is_small
        self.launches = {n: make(spec, sizes, n, self.is_one_product) for n in counts}
        self.starts = range(0, spec.batch, self.samples)
        self.batch = spec.batch


def _blocks(spec: ConvSpec) -> int:
    """Blocks of a BLAS library in the product for a sample's share of grad_weight."""
    return cdiv(spec.weight[0], 128) * cdiv(spec.image[1] * spec.taps, 128)


def _unfold(spec: ConvSpec, sizes: dict[str, int], samples: int, beside: bool) -> Launch:
    rows, length = spec.image[1] * spec.taps, math.prod(spec.out)
    strides = {"yn": length, "yr": samples * length} if beside else {"yn": rows * length, "yr": length}
    high, wide = min(_BLOCKS, key=lambda block: cdiv(length, block[1]) * block[1])
    return Launch(
        "layout", "unfold", (spec.dtype, spec.dtype), {**only(sizes, "N", "G", "K"), **strides},
        {"DEPTH": len(spec.kernel) == 3, "ROWS": high, "POSITIONS": wide},
        (cdiv(length, wide), cdiv(rows, high), samples), spec.device,
    )  # fmt: skip


def _fold(spec: ConvSpec, sizes: dict[str, int], samples: int, beside: bool) -> Launch:
    columns = min(128, next_power_of_2(sizes["W"]))
    rows = min(_FOLD_TILE // columns, next_power_of_2(sizes["H"]))
    kernel = {name: sizes[name] for name in ("KD", "KH", "KW")}
    return Launch(
        "layout", "fold", (spec.dtype, spec.dtype), only(sizes, "N", "G", "K", *kernel),
        {**kernel, "ROWS": rows, "POSITIONS": columns},
        (samples * sizes["C"] * sizes["D"] * cdiv(sizes["H"], rows), cdiv(sizes["W"], columns)), spec.device,
    )  # fmt: skip

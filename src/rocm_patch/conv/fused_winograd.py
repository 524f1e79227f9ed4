"""fused_winograd: Winograd's F(4x4,3x3) with a kernel per transform, float32.

The mathematics and its error are those of `winograd`; here every transform reads and writes memory once, and what is
between them, for as many tiles at a time as keeps it small, is read back from a cache where that is large enough.
"""

from __future__ import annotations

import math

import torch

from rocm_patch.conv import cost
from rocm_patch.conv.cost import Work
from rocm_patch.conv.fused import (
    MOST_BLOCKS,
    Fused,
    Plan,
    cdiv,
    copies_to_first,
    dense,
    result_of,
)
from rocm_patch.conv.spec import FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import memory_format
from rocm_patch.conv.to_last import is_channels_last
from rocm_patch.conv.winograd import WINOGRAD_F43, flipped
from rocm_patch.kernels.launch import Launch, multiprocessors

_PLACES = 36
# Transformed tiles of one piece: at least so much, or as much as image and result.
_PIECE_BYTES = 64 << 20
_TILES, _WARPS = 128, 4
# In channels last a program's lanes run along the channels.
_LAST_TILES, _LAST_CHANNELS = 4, 32
_FILTER_ROWS, _FILTER_COLUMNS = 8, 32
_BACK_ENTRIES = 128
# Of the sizes tried on an H200 (256 to 2048), shorter sums cost more than what they fill.
_FEWEST_IN_SPLIT = 1024


class _Tiles:
    """The tiles of a convolution, and how many are taken at a time.

    Args:
        spec: forward or grad_weight.
        multiple: pieces are a multiple of so many tiles, except the last.
    """

    def __init__(self, spec: ConvSpec, multiple: int) -> None:
        self.high, self.wide = cdiv(spec.out[0], 4), cdiv(spec.out[1], 4)
        self.count = spec.batch * self.high * self.wide
        channels, filters = spec.image[1], spec.weight[0]
        self.bytes_each = _PLACES * (channels + filters) * spec.itemsize
        operands = (math.prod(spec.image) + math.prod(spec.grad)) * spec.itemsize
        at_once = max(_PIECE_BYTES, operands) // self.bytes_each
        # Offsets are 32-bit.
        at_once = min(at_once, (2**31 - 1) // (_PLACES * max(channels, filters)))
        self.at_once = min(self.count, max(1, at_once // multiple) * multiple)

    def pieces(self) -> list[tuple[int, int]]:
        """First tile and number of tiles of each."""
        return [(first, min(self.at_once, self.count - first)) for first in range(0, self.count, self.at_once)]


def _grid(count: int, channels: int, last: bool) -> tuple[int, int]:
    tiles, rows = (_LAST_TILES, _LAST_CHANNELS) if last else (_TILES, 1)
    return cdiv(count, tiles), cdiv(channels, rows)


def _transform(
    spec: ConvSpec,
    name: str,
    types: tuple[str, ...],
    rows: str,
    integers: dict[str, int],
    has_bias: bool | None = None,
) -> Launch:
    last = spec.channels_last
    constants: dict[str, int | bool] = {} if has_bias is None else {"HAS_BIAS": has_bias}
    block = (_LAST_CHANNELS, _LAST_TILES) if last else (1, _TILES)
    constants |= {"LAST": last, rows: block[0], "TILES": block[1]}
    channels = integers["C" if "C" in integers else "K"]
    each = integers.get("EACH", 1)
    tiles = cdiv(integers["COUNT"], each) * each
    return Launch(
        "winograd", name, types, integers, constants, _grid(tiles, channels, last), spec.device, _WARPS,
        aligned=("C", "COUNT", "EACH") if name == "image" else ("K", "COUNT"),
    )  # fmt: skip


def _filters(spec: ConvSpec, is_flipped: bool) -> Launch:
    """Of the weight as it is; `spec` is the forward that they are for."""
    filters, channels = spec.weight[:2]
    rows, columns = (channels, filters) if is_flipped else (filters, channels)
    return Launch(
        "winograd", "filters", (spec.dtype, "float32"), {"K": rows, "C": columns},
        {"FLIPPED": is_flipped, "ROWS": _FILTER_ROWS, "COLUMNS": _FILTER_COLUMNS},
        (cdiv(rows, _FILTER_ROWS), cdiv(columns, _FILTER_COLUMNS)), spec.device,
    )  # fmt: skip


def _map_plan(spec: ConvSpec) -> Plan:
    """forward; grad_input is the forward of grad with flipped filters."""
    is_flipped = spec.direction != FORWARD
    as_forward = flipped(spec) if is_flipped else spec
    filters, channels = as_forward.weight[:2]
    tiles = _Tiles(as_forward, _TILES)
    last = spec.channels_last
    height, width = as_forward.spatial
    steps = []
    for first, count in tiles.pieces():
        of_image = _transform(
            as_forward, "image", (spec.dtype, "float32"), "CHANNELS",
            {
                "C": channels, "H": height, "W": width, "PH": as_forward.padding[0], "PW": as_forward.padding[1],
                "TH": tiles.high, "TW": tiles.wide, "FIRST": first, "COUNT": count, "EACH": count,
            },
        )  # fmt: skip
        of_output = _transform(
            as_forward, "output", ("float32", "float32", spec.dtype), "FILTERS",
            {
                "K": filters, "OH": as_forward.out[0], "OW": as_forward.out[1], "TH": tiles.high, "TW": tiles.wide,
                "FIRST": first, "COUNT": count,
            },
            has_bias=False,
        )  # fmt: skip
        steps.append((count, of_image, of_output))
    of_filters = _filters(as_forward, is_flipped)

    def run(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        image = _in_format(spec, image)
        result = result_of(spec, image)
        transformed = image.new_empty((_PLACES, filters, channels))
        of_filters(dense(weight), transformed)
        if last:
            transformed = transformed.transpose(1, 2)
        for count, of_image, of_output in steps:
            shape = (_PLACES, count, channels) if last else (_PLACES, channels, count)
            inner = image.new_empty(shape)
            of_image(image, inner)
            products = torch.bmm(inner, transformed) if last else torch.bmm(transformed, inner)
            of_output(products, products, result)
            del inner, products
        return result

    launches = (of_filters, *(launch for _, *pair in steps for launch in pair))
    of_weight = _PLACES * filters * channels * spec.itemsize
    return Plan(launches, run, tiles.at_once * tiles.bytes_each + of_weight + copies_to_first(spec))


def _in_format(spec: ConvSpec, tensor: torch.Tensor) -> torch.Tensor:
    if not spec.channels_last:
        return dense(tensor)
    return tensor if is_channels_last(tensor) else tensor.contiguous(memory_format=memory_format(spec))


def _weight_plan(spec: ConvSpec) -> Plan:
    filters, channels = spec.weight[:2]
    each = _split(spec)
    tiles = _Tiles(spec, each)
    last = spec.channels_last
    most_splits = cdiv(tiles.at_once, each)
    steps = []
    for first, count in tiles.pieces():
        common = {"TH": tiles.high, "TW": tiles.wide, "FIRST": first, "COUNT": count, "EACH": each}
        of_image = _transform(
            spec, "image", (spec.dtype, "float32"), "CHANNELS",
            {
                "C": channels, "H": spec.spatial[0], "W": spec.spatial[1], "PH": spec.padding[0],
                "PW": spec.padding[1], **common,
            },
        )  # fmt: skip
        of_grad = _transform(
            spec, "grad", (spec.dtype, "float32"), "FILTERS",
            {"K": filters, "OH": spec.out[0], "OW": spec.out[1], **common},
        )  # fmt: skip
        steps.append((cdiv(count, each), of_image, of_grad))
    entries = filters * channels
    back = Launch(
        "winograd", "filters_back", ("float32", spec.dtype), {"LENGTH": entries, "SPLITS": most_splits},
        {"ENTRIES": _BACK_ENTRIES}, (cdiv(entries, _BACK_ENTRIES),), spec.device, aligned=("LENGTH",),
    )  # fmt: skip

    def run(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        image, grad = _in_format(spec, image), _in_format(spec, grad)
        sums: torch.Tensor | None = None
        for splits, of_image, of_grad in steps:
            shapes = [(splits * _PLACES, *((each, n) if last else (n, each))) for n in (filters, channels)]
            rows, columns = image.new_empty(shapes[0]), image.new_empty(shapes[1])
            of_grad(grad, rows)
            of_image(image, columns)
            left, right = (rows.transpose(1, 2), columns) if last else (rows, columns.transpose(1, 2))
            if sums is None:
                sums = torch.bmm(left, right)
            else:
                sums[: splits * _PLACES].baddbmm_(left, right)
            del rows, columns, left, right
        assert sums is not None  # there is at least one tile
        result = image.new_empty(spec.weight)
        back(sums, result)
        return result

    launches = (back, *(launch for step in steps for launch in step[1:]))
    total = most_splits * _PLACES * entries * spec.itemsize
    return Plan(launches, run, most_splits * each * tiles.bytes_each + total + copies_to_first(spec))


def _split(spec: ConvSpec) -> int:
    """Tiles in a split: sums over all tiles leave too few products side by side to fill a card."""
    tiles = spec.batch * cdiv(spec.out[0], 4) * cdiv(spec.out[1], 4)
    products = _PLACES * cdiv(spec.weight[0], 128) * cdiv(spec.weight[1], 128)
    splits = max(1, min(cdiv(4 * multiprocessors(spec.device), products), tiles // _FEWEST_IN_SPLIT))
    return max(1, cdiv(cdiv(tiles, splits), 4) * 4)


def _plan(spec: ConvSpec) -> Plan:
    return _weight_plan(spec) if spec.direction == GRAD_WEIGHT else _map_plan(spec)


def _rejects(spec: ConvSpec) -> str | None:
    if spec.dtype != "float32":
        return f"{spec.dtype} is too coarse for its transforms"
    why = WINOGRAD_F43.rejects(spec)
    if why is not None:
        return why
    if min(spec.padding) < 0 or max(spec.padding) > 2 or max(spec.weight[:2]) > MOST_BLOCKS:
        return "padding beyond the kernel, or more channels than a grid holds"
    return None


def _work(spec: ConvSpec) -> Work:
    as_forward = flipped(spec) if spec.direction == GRAD_INPUT else spec
    tiles = _Tiles(as_forward, _TILES)
    filters, channels = as_forward.weight[:2]
    columns = channels if spec.direction == GRAD_WEIGHT else tiles.at_once
    of_weight = _PLACES * filters * channels * spec.itemsize
    return Work(
        2.0 * _PLACES * tiles.count * filters * channels, cost.filled(spec, filters, columns, _PLACES),
        # Each transformed tile is written and read; much of that stays in a cache.
        cost.operand_bytes(spec) + 1.5 * tiles.count * tiles.bytes_each + 2 * of_weight,
        3 + 6 * cdiv(tiles.count, tiles.at_once) * (1 + (spec.direction == GRAD_WEIGHT)),
    )  # fmt: skip


FUSED_WINOGRAD = Fused(
    "fused_winograd", _plan, _rejects, _work, dict(WINOGRAD_F43.rtol), is_approximate=True
).strategy

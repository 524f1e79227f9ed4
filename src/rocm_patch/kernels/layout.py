"""Passes over memory around the products: memory formats, im2col columns and back, sums of split results.

Sizes as in `gemm`.
"""

import triton
import triton.language as tl


@triton.jit
def _block_to_last(
    x, y, sample, channel_block, position_block, C, L, xn, xc, xl, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr
):
    position = position_block * POSITIONS + tl.arange(0, POSITIONS)
    channel = channel_block * CHANNELS + tl.arange(0, CHANNELS)
    mask = (channel < C)[:, None] & (position < L)[None, :]
    tile = tl.load(x + (sample * xn + (channel * xc)[:, None] + (position * xl)[None, :]), mask, 0.0)
    tl.store(y + (sample * L * C + channel[:, None] + (position * C)[None, :]), tile, mask)


@triton.jit
def channels_to_last(x, y, C, L, xn, xc, xl, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """x (n, C, L) with those strides -> y (n, L, C), dense. Grid: blocks of positions; blocks of channels; n."""
    _block_to_last(
        x, y, tl.program_id(2), tl.program_id(1), tl.program_id(0), C, L, xn, xc, xl, CHANNELS, POSITIONS
    )  # fmt: skip


@triton.jit
def two_to_last(
    x, y, x2, y2, C, L, xn, xc, xl, C2, L2, x2n, x2c, x2l, BLOCKS,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS2: tl.constexpr, POSITIONS2: tl.constexpr,
):  # fmt: skip
    """`channels_to_last` of x and of x2. Grid: BLOCKS blocks of x, then those of x2."""
    program = tl.program_id(0)
    if program < BLOCKS:
        across, down = tl.cdiv(L, POSITIONS), tl.cdiv(C, CHANNELS)
        _block_to_last(
            x, y, program // (across * down), program // across % down, program % across,
            C, L, xn, xc, xl, CHANNELS, POSITIONS,
        )  # fmt: skip
    else:
        program -= BLOCKS
        across, down = tl.cdiv(L2, POSITIONS2), tl.cdiv(C2, CHANNELS2)
        _block_to_last(
            x2, y2, program // (across * down), program // across % down, program % across,
            C2, L2, x2n, x2c, x2l, CHANNELS2, POSITIONS2,
        )  # fmt: skip


@triton.jit
def reduce(parts, y, LENGTH, SPLITS, ENTRIES: tl.constexpr):
    """y (LENGTH,): the sum of parts (SPLITS, LENGTH), in order. Grid: blocks of entries."""
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    mask = at < LENGTH
    total = tl.zeros((ENTRIES,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * LENGTH + at), mask, 0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask)


@triton.jit
def reduce_weight(parts, y, ROWS, TAPS, C, SPLITS, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """y (ROWS, C, TAPS): the sum of parts (SPLITS, ROWS, TAPS, C), in order. Grid: blocks of channels; ROWS."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(1)
    tap = tl.arange(0, COLUMNS)
    mask = (tap < TAPS)[:, None] & (c < C)[None, :]
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    parts += row * (TAPS * C) + (tap * C)[:, None] + c[None, :]
    for split in range(SPLITS):
        total += tl.load(parts + split * (ROWS * TAPS * C), mask, 0.0)
    tl.store(y + (row * (TAPS * C) + (c * TAPS)[None, :] + tap[:, None]), total.to(y.dtype.element_ty), mask)


@triton.jit
def unfold(
    x, y, C, D, H, W, OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW, yn, yr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """y (n, C taps, map) with strides yn, yr and 1: the columns of x (n, C, D, H, W).

    Grid: blocks of positions; blocks of rows; n.
    """
    taps = KD * KH * KW
    at_map = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(2)
    each_map = OD * OH * OW
    c, tap = row // taps, row % taps
    h = (at_map // OW % OH * SH - PH)[None, :] + (tap // KW % KH * LH)[:, None]
    v = (at_map % OW * SW - PW)[None, :] + (tap % KW * LW)[:, None]
    mask = (row < C * taps)[:, None] & (at_map < each_map)[None, :]
    read = mask & (h >= 0) & (h < H) & (v >= 0) & (v < W)
    place = (c * (D * H * W))[:, None] + h * W + v
    if DEPTH:
        d = (at_map // (OW * OH) * SD - PD)[None, :] + (tap // (KH * KW) * LD)[:, None]
        read &= (d >= 0) & (d < D)
        place += d * (H * W)
    # For the order of threads only, as in `gemm`.
    place = tl.max_contiguous(sample * (C * D * H * W) + place, (1, POSITIONS))
    tile = tl.load(x + place, read, 0.0)
    tl.store(y + (sample * yn + (row * yr)[:, None] + at_map[None, :]), tile, mask)


@triton.jit
def fold(
    columns, y, C, D, H, W, OD, OH, OW, SD, SH, SW, PD, PH, PW, LD, LH, LW,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """y (n, C, D, H, W): the sum of the columns (n, C taps, map) over each image position.

    Grid: n times C times D times blocks of rows; blocks of positions in a row.
    """
    row_blocks = tl.cdiv(H, ROWS)
    program = tl.program_id(0)
    h = (program % row_blocks * ROWS + tl.arange(0, ROWS))[:, None]
    v = (tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS))[None, :]
    d = program // row_blocks % D
    plane = program // (row_blocks * D)
    mask = (h < H) & (v < W)
    each_map = OD * OH * OW
    columns += plane * (KD * KH * KW * each_map)
    total = tl.zeros((ROWS, POSITIONS), tl.float32)
    for tap in tl.static_range(KD * KH * KW):
        e, f, b = d + PD - tap // (KH * KW) * LD, h + PH - tap // KW % KH * LH, v + PW - tap % KW * LW
        read = mask & (e >= 0) & (e % SD == 0) & (f >= 0) & (f % SH == 0) & (b >= 0) & (b % SW == 0)
        e, f, b = e // SD, f // SH, b // SW
        read &= (e < OD) & (f < OH) & (b < OW)
        place = tl.max_contiguous(tap * each_map + (e * OH + f) * OW + b, (1, POSITIONS))
        total += tl.load(columns + place, read, 0.0).to(tl.float32)
    tl.store(y + (plane * (D * H * W) + (d * H + h) * W + v), total.to(y.dtype.element_ty), mask)

"""Implicit GEMM: a convolution as a matrix product whose columns are read from the image, never written anywhere.

Sizes, in every kernel here: N samples; G groups of C channels and K filters each; the image (D, H, W), the output
(OD, OH, OW) and the kernel (KD, KH, KW), with 1 for dimensions that a 1-d or 2-d convolution has not; S stride,
P padding, L dilation. DEPTH says whether the first of the three dimensions is one at all. Tensors are dense, channels
first or, where a flag with LAST says so, channels last. Where ONE_TAP, a step of the sum takes channels of one tap
from weights whose channels are last; else it runs through channels and taps of weights as they are.

Where positions are said to follow each other in memory (`max_contiguous`), that is for the order of threads only:
where the compiler knows of no neighbours it may let neighbouring threads take different channels, three times slower
on an H200. How many elements one access takes follows from the alignment, of which nothing is said. The hint has to
stand in the function that computes the value.

Sums are float32. Where a sum is split, y has a part per split, (splits, *shape), for `reduce` to put together.
Offsets are 32-bit: no tensor may have 2^31 elements or more.

`tl.dot` becomes matrix instructions where the card has them for the type and FMA where it has not; the shapes of the
blocks are the caller's affair.
"""

import triton
import triton.language as tl


@triton.jit
def _strides(CHANNELS, D, H, W, LAST: tl.constexpr):
    """Elements from one sample, channel, depth, row and column to the next."""
    if LAST:
        sample, channel, depth, row, column = D * H * W * CHANNELS, 1, H * W * CHANNELS, W * CHANNELS, CHANNELS
    else:
        sample, channel, depth, row, column = D * H * W * CHANNELS, D * H * W, H * W, W, 1
    return sample, channel, depth, row, column


@triton.jit
def _blocks(ROWS, ROWS_EACH: tl.constexpr, TOGETHER: tl.constexpr):
    """The row block and column block of this program: those that run at the same time share both in the cache."""
    row_blocks = tl.cdiv(ROWS, ROWS_EACH)
    column_blocks = tl.num_programs(0) // row_blocks
    program = tl.program_id(0)
    width = TOGETHER * row_blocks
    first = program // width * TOGETHER
    height = min(column_blocks - first, TOGETHER)
    return program % width // height, first + program % width % height


@triton.jit
def _store_map(y, total, sample, at, row, CHANNELS, each_map, mask, LAST: tl.constexpr, POSITIONS: tl.constexpr):
    """total[row, position] to y (n, CHANNELS, map); `at` numbers positions within a map."""
    if LAST:
        place = ((sample * each_map + at) * CHANNELS)[None, :] + row[:, None]
    else:
        along = tl.max_contiguous(sample * (CHANNELS * each_map) + at, POSITIONS)
        place = along[None, :] + (row * each_map)[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask)


@triton.jit
def forward(
    x, w, bias, y,
    N, G, C, K, D, H, W, OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW,
    STEPS,
    HAS_BIAS: tl.constexpr, DEPTH: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr, ONE_TAP: tl.constexpr,
    FILTERS: tl.constexpr, POSITIONS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """x the image, w (G K, taps, C) if ONE_TAP else (G K, C, taps), y the output.

    Grid: blocks of filters times blocks of positions; G; splits of STEPS steps each.
    """
    taps = KD * KH * KW
    filter_block, position_block = _blocks(K, FILTERS, 8)
    group, split = tl.program_id(1), tl.program_id(2)
    xn, xc, xd, xh, xw = _strides(G * C, D, H, W, X_LAST)

    position = position_block * POSITIONS + tl.arange(0, POSITIONS)
    each_map = OD * OH * OW
    inside = position < N * each_map
    sample, at_map = position // each_map, position % each_map
    h0, w0 = at_map // OW % OH * SH - PH, at_map % OW * SW - PW
    source = sample * xn + group * C * xc + h0 * xh + w0 * xw
    if DEPTH:
        d0 = at_map // (OW * OH) * SD - PD
        source += d0 * xd
    k = filter_block * FILTERS + tl.arange(0, FILTERS)
    row = (group * K + k) * (C * taps)
    total = tl.zeros((FILTERS, POSITIONS), tl.float32)
    each = tl.arange(0, SUMMED)
    if ONE_TAP:
        blocks = tl.cdiv(C, SUMMED)
        for i in range(split * STEPS, min((split + 1) * STEPS, taps * blocks)):
            tap = i // blocks
            c = i % blocks * SUMMED + each
            h, v = tap // KW % KH * LH, tap % KW * LW
            read = inside & (h0 + h >= 0) & (h0 + h < H) & (w0 + v >= 0) & (w0 + v < W)
            offset = h * xh + v * xw
            if DEPTH:
                d = tap // (KH * KW) * LD
                read &= (d0 + d >= 0) & (d0 + d < D)
                offset += d * xd
            image = tl.load(
                x + ((source + offset)[None, :] + (c * xc)[:, None]), (c < C)[:, None] & read[None, :], 0.0
            )
            weight = tl.load(w + (row[:, None] + (tap * C + c)[None, :]), (k < K)[:, None] & (c < C)[None, :], 0.0)
            total = tl.dot(weight, image, total, input_precision="ieee")
    else:
        for i in range(split * STEPS, min((split + 1) * STEPS, tl.cdiv(C * taps, SUMMED))):
            at = i * SUMMED + each
            c, tap = at // taps, at % taps
            h, v = tap // KW % KH * LH, tap % KW * LW
            read = (h0[None, :] + h[:, None] >= 0) & (h0[None, :] + h[:, None] < H)
            read &= (w0[None, :] + v[:, None] >= 0) & (w0[None, :] + v[:, None] < W)
            read &= inside[None, :] & (c < C)[:, None]
            offset = c * xc + h * xh + v * xw
            if DEPTH:
                d = tap // (KH * KW) * LD
                read &= (d0[None, :] + d[:, None] >= 0) & (d0[None, :] + d[:, None] < D)
                offset += d * xd
            image = tl.load(x + (source[None, :] + offset[:, None]), read, 0.0)
            weight = tl.load(w + (row[:, None] + at[None, :]), (k < K)[:, None] & (c < C)[None, :], 0.0)
            total = tl.dot(weight, image, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + group * K + k, (k < K) & (split == 0), 0.0).to(tl.float32)[:, None]
    y += split * (N * G * K * each_map)
    mask = (k < K)[:, None] & inside[None, :]
    _store_map(y, total, sample, at_map, group * K + k, G * K, each_map, mask, Y_LAST, POSITIONS)


@triton.jit
def grad_input(
    g, w, y,
    N, G, C, K, D, H, W, OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW,
    STEPS, SPLITS,
    DEPTH: tl.constexpr, STRIDED: tl.constexpr, G_LAST: tl.constexpr, Y_LAST: tl.constexpr, ONE_TAP: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """g the gradient of the output, w (G C, taps, K) if ONE_TAP else (G K, C, taps), y the gradient of the image.

    Image positions that lie alike towards the stride (a phase) see the same taps, every S-th of the kernel; so no
    product with a zero between the strides is made. Where S > 1, L must be 1. STRIDED: not every S is 1.

    Grid: blocks of channels times blocks of positions of the largest phase; G; phases (SD SH SW) times SPLITS.
    """
    channel_block, position_block = _blocks(C, CHANNELS, 8)
    group = tl.program_id(1)
    phase, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    gn, gk, gd, gh, gw = _strides(G * K, OD, OH, OW, G_LAST)
    if STRIDED:
        # The phase's first tap of each dimension, and how many it has.
        rd, rh, rw = phase // (SH * SW), phase // SW % SH, phase % SW
        taps_d, taps_h, taps_w = tl.cdiv(KD - rd, SD), tl.cdiv(KH - rh, SH), tl.cdiv(KW - rw, SW)
        # Its first position: the smallest h with (h + P - r) divisible by S. A phase may have no positions at all,
        # and nothing may be divided by that.
        d_first, h_first, w_first = (rd + SD * PD - PD) % SD, (rh + SH * PH - PH) % SH, (rw + SW * PW - PW) % SW
        sizes_d, sizes_h = tl.cdiv(D - d_first, SD), tl.cdiv(H - h_first, SH)
        sizes_w = tl.cdiv(W - w_first, SW)
        positions = N * sizes_d * sizes_h * sizes_w
        sizes_d, sizes_h, sizes_w = max(sizes_d, 1), max(sizes_h, 1), max(sizes_w, 1)
    else:
        rd, rh, rw, d_first, h_first, w_first = 0, 0, 0, 0, 0, 0
        taps_d, taps_h, taps_w, sizes_d, sizes_h, sizes_w = KD, KH, KW, D, H, W
        positions = N * D * H * W
    taps = taps_d * taps_h * taps_w

    position = position_block * POSITIONS + tl.arange(0, POSITIONS)
    each_phase = sizes_d * sizes_h * sizes_w
    inside = position < positions
    sample, at_phase = position // each_phase, position % each_phase
    v, h = at_phase % sizes_w * SW + w_first, at_phase // sizes_w % sizes_h * SH + h_first
    # The divisions are exact, so rounding towards zero is none.
    h0, w0 = (h + PH - rh) // SH, (v + PW - rw) // SW
    source = sample * gn + group * K * gk + h0 * gh + w0 * gw
    at_map = h * W + v
    if DEPTH:
        d = at_phase // (sizes_w * sizes_h) * SD + d_first
        d0 = (d + PD - rd) // SD
        source += d0 * gd
        at_map += d * (H * W)
    if not STRIDED:
        at_map = at_phase
    if not G_LAST:
        source = tl.max_contiguous(source, POSITIONS)
    c = channel_block * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    each = tl.arange(0, SUMMED)
    if ONE_TAP:
        row = (group * C + c) * (K * KD * KH * KW)
        blocks = tl.cdiv(K, SUMMED)
        for i in range(split * STEPS, min((split + 1) * STEPS, taps * blocks)):
            tap = i // blocks
            k = i % blocks * SUMMED + each
            i_d, i_h, i_w = tap // (taps_h * taps_w), tap // taps_w % taps_h, tap % taps_w
            of_tap = ((rd + i_d * SD) * KH + rh + i_h * SH) * KW + rw + i_w * SW
            f, b = h0 - i_h * LH, w0 - i_w * LW
            read = inside & (f >= 0) & (f < OH) & (b >= 0) & (b < OW)
            offset = i_h * LH * gh + i_w * LW * gw
            if DEPTH:
                e = d0 - i_d * LD
                read &= (e >= 0) & (e < OD)
                offset += i_d * LD * gd
            grad = tl.load(
                g + ((source - offset)[None, :] + (k * gk)[:, None]), (k < K)[:, None] & read[None, :], 0.0
            )
            weight = tl.load(w + (row[:, None] + (of_tap * K + k)[None, :]), (c < C)[:, None] & (k < K)[None, :], 0.0)
            total = tl.dot(weight, grad, total, input_precision="ieee")
    else:
        for i in range(split * STEPS, min((split + 1) * STEPS, tl.cdiv(K * taps, SUMMED))):
            at = i * SUMMED + each
            k, tap = at // taps, at % taps
            i_d, i_h, i_w = tap // (taps_h * taps_w), tap // taps_w % taps_h, tap % taps_w
            of_tap = ((rd + i_d * SD) * KH + rh + i_h * SH) * KW + rw + i_w * SW
            f, b = h0[None, :] - (i_h * LH)[:, None], w0[None, :] - (i_w * LW)[:, None]
            read = (f >= 0) & (f < OH) & (b >= 0) & (b < OW) & inside[None, :] & (k < K)[:, None]
            offset = k * gk - (i_h * LH * gh + i_w * LW * gw)
            if DEPTH:
                e = d0[None, :] - (i_d * LD)[:, None]
                read &= (e >= 0) & (e < OD)
                offset -= i_d * LD * gd
            grad = tl.load(g + (source[None, :] + offset[:, None]), read, 0.0)
            row = ((group * K + k) * C) * (KD * KH * KW) + of_tap
            weight = tl.load(
                w + (row[None, :] + (c * (KD * KH * KW))[:, None]), (c < C)[:, None] & (k < K)[None, :], 0.0
            )
            total = tl.dot(weight, grad, total, input_precision="ieee")
    y += split * (N * G * C * D * H * W)
    mask = (c < C)[:, None] & inside[None, :]
    _store_map(y, total, sample, at_map, group * C + c, G * C, D * H * W, mask, Y_LAST, POSITIONS)


@triton.jit
def grad_weight(
    x, g, y,
    N, G, C, K, D, H, W, OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW,
    LENGTH,
    DEPTH: tl.constexpr, X_LAST: tl.constexpr, G_LAST: tl.constexpr, ONE_TAP: tl.constexpr,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """y (splits, G K, taps, C) if ONE_TAP else (splits, G K, C, taps); x the image, g the gradient of the output.

    Grid: blocks of filters times blocks of columns (channels times taps; of one tap each if ONE_TAP); G; splits of
    LENGTH positions each.
    """
    taps = KD * KH * KW
    filter_blocks = tl.cdiv(K, FILTERS)
    filter_block, column_block = tl.program_id(0) % filter_blocks, tl.program_id(0) // filter_blocks
    group, split = tl.program_id(1), tl.program_id(2)
    xn, xc, xd, xh, xw = _strides(G * C, D, H, W, X_LAST)
    gn, gk, _gd, _gh, gw = _strides(G * K, OD, OH, OW, G_LAST)
    k = filter_block * FILTERS + tl.arange(0, FILTERS)
    each = tl.arange(0, COLUMNS)
    if ONE_TAP:
        channel_blocks = tl.cdiv(C, COLUMNS)
        tap = column_block // channel_blocks
        c = column_block % channel_blocks * COLUMNS + each
        column = tap * C + c
    else:
        column = column_block * COLUMNS + each
        c, tap = column // taps, column % taps
    d, h, v = tap // (KH * KW) * LD - PD, tap // KW % KH * LH - PH, tap % KW * LW - PW
    each_map = OD * OH * OW
    stop = min((split + 1) * LENGTH, N * each_map)
    of_column = group * C * xc + c * xc + (d * xd + h * xh + v * xw)
    of_filter = (group * K + k) * gk
    total = tl.zeros((FILTERS, COLUMNS), tl.float32)
    for start in range(split * LENGTH, stop, SUMMED):
        position = start + tl.arange(0, SUMMED)
        inside = position < stop
        sample, at_map = position // each_map, position % each_map
        oh, ow = at_map // OW % OH * SH, at_map % OW * SW
        of_position = sample * xn + oh * xh + ow * xw
        # For both formats: in a map rows follow each other without a gap.
        of_grad = sample * gn + at_map * gw
        if not G_LAST:
            of_grad = tl.max_contiguous(of_grad, SUMMED)
        grad = tl.load(g + (of_filter[:, None] + of_grad[None, :]), (k < K)[:, None] & inside[None, :], 0.0)
        if ONE_TAP:
            f, b = oh + h, ow + v
            read = inside & (f >= 0) & (f < H) & (b >= 0) & (b < W)
            if DEPTH:
                od = at_map // (OW * OH) * SD
                of_position += od * xd
                read &= (od + d >= 0) & (od + d < D)
            mask = read[:, None] & (c < C)[None, :]
        else:
            f, b = oh[:, None] + h[None, :], ow[:, None] + v[None, :]
            mask = inside[:, None] & (c < C)[None, :] & (f >= 0) & (f < H) & (b >= 0) & (b < W)
            if DEPTH:
                od = at_map // (OW * OH) * SD
                of_position += od * xd
                mask &= (od[:, None] + d[None, :] >= 0) & (od[:, None] + d[None, :] < D)
        if not X_LAST:
            of_position = tl.max_contiguous(of_position, SUMMED)
        image = tl.load(x + (of_position[:, None] + of_column[None, :]), mask, 0.0)
        total = tl.dot(grad, image, total, input_precision="ieee")
    row = ((split * G + group) * K + k) * (C * taps)
    tl.store(y + (row[:, None] + column[None, :]), total.to(y.dtype.element_ty), (k < K)[:, None] & (c < C)[None, :])

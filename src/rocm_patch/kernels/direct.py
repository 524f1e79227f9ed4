"""Direct convolution for few channels a group: products in registers, no matrix units, nothing unrolled in memory.

Sizes as in `gemm`; every tensor is channels first. Such kernels spend their time on addresses and bounds rather than
on products: addresses are computed once a position, a tap adds what is the same for all positions, strides and
dilations are constants, and an element that is read serves all of the output rows that a thread computes.
"""

import triton
import triton.language as tl


@triton.jit
def _places(block, OD, OH, OW, SAMPLES, DEPTH: tl.constexpr, SEVERAL: tl.constexpr, POSITIONS: tl.constexpr):
    """Sample, depth, row and column of each position of a block, and which of them there are.

    Positions are numbered through the maps of SAMPLES samples (of one, unless SEVERAL): neighbouring threads read
    neighbouring elements, whatever the size of a map is, and nothing is wasted at the ends of rows.
    """
    each = block * POSITIONS + tl.arange(0, POSITIONS)
    of_map = OD * OH * OW
    inside = each < of_map
    sample = 0
    if SEVERAL:
        inside = each < SAMPLES * of_map
        sample = each // of_map
        each = each - sample * of_map
    row = each // OW
    column = each - row * OW
    depth = 0
    if DEPTH:
        depth = row // OH
        row = row - depth * OH
    return sample, depth, row, column, inside


@triton.jit
def _is_in(at, size):
    """0 <= at < size, in one comparison."""
    return at.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit
def _added(
    total, image, w, there, row: tl.constexpr, at: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    FLIPPED: tl.constexpr,
):  # fmt: skip
    """The sum with an element of the image, if there is a row of taps for it."""
    if (row >= 0) and (row < KH):
        tap: tl.constexpr = at + row * KW
        weight = tl.load(w - tap if FLIPPED else w + tap, there, 0.0).to(tl.float32)
        total += weight[:, None] * image[None, :]
    return total


@triton.jit
def _stored(y, place, total, bias, k, there, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + k, there, 0.0).to(tl.float32)[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), there[:, None] & inside[None, :])


@triton.jit
def forward(
    x, w, bias, y,
    N, G, K, D, H, W, OD, OH, OW, PD, PH, PW, SAMPLES,
    C: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    DEPTH: tl.constexpr, FLIPPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    FILTERS: tl.constexpr, HIGH: tl.constexpr, SEVERAL: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """x the image, w (G K, C, taps), y the output; a position is HIGH (1, 2 or 4) rows high, which
    with a dilation LH is 1 row.

    FLIPPED: w (G C, K, taps), read from its last tap: with stride 1, grad_input is the convolution of grad with it.

    Grid: blocks of positions; G times blocks of filters; blocks of SAMPLES samples.
    """
    taps: tl.constexpr = KD * KH * KW
    blocks = tl.cdiv(K, FILTERS)
    group, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    sample, od, oh, ow, inside = _places(
        tl.program_id(0), OD, tl.cdiv(OH, HIGH), OW, SAMPLES, DEPTH, SEVERAL, POSITIONS
    )
    sample += tl.program_id(2) * SAMPLES
    inside, oh = inside & (sample < N), oh * HIGH
    k = block * FILTERS + tl.arange(0, FILTERS)
    there = k < K
    d0, h0, v0 = od * SD - PD, oh * SH - PH, ow * SW - PW
    source = x + ((sample * G + group) * C * D * H * W + (d0 * H + h0) * W + v0)
    w += group * (K * C * taps) + (k * taps + (taps - 1) if FLIPPED else k * (C * taps))
    first = tl.zeros((FILTERS, POSITIONS), tl.float32)
    second, third, fourth = first, first, first
    for c in range(C):
        of_c = w + c * (K * taps if FLIPPED else taps)
        for i in tl.static_range(KD):
            in_depth = inside
            if DEPTH:
                in_depth = inside & _is_in(d0 + i * LD, D)
            for j in tl.static_range((HIGH - 1) * SH + KH):
                in_row = in_depth & _is_in(h0 + j * LH, H)
                row = source + ((c * D + i * LD) * H + j * LH) * W
                for q in tl.static_range(KW):
                    read = in_row & _is_in(v0 + q * LW, W)
                    image = tl.load(row + q * LW, read, 0.0).to(tl.float32)
                    first = _added(first, image, of_c, there, j, i * KH * KW + q, KH, KW, FLIPPED)
                    if HIGH > 1:
                        second = _added(second, image, of_c, there, j - SH, i * KH * KW + q, KH, KW, FLIPPED)
                    if HIGH > 2:
                        third = _added(third, image, of_c, there, j - 2 * SH, i * KH * KW + q, KH, KW, FLIPPED)
                        fourth = _added(fourth, image, of_c, there, j - 3 * SH, i * KH * KW + q, KH, KW, FLIPPED)
    bias += group * K
    place = ((sample * G + group) * (K * OD * OH * OW) + (od * OH + oh) * OW + ow)[None, :]
    place += (k * (OD * OH * OW))[:, None]
    _stored(y, place, first, bias, k, there, inside, HAS_BIAS)
    if HIGH > 1:
        _stored(y, place + OW, second, bias, k, there, inside & (oh + 1 < OH), HAS_BIAS)
    if HIGH > 2:
        _stored(y, place + 2 * OW, third, bias, k, there, inside & (oh + 2 < OH), HAS_BIAS)
        _stored(y, place + 3 * OW, fourth, bias, k, there, inside & (oh + 3 < OH), HAS_BIAS)


@triton.jit
def grad_input(
    g, w, y,
    N, G, K, D, H, W, OD, OH, OW, PD, PH, PW, SAMPLES,
    C: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, SEVERAL: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """g the gradient of the output, w (G K, C, taps), y that of the image; phases as in `gemm.grad_input`.

    Grid: blocks of positions of the largest phase; G times blocks of channels; blocks of samples times phases.
    """
    taps: tl.constexpr = KD * KH * KW
    # How many taps a phase has at most.
    taps_d: tl.constexpr = (KD + SD - 1) // SD
    taps_h: tl.constexpr = (KH + SH - 1) // SH
    taps_w: tl.constexpr = (KW + SW - 1) // SW
    blocks = tl.cdiv(C, CHANNELS)
    group, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    sizes_d, sizes_h, sizes_w = tl.cdiv(D, SD), tl.cdiv(H, SH), tl.cdiv(W, SW)
    sample, at_d, at_h, at_w, inside = _places(
        tl.program_id(0), sizes_d, sizes_h, sizes_w, SAMPLES, DEPTH, SEVERAL, POSITIONS
    )
    phases: tl.constexpr = SD * SH * SW
    sample += tl.program_id(2) // phases * SAMPLES
    phase = tl.program_id(2) % phases
    rd, rh, rw = phase // (SH * SW), phase // SW % SH, phase % SW
    d = at_d * SD + (rd + SD * PD - PD) % SD
    h = at_h * SH + (rh + SH * PH - PH) % SH
    v = at_w * SW + (rw + SW * PW - PW) % SW
    inside = inside & (sample < N) & (d < D) & (h < H) & (v < W)
    d0, h0, w0 = (d + PD - rd) // SD, (h + PH - rh) // SH, (v + PW - rw) // SW
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    there = c < C
    source = g + (sample * G + group) * K * OD * OH * OW + (d0 * OH + h0) * OW + w0
    w += (group * K * C + c) * taps + (rd * KH + rh) * KW + rw
    total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    for k in range(K):
        of_k = w + k * (C * taps)
        for i in tl.static_range(taps_d):
            in_depth = inside
            if DEPTH:
                in_depth = inside & _is_in(d0 - i * LD, OD)
            for j in tl.static_range(taps_h):
                in_row = in_depth & _is_in(h0 - j * LH, OH)
                row = source + ((k * OD - i * LD) * OH - j * LH) * OW
                for q in tl.static_range(taps_w):
                    is_tap = (rd + i * SD < KD) & (rh + j * SH < KH) & (rw + q * SW < KW)
                    read = in_row & _is_in(w0 - q * LW, OW) & is_tap
                    grad = tl.load(row - q * LW, read, 0.0).to(tl.float32)
                    weight = tl.load(of_k + ((i * SD * KH + j * SH) * KW + q * SW), there & is_tap, 0.0)
                    total += weight.to(tl.float32)[:, None] * grad[None, :]
    place = ((sample * G + group) * (C * D * H * W) + (d * H + h) * W + v)[None, :] + (c * (D * H * W))[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), there[:, None] & inside[None, :])


@triton.jit
def _summed(y, total, there, tap: tl.constexpr, taps_here):
    """Write the sum over all positions as one entry of each filter, if the row has such a tap."""
    tl.store(y + tap, tl.sum(total, 1).to(y.dtype.element_ty), there & (tap < taps_here))


@triton.jit
def grad_weight(
    x, g, y,
    N, G, C, K, D, H, W, OD, OH, OW, PD, PH, PW, SAMPLES, TIMES, STEPS,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    DEPTH: tl.constexpr, FILTERS: tl.constexpr, TAPS: tl.constexpr, SEVERAL: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """y (splits, G K, C, taps): a program sums for up to TAPS (1 to 4) neighbouring taps of a row.

    It takes STEPS blocks of positions of SAMPLES samples, and the same ones of the next samples, TIMES times: there
    neither bounds nor addresses are computed anew.

    Grid: C times rows of taps (each in cdiv(KW, TAPS) parts); G times blocks of filters; splits (of the blocks of
    positions, and of the samples).
    """
    parts: tl.constexpr = (KW + TAPS - 1) // TAPS
    rows: tl.constexpr = KD * KH * parts
    c, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    kd, kh, kw = row // (KH * parts), row // parts % KH, row % parts * TAPS
    filter_blocks = tl.cdiv(K, FILTERS)
    group, block = tl.program_id(1) // filter_blocks, tl.program_id(1) % filter_blocks
    k = block * FILTERS + tl.arange(0, FILTERS)
    there = k < K
    of_map = OD * OH * OW
    blocks = tl.cdiv(SAMPLES * of_map, POSITIONS)
    splits = tl.cdiv(blocks, STEPS)
    split = tl.program_id(2) % splits
    start = tl.program_id(2) // splits * (TIMES * SAMPLES)
    times = tl.minimum(TIMES, tl.cdiv(N - start, SAMPLES))
    first = tl.zeros((FILTERS, POSITIONS), tl.float32)
    second, third, fourth = first, first, first
    for step in range(STEPS):
        sample, od, oh, ow, inside = _places(split * STEPS + step, OD, OH, OW, SAMPLES, DEPTH, SEVERAL, POSITIONS)
        d, h, v = od * SD - PD + kd * LD, oh * SH - PH + kh * LH, ow * SW - PW + kw * LW
        inside = inside & _is_in(h, H)
        if DEPTH:
            inside = inside & _is_in(d, D)
        in_first, in_second = inside & _is_in(v, W), inside & _is_in(v + LW, W)
        in_third, in_fourth = inside & _is_in(v + 2 * LW, W), inside & _is_in(v + 3 * LW, W)
        sample += start
        image = x + ((sample * G + group) * C + c) * (D * H * W) + (d * H + h) * W + v
        grads = g + ((sample * G + group) * (K * of_map) + (od * OH + oh) * OW + ow)[None, :] + (k * of_map)[:, None]
        is_read = there[:, None] & inside[None, :]
        for _ in range(times):
            if SEVERAL:
                is_there = sample < N
                grad = tl.load(grads, is_read & is_there[None, :], 0.0).to(tl.float32)
                sample += SAMPLES
            else:
                # Every map of a single sample is there, if not every block of positions.
                grad = tl.load(grads, is_read, 0.0).to(tl.float32)
                is_there = inside
            first += grad * tl.load(image, in_first & is_there, 0.0).to(tl.float32)[None, :]
            if TAPS > 1:
                second += grad * tl.load(image + LW, in_second & is_there, 0.0).to(tl.float32)[None, :]
            if TAPS > 2:
                third += grad * tl.load(image + 2 * LW, in_third & is_there, 0.0).to(tl.float32)[None, :]
            if TAPS > 3:
                fourth += grad * tl.load(image + 3 * LW, in_fourth & is_there, 0.0).to(tl.float32)[None, :]
            image += SAMPLES * G * C * D * H * W
            grads += SAMPLES * G * K * of_map
    y += (((tl.program_id(2) * G + group) * K + k) * C + c) * (KD * KH * KW) + (kd * KH + kh) * KW + kw
    _summed(y, first, there, 0, KW - kw)
    if TAPS > 1:
        _summed(y, second, there, 1, KW - kw)
    if TAPS > 2:
        _summed(y, third, there, 2, KW - kw)
    if TAPS > 3:
        _summed(y, fourth, there, 3, KW - kw)

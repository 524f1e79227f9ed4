"""The transforms of Winograd's F(4x4,3x3), one pass over memory each; the products between them are a GEMM's affair.

Matrices and source as in `rocm_patch.conv.winograd`, applied to rows, then to columns. A tile has 36 places; what is
transformed is a matrix per place, channels times tiles (tiles times channels where LAST, in which images too are
channels last). Tiles are numbered through all samples, row by row. Offsets are 32-bit.
"""

import triton
import triton.language as tl

from rocm_patch.kernels.gemm import _strides


@triton.jit
def _image_1d(a, b, c, d, e, f):
    """B^T of F(4, 3)."""
    u, v = d - 4 * b, e - 4 * c
    p, q = d - b, e - c
    return 4 * a - 5 * c + e, u + v, v - u, q + 2 * p, q - 2 * p, 4 * b - 5 * d + f


@triton.jit
def _output_1d(a, b, c, d, e, f):
    """A^T of F(4, 3)."""
    p, q, r, s = b + c, b - c, d + e, d - e
    return a + p + r, q + 2 * s, p + 4 * r, q + 8 * s + f


@triton.jit
def _grad_1d(a, b, c, d):
    """A of F(4, 3)."""
    p, q, r, s = a + c, b + d, a + 4 * c, 2 * b + 8 * d
    return a, p + q, p - q, r + s, r - s, d


@triton.jit
def _filter_1d(a, b, c):
    """G of F(4, 3)."""
    p, q = (a + c) / -6, a / 24 + c / 6
    return a / 4, p - b / 6, p + b / 6, q + b / 12, q - b / 12, c


@triton.jit
def _filter_back_1d(a, b, c, d, e, f):
    """G^T of F(4, 3)."""
    p, q, r = (b + c) / -6, d + e, (d - e) / 12
    return a / 4 + p + q / 24, (c - b) / 6 + r, p + q / 6 + f


@triton.jit
def _places(ROWS, TILES, LAST: tl.constexpr):
    """Elements from one place to the next, one row (channel or filter) and one tile, in a matrix per place."""
    if LAST:
        row, tile = 1, ROWS
    else:
        row, tile = TILES, 1
    return ROWS * TILES, row, tile


@triton.jit
def _store_row(v, step, i: tl.constexpr, mask, a, b, c, d, e, f):
    v += 6 * i * step
    tl.store(v, a, mask)
    tl.store(v + step, b, mask)
    tl.store(v + 2 * step, c, mask)
    tl.store(v + 3 * step, d, mask)
    tl.store(v + 4 * step, e, mask)
    tl.store(v + 5 * step, f, mask)


@triton.jit
def _image_column(x, h, w, H, W, xh, xw, mask, i: tl.constexpr):
    """Column i of every tile, transformed."""
    mask &= (w + i >= 0) & (w + i < W)
    x += h * xh + (w + i) * xw
    a = tl.load(x, mask & (h >= 0) & (h < H), 0.0).to(tl.float32)
    b = tl.load(x + xh, mask & (h >= -1) & (h < H - 1), 0.0).to(tl.float32)
    c = tl.load(x + 2 * xh, mask & (h >= -2) & (h < H - 2), 0.0).to(tl.float32)
    d = tl.load(x + 3 * xh, mask & (h >= -3) & (h < H - 3), 0.0).to(tl.float32)
    e = tl.load(x + 4 * xh, mask & (h >= -4) & (h < H - 4), 0.0).to(tl.float32)
    f = tl.load(x + 5 * xh, mask & (h >= -5) & (h < H - 5), 0.0).to(tl.float32)
    return _image_1d(a, b, c, d, e, f)


@triton.jit
def image(
    x, v, C, H, W, PH, PW, TH, TW, FIRST, COUNT, EACH,
    LAST: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """v (splits, 36, C, EACH): B^T x B of the tiles FIRST to FIRST + COUNT, EACH a split; zeros fill the last one.

    x (n, C, H, W), read from PH rows above and PW columns left of it, in TH x TW tiles a sample.
    Grid: blocks of tiles, blocks of channels.
    """
    at = (tl.program_id(0) * TILES + tl.arange(0, TILES))[None, :]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    tile = FIRST + at
    h, w = tile // TW % TH * 4 - PH, tile % TW * 4 - PW
    mask = (channel < C) & (at < COUNT)
    xn, xc, _xd, xh, xw = _strides(C, 1, H, W, LAST)
    x += tile // (TW * TH) * xn + channel * xc
    a0, b0, c0, d0, e0, f0 = _image_column(x, h, w, H, W, xh, xw, mask, 0)
    a1, b1, c1, d1, e1, f1 = _image_column(x, h, w, H, W, xh, xw, mask, 1)
    a2, b2, c2, d2, e2, f2 = _image_column(x, h, w, H, W, xh, xw, mask, 2)
    a3, b3, c3, d3, e3, f3 = _image_column(x, h, w, H, W, xh, xw, mask, 3)
    a4, b4, c4, d4, e4, f4 = _image_column(x, h, w, H, W, xh, xw, mask, 4)
    a5, b5, c5, d5, e5, f5 = _image_column(x, h, w, H, W, xh, xw, mask, 5)
    step, vc, vt = _places(C, EACH, LAST)
    mask = (channel < C) & (at < tl.cdiv(COUNT, EACH) * EACH)
    v += at // EACH * (36 * step) + at % EACH * vt + channel * vc
    p, q, r, s, t, u = _image_1d(a0, a1, a2, a3, a4, a5)
    _store_row(v, step, 0, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _image_1d(b0, b1, b2, b3, b4, b5)
    _store_row(v, step, 1, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _image_1d(c0, c1, c2, c3, c4, c5)
    _store_row(v, step, 2, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _image_1d(d0, d1, d2, d3, d4, d5)
    _store_row(v, step, 3, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _image_1d(e0, e1, e2, e3, e4, e5)
    _store_row(v, step, 4, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _image_1d(f0, f1, f2, f3, f4, f5)
    _store_row(v, step, 5, mask, p, q, r, s, t, u)


@triton.jit
def _output_row(m, step, i: tl.constexpr, mask):
    """Row i of the places of every tile, transformed."""
    m += 6 * i * step
    a, b, c = tl.load(m, mask, 0.0), tl.load(m + step, mask, 0.0), tl.load(m + 2 * step, mask, 0.0)
    d, e, f = tl.load(m + 3 * step, mask, 0.0), tl.load(m + 4 * step, mask, 0.0), tl.load(m + 5 * step, mask, 0.0)
    return _output_1d(a, b, c, d, e, f)


@triton.jit
def _store_column(y, h, w, OH, OW, yh, yw, mask, i: tl.constexpr, a, b, c, d):
    mask &= w + i < OW
    y += h * yh + (w + i) * yw
    tl.store(y, a, mask)
    tl.store(y + yh, b, mask & (h + 1 < OH))
    tl.store(y + 2 * yh, c, mask & (h + 2 < OH))
    tl.store(y + 3 * yh, d, mask & (h + 3 < OH))


@triton.jit
def output(
    m, bias, y, K, OH, OW, TH, TW, FIRST, COUNT,
    HAS_BIAS: tl.constexpr, LAST: tl.constexpr, FILTERS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """y (n, K, OH, OW): A^T m A, and the bias, in the tiles FIRST to FIRST + COUNT; m (36, K, COUNT).

    Grid: blocks of tiles, blocks of filters.
    """
    at = (tl.program_id(0) * TILES + tl.arange(0, TILES))[None, :]
    k = (tl.program_id(1) * FILTERS + tl.arange(0, FILTERS))[:, None]
    tile = FIRST + at
    mask = (k < K) & (at < COUNT)
    step, mk, mt = _places(K, COUNT, LAST)
    m += k * mk + at * mt
    a0, a1, a2, a3 = _output_row(m, step, 0, mask)
    b0, b1, b2, b3 = _output_row(m, step, 1, mask)
    c0, c1, c2, c3 = _output_row(m, step, 2, mask)
    d0, d1, d2, d3 = _output_row(m, step, 3, mask)
    e0, e1, e2, e3 = _output_row(m, step, 4, mask)
    f0, f1, f2, f3 = _output_row(m, step, 5, mask)
    add = tl.zeros((FILTERS, TILES), tl.float32)
    if HAS_BIAS:
        add += tl.load(bias + k, k < K, 0.0)
    h, w = tile // TW % TH * 4, tile % TW * 4
    yn, yk, _yd, yh, yw = _strides(K, 1, OH, OW, LAST)
    y += tile // (TW * TH) * yn + k * yk
    p, q, r, s = _output_1d(a0, b0, c0, d0, e0, f0)
    _store_column(y, h, w, OH, OW, yh, yw, mask, 0, p + add, q + add, r + add, s + add)
    p, q, r, s = _output_1d(a1, b1, c1, d1, e1, f1)
    _store_column(y, h, w, OH, OW, yh, yw, mask, 1, p + add, q + add, r + add, s + add)
    p, q, r, s = _output_1d(a2, b2, c2, d2, e2, f2)
    _store_column(y, h, w, OH, OW, yh, yw, mask, 2, p + add, q + add, r + add, s + add)
    p, q, r, s = _output_1d(a3, b3, c3, d3, e3, f3)
    _store_column(y, h, w, OH, OW, yh, yw, mask, 3, p + add, q + add, r + add, s + add)


@triton.jit
def _grad_column(g, h, w, OH, OW, gh, gw, mask, i: tl.constexpr):
    """Column i of every tile, transformed."""
    mask &= w + i < OW
    g += h * gh + (w + i) * gw
    a = tl.load(g, mask & (h < OH), 0.0).to(tl.float32)
    b = tl.load(g + gh, mask & (h + 1 < OH), 0.0).to(tl.float32)
    c = tl.load(g + 2 * gh, mask & (h + 2 < OH), 0.0).to(tl.float32)
    d = tl.load(g + 3 * gh, mask & (h + 3 < OH), 0.0).to(tl.float32)
    return _grad_1d(a, b, c, d)


@triton.jit
def grad(
    g, v, K, OH, OW, TH, TW, FIRST, COUNT, EACH,
    LAST: tl.constexpr, FILTERS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """v (splits, 36, K, EACH): A g A^T of the tiles FIRST to FIRST + COUNT of g (n, K, OH, OW), as `image` does it.

    Grid: blocks of tiles, blocks of filters.
    """
    at = (tl.program_id(0) * TILES + tl.arange(0, TILES))[None, :]
    k = (tl.program_id(1) * FILTERS + tl.arange(0, FILTERS))[:, None]
    tile = FIRST + at
    mask = (k < K) & (at < COUNT)
    h, w = tile // TW % TH * 4, tile % TW * 4
    gn, gk, _gd, gh, gw = _strides(K, 1, OH, OW, LAST)
    g += tile // (TW * TH) * gn + k * gk
    a0, b0, c0, d0, e0, f0 = _grad_column(g, h, w, OH, OW, gh, gw, mask, 0)
    a1, b1, c1, d1, e1, f1 = _grad_column(g, h, w, OH, OW, gh, gw, mask, 1)
    a2, b2, c2, d2, e2, f2 = _grad_column(g, h, w, OH, OW, gh, gw, mask, 2)
    a3, b3, c3, d3, e3, f3 = _grad_column(g, h, w, OH, OW, gh, gw, mask, 3)
    step, vk, vt = _places(K, EACH, LAST)
    mask = (k < K) & (at < tl.cdiv(COUNT, EACH) * EACH)
    v += at // EACH * (36 * step) + at % EACH * vt + k * vk
    p, q, r, s, t, u = _grad_1d(a0, a1, a2, a3)
    _store_row(v, step, 0, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _grad_1d(b0, b1, b2, b3)
    _store_row(v, step, 1, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _grad_1d(c0, c1, c2, c3)
    _store_row(v, step, 2, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _grad_1d(d0, d1, d2, d3)
    _store_row(v, step, 3, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _grad_1d(e0, e1, e2, e3)
    _store_row(v, step, 4, mask, p, q, r, s, t, u)
    p, q, r, s, t, u = _grad_1d(f0, f1, f2, f3)
    _store_row(v, step, 5, mask, p, q, r, s, t, u)


@triton.jit
def _filter_row(w, i: tl.constexpr, mask, FLIPPED: tl.constexpr):
    if FLIPPED:
        a, b, c = (
            tl.load(w + (8 - 3 * i), mask, 0.0),
            tl.load(w + (7 - 3 * i), mask, 0.0),
            tl.load(w + (6 - 3 * i), mask, 0.0),
        )
    else:
        a, b, c = (
            tl.load(w + 3 * i, mask, 0.0),
            tl.load(w + (3 * i + 1), mask, 0.0),
            tl.load(w + (3 * i + 2), mask, 0.0),
        )
    return _filter_1d(a.to(tl.float32), b.to(tl.float32), c.to(tl.float32))


@triton.jit
def filters(w, u, K, C, FLIPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """u (36, K, C): G w G^T of w (K, C, 9); FLIPPED: (36, C, K) of the flipped filters. Grid: blocks of K, of C."""
    k = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (k < K) & (c < C)
    w += (k * C + c) * 9
    a0, a1, a2, a3, a4, a5 = _filter_row(w, 0, mask, FLIPPED)
    b0, b1, b2, b3, b4, b5 = _filter_row(w, 1, mask, FLIPPED)
    c0, c1, c2, c3, c4, c5 = _filter_row(w, 2, mask, FLIPPED)
    u += k + c * K if FLIPPED else k * C + c
    step = K * C
    p, q, r, s, t, v = _filter_1d(a0, b0, c0)
    _store_column_of_places(u, step, 0, mask, p, q, r, s, t, v)
    p, q, r, s, t, v = _filter_1d(a1, b1, c1)
    _store_column_of_places(u, step, 1, mask, p, q, r, s, t, v)
    p, q, r, s, t, v = _filter_1d(a2, b2, c2)
    _store_column_of_places(u, step, 2, mask, p, q, r, s, t, v)
    p, q, r, s, t, v = _filter_1d(a3, b3, c3)
    _store_column_of_places(u, step, 3, mask, p, q, r, s, t, v)
    p, q, r, s, t, v = _filter_1d(a4, b4, c4)
    _store_column_of_places(u, step, 4, mask, p, q, r, s, t, v)
    p, q, r, s, t, v = _filter_1d(a5, b5, c5)
    _store_column_of_places(u, step, 5, mask, p, q, r, s, t, v)


@triton.jit
def _store_column_of_places(v, step, i: tl.constexpr, mask, a, b, c, d, e, f):
    v += i * step
    tl.store(v, a, mask)
    tl.store(v + 6 * step, b, mask)
    tl.store(v + 12 * step, c, mask)
    tl.store(v + 18 * step, d, mask)
    tl.store(v + 24 * step, e, mask)
    tl.store(v + 30 * step, f, mask)


@triton.jit
def _summed(s, place: tl.constexpr, LENGTH, SPLITS, mask):
    total = tl.load(s + place * LENGTH, mask, 0.0)
    for split in range(1, SPLITS):
        total += tl.load(s + (split * 36 + place) * LENGTH, mask, 0.0)
    return total


@triton.jit
def _filter_back_row(s, i: tl.constexpr, LENGTH, SPLITS, mask):
    a, b = _summed(s, 6 * i, LENGTH, SPLITS, mask), _summed(s, 6 * i + 1, LENGTH, SPLITS, mask)
    c, d = _summed(s, 6 * i + 2, LENGTH, SPLITS, mask), _summed(s, 6 * i + 3, LENGTH, SPLITS, mask)
    e, f = _summed(s, 6 * i + 4, LENGTH, SPLITS, mask), _summed(s, 6 * i + 5, LENGTH, SPLITS, mask)
    return _filter_back_1d(a, b, c, d, e, f)


@triton.jit
def filters_back(s, w, LENGTH, SPLITS, ENTRIES: tl.constexpr):
    """w (LENGTH, 9): G^T s G, s the sum over splits of (splits, 36, LENGTH). Grid: blocks of filters and channels."""
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    mask = at < LENGTH
    s += at
    a0, a1, a2 = _filter_back_row(s, 0, LENGTH, SPLITS, mask)
    b0, b1, b2 = _filter_back_row(s, 1, LENGTH, SPLITS, mask)
    c0, c1, c2 = _filter_back_row(s, 2, LENGTH, SPLITS, mask)
    d0, d1, d2 = _filter_back_row(s, 3, LENGTH, SPLITS, mask)
    e0, e1, e2 = _filter_back_row(s, 4, LENGTH, SPLITS, mask)
    f0, f1, f2 = _filter_back_row(s, 5, LENGTH, SPLITS, mask)
    w += at * 9
    p, q, r = _filter_back_1d(a0, b0, c0, d0, e0, f0)
    tl.store(w, p, mask)
    tl.store(w + 3, q, mask)
    tl.store(w + 6, r, mask)
    p, q, r = _filter_back_1d(a1, b1, c1, d1, e1, f1)
    tl.store(w + 1, p, mask)
    tl.store(w + 4, q, mask)
    tl.store(w + 7, r, mask)
    p, q, r = _filter_back_1d(a2, b2, c2, d2, e2, f2)
    tl.store(w + 2, p, mask)
    tl.store(w + 5, q, mask)
    tl.store(w + 8, r, mask)

"""judge(): is a convolution's result right? Samples of it are computed again in float64 on the CPU.

The device is asked to move values (index, copy) and to find extremes; no product or sum of its own is believed.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rocm_patch.conv.spec import FORWARD, GRAD_WEIGHT, ConvSpec

_Pair = tuple[Tensor, Tensor]

# A single wrong element among S samples, off by x root mean squares, makes an error of x / sqrt(S): with 64 or
# fewer samples every element is bounded by 8 rtol, and needs no bound of its own. (One that is tighter would
# convict Winograd: the corners of F(4x4,3x3) tiles are 10 times less accurate than the whole.)
_SAMPLES = 64
_FEWEST = 4
_GATHERED_BYTES = 8 << 20
_PRODUCTS = 4 << 20  # in grad_weight, where each sample sums over the batch and all positions

# F(4x4,3x3) sums up to 10 x 10 times an input value before it multiplies (row sums of its transform, Lavin and
# Gray, arXiv:1509.09308): in float16 that overflows where the convolution itself does not.
_TRANSFORM_GROWTH = 128


@dataclass(frozen=True)
class Judgement:
    """What is known about one result.

    Attributes:
        kind: `ok`, `wrong`, or `unknown` where nan and inf leave too little to compare.
        error: ||computed - exact|| / max(||exact||, ||sum of |products||| / sqrt(summed_length)), Frobenius over
            the samples and without the bias: a relative error that cancellation does not blow up. inf where
            something other than the size of the error is wrong, nan for unknown.
        detail: a line for people.
    """

    kind: str
    error: float
    detail: str


@torch.no_grad()
def judge(
    spec: ConvSpec, first: Tensor, second: Tensor, result: Tensor, rtol: float, bias: Tensor | None = None
) -> Judgement:
    """Compare samples of a result with float64; the spec alone decides which.

    Waits for the device, copies about 8 MiB from it; where four elements take more operands than that, these.

    Args:
        spec: the convolution.
        first: the first operand of `Strategy.run`.
        second: the second one.
        result: what was computed, in any memory format.
        rtol: bound on `Judgement.error`.
        bias: what was added to the result over its dim 1.
    """
    if tuple(result.shape) != spec.result or result.dtype != getattr(torch, spec.dtype):
        return Judgement("wrong", math.inf, f"the result is {result.dtype} {tuple(result.shape)}, not {spec.result}")
    if result.is_complex():
        return Judgement("unknown", math.nan, "complex values are not compared")
    if result.numel() == 0:
        return Judgement("ok", 0.0, "an empty result")
    operands = (first, second)
    if not math.isfinite(_largest(result)):
        wrong = _judge_non_finite(spec, operands, result, bias)
        if wrong:
            return wrong
    positions = _positions(spec)
    computed, added = _at(result, positions), _at(bias, positions[:, 1:2])
    # Matrix units may read denormals as zero (https://rocm.docs.amd.com/projects/MIOpen/en/latest/
    # MI200AlternateImplementation.html), so a result may also be right for operands without them.
    for flush in (0.0, torch.finfo(result.dtype).tiny):
        sums = _sums(spec, operands, positions, flush)
        judgement = _compare(spec, positions, computed, added, sums, rtol)
        if judgement.kind != "wrong":
            break
    return judgement


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; nan or inf if there is one."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float16:
        tensor = tensor.float()  # torch 1.13 has no aminmax for it
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return math.nan if math.isnan(low) else max(abs(low), abs(high))


def _at(tensor: Tensor | None, positions: Tensor) -> Tensor:
    """Elements at positions (S, dims), in float64 on the CPU; zeros of no tensor."""
    if tensor is None:
        return torch.zeros(len(positions), dtype=torch.float64, device="cpu")
    return tensor[tuple(positions.to(tensor.device).unbind(1))].cpu().double()


def _compare(
    spec: ConvSpec, positions: Tensor, computed: Tensor, added: Tensor, sums: _Pair, rtol: float
) -> Judgement:
    usable = torch.isfinite(sums[1] + added) & torch.isfinite(computed)
    count = int(usable.sum())
    if 4 * count < len(usable):
        return Judgement("unknown", math.nan, f"only {count} of {len(usable)} samples are free of nan and inf")
    positions, computed, added, exact, absolute = (t[usable] for t in (positions, computed, added, *sums))
    full = exact + added
    kind = torch.finfo(getattr(torch, spec.dtype))
    # Allowed besides rtol: rounding where the bias is added (no part of the scale, lest it hide the products),
    # results and products that are flushed to zero. Half types accumulate in float32.
    flushed = torch.where(full.abs() <= kind.tiny, kind.tiny, kind.tiny * kind.eps)
    product = torch.finfo(torch.float64 if spec.dtype == "float64" else torch.float32).tiny
    allowed = kind.eps * added.abs() + flushed + spec.summed_length * product
    off = ((computed - full.clamp(-kind.max, kind.max)).abs() - allowed).clamp(min=0)
    scale = max(_rms(exact), _rms(absolute) / math.sqrt(max(1, spec.summed_length)))
    error = _rms(off) / scale if scale else (math.inf if off.any() else 0.0)
    detail = f"relative error {error:.2g} over {count} samples, bound {rtol:.2g}"
    if error <= rtol:
        return Judgement("ok", error, detail)
    worst = int(off.argmax())
    where, value = tuple(positions[worst].tolist()), float(computed[worst])
    return Judgement("wrong", error, f"{detail}; {value:.6g} instead of {float(full[worst]):.6g} at {where}")


def _rms(values: Tensor) -> float:
    return math.sqrt(float((values * values).mean()))


def _judge_non_finite(spec: ConvSpec, operands: _Pair, result: Tensor, bias: Tensor | None) -> Judgement | None:
    """`wrong` for nan or inf that the operands give no reason for; None where the samples have to tell.

    Non-finite operands are a reason anywhere: FFT and Winograd kernels spread them over a plane or a tile, and
    where an image is padded with zeros nan * 0 is nan.
    """
    limit = torch.finfo(result.dtype).max
    causes = operands if bias is None else (*operands, bias)
    if not all(_largest(cause) * _TRANSFORM_GROWTH <= limit for cause in causes):
        return None
    mask = (~torch.isfinite(result)).reshape(-1)
    found: list[int] = []
    for start in range(0, len(mask), 1 << 20):  # in parts: nonzero takes 8 bytes per element that it finds
        part = mask[start : start + (1 << 20)].nonzero().flatten()
        found += (part[:: max(1, len(part) // 8)][:8] + start).tolist()
        if len(found) >= _SAMPLES:
            break
    positions = _unravel(torch.tensor(found, device="cpu"), spec.result)[: _sample_count(spec)]
    exact, absolute = _sums(spec, operands, positions)
    added = _at(bias, positions[:, 1:2])
    # Half of the limit: partial sums are rounded too, and may carry a factor of a transform.
    baseless = (absolute + added.abs() <= limit / 2).nonzero().flatten().tolist()
    if not baseless:
        return None
    where, value = tuple(positions[baseless[0]].tolist()), float((exact + added)[baseless[0]])
    share = f"{int(mask.sum())} of {len(mask)} elements are nan or inf"
    return Judgement("wrong", math.inf, f"{share}, one instead of {value:.6g} at {where}")


def _unravel(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    columns = []
    for size in reversed(shape):
        columns.append(flat % size)
        flat = torch.div(flat, size, rounding_mode="floor")
    return torch.stack(columns[::-1], dim=1)


def _sample_count(spec: ConvSpec) -> int:
    """Elements to compute again; for grad_weight, pairs of planes (of image and of grad) to copy."""
    if spec.direction == GRAD_WEIGHT:
        pair = spec.batch * (math.prod(spec.spatial) + math.prod(spec.out)) * spec.itemsize
        return min(_SAMPLES, max(1, _GATHERED_BYTES // max(1, pair)))
    operands = 2 * spec.summed_length * spec.itemsize
    return min(_SAMPLES, max(_FEWEST, _GATHERED_BYTES // max(1, operands)))


def _positions(spec: ConvSpec) -> Tensor:
    """Elements (S, dims) of the result: the first, the last, its borders, and some all over it."""
    shape, count = spec.result, _sample_count(spec)
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(spec.to_json().encode()))
    if spec.direction == GRAD_WEIGHT:
        # One pair of planes serves every tap, so there are more samples than pairs.
        most = min(_SAMPLES, max(_FEWEST, _PRODUCTS // max(1, spec.summed_length)))
        pairs = min(count, most, shape[0] * shape[1])
        planes = _scattered(shape[:2], pairs, generator).repeat_interleave(most // pairs, dim=0)
        taps = _unravel(torch.arange(len(planes), device="cpu") % spec.taps, spec.kernel)
        taps[-1] = torch.tensor(spec.kernel, device="cpu") - 1
        return torch.cat([planes, taps], dim=1)
    if math.prod(shape) <= count:
        return _unravel(torch.arange(math.prod(shape), device="cpu"), shape)
    positions = _scattered(shape, count, generator)
    # Half of them go round the borders: first, last or anywhere in each spatial dimension, all combinations.
    half, dims = count // 2, len(spec.kernel)
    side = _unravel(torch.arange(half, device="cpu") % 3**dims, (3,) * dims)
    last = (torch.tensor(shape[2:], device="cpu") - 1).expand_as(side)
    positions[:half, 2:] = torch.where(side == 0, 0 * last, torch.where(side == 1, last, positions[:half, 2:]))
    return positions


def _scattered(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """Positions evenly over each dimension (a Latin hypercube), with the first and the last element."""
    columns = []
    for size in shape:
        order = torch.randperm(count, generator=generator, device="cpu")
        within = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        columns.append(((order + within) * (size / count)).long().clamp(max=size - 1))
    positions = torch.stack(columns, dim=1)
    positions[-1] = torch.tensor(shape, device="cpu") - 1
    positions[0] = 0
    return positions


def _sums(spec: ConvSpec, operands: _Pair, positions: Tensor, flush: float = 0.0) -> _Pair:
    """Sums of products, and of their absolute values, for some elements; operands below `flush` count as zero."""
    of = _sums_of_planes if spec.direction == GRAD_WEIGHT else _sums_of_windows
    return of(spec, *operands, positions, flush)


def _exactly(values: Tensor, flush: float) -> Tensor:
    values = values.cpu().double()
    return values.masked_fill(values.abs() < flush, 0.0) if flush else values


def _sums_of_windows(spec: ConvSpec, first: Tensor, weight: Tensor, positions: Tensor, flush: float) -> _Pair:
    """forward and grad_input: a window of `first` and its weights, (S, summed channels, *kernel), per sample."""
    dims, is_forward = len(spec.kernel), spec.direction == FORWARD
    channels, filters = spec.weight[1], spec.weight[0] // spec.groups  # of one group

    def along(dim: int, index: Tensor) -> Tensor:
        """An index (S or 1, n) as one that broadcasts to (S, channels, *kernel), n at this dimension behind S."""
        return index.view(len(index), *(index.shape[1] if i == dim else 1 for i in range(dims + 1)))

    here = positions[:, 1:2]
    summed = torch.arange(channels if is_forward else filters, device="cpu")[None]
    source = here // filters * channels + summed if is_forward else here // channels * filters + summed
    of_first = [along(0, positions[:, :1]), along(0, source)]
    of_weight = [along(0, here), along(0, summed)] if is_forward else [along(0, source), along(0, here % channels)]
    exists = torch.ones((), dtype=torch.bool, device="cpu")
    for i, (stride, padding, dilation) in enumerate(zip(spec.stride, spec.padding, spec.dilation, strict=True)):
        tap, place = torch.arange(spec.kernel[i], device="cpu")[None], positions[:, 2 + i : 3 + i]
        if is_forward:
            size, at = spec.spatial[i], place * stride - padding + tap * dilation
            found = (at >= 0) & (at < size)
        else:
            size, reach = spec.out[i], place + padding - tap * dilation
            at = torch.div(reach, stride, rounding_mode="floor")
            found = (at >= 0) & (at < size) & (reach % stride == 0)
        exists = exists & along(1 + i, found)
        of_first.append(along(1 + i, at.clamp(0, size - 1)))
        of_weight.append(along(1 + i, tap))
    pair = ((first, of_first), (weight, of_weight))
    window, weights = (_exactly(t[tuple(index.to(t.device) for index in at)], flush) for t, at in pair)
    products = (window * weights).masked_fill_(~exists, 0.0).flatten(1)
    return products.sum(1), products.abs_().sum(1)


def _sums_of_planes(spec: ConvSpec, image: Tensor, grad: Tensor, positions: Tensor, flush: float) -> _Pair:
    """grad_weight: a channel of the image (N, *spatial), shifted by the tap, and one of grad, per sample."""
    filters = spec.weight[0] // spec.groups
    pairs = dict.fromkeys(map(tuple, positions[:, :2].tolist()))
    of_image = torch.tensor([k // filters * spec.weight[1] + c for k, c in pairs], device=image.device)
    of_grad = torch.tensor([k for k, _ in pairs], device=grad.device)
    images = dict(zip(pairs, _exactly(image.index_select(1, of_image), flush).unbind(1), strict=True))
    grads = dict(zip(pairs, _exactly(grad.index_select(1, of_grad), flush).unbind(1), strict=True))
    exact, absolute = [], []
    for k, c, *tap in positions.tolist():
        reads, meets = [slice(None)], [slice(None)]
        for i, (stride, padding, dilation) in enumerate(zip(spec.stride, spec.padding, spec.dilation, strict=True)):
            shift = tap[i] * dilation - padding
            start = max(0, -(shift // stride))  # output positions for which this tap lies inside the image
            stop = max(start, min(spec.out[i], (spec.spatial[i] - 1 - shift) // stride + 1))
            meets.append(slice(start, stop))
            reads.append(slice(start * stride + shift, max(0, stop * stride + shift - stride + 1), stride))
        products = images[k, c][tuple(reads)] * grads[k, c][tuple(meets)]
        exact.append(products.sum())
        absolute.append(products.abs_().sum())
    return torch.stack(exact), torch.stack(absolute)

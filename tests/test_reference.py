"""judge() sees wrong results, and leaves right ones alone: against torch's own float64 convolutions on the CPU."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rocm_patch.conv.cases import CASES, Case
from rocm_patch.conv.native import NATIVE_RTOL
from rocm_patch.conv.spec import DIRECTIONS, FORWARD, GRAD_INPUT, GRAD_WEIGHT, output_size
from rocm_patch.trust.reference import judge

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DTYPES = ("float64", "float32", "float16", "bfloat16")
BY_NAME = {case.why: case for case in CASES}
PLAIN = BY_NAME["3x3 as in every network"]
# What rounding the exact result leaves: the unit roundoff, and some for norms over few samples.
ROUNDED = {"float64": 1e-14, "float32": 1e-7, "float16": 6e-4, "bfloat16": 5e-3}


def exact_results(case, dtype, seed=1, scale=1.0):
    """Operands of `dtype` and the exact float64 result, per direction."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    image = (scale * torch.randn(case.image, generator=generator, dtype=torch.float64)).to(kind)
    weight = torch.randn(case.weight, generator=generator, dtype=torch.float64).to(kind)
    x, w = (t.double().clone().requires_grad_() for t in (image, weight))
    out = CONVS[len(case.stride)](x, w, None, case.stride, case.padding, case.dilation, case.groups)
    grad = (scale * torch.randn(out.shape, generator=generator, dtype=torch.float64)).to(kind)
    out.backward(grad.double())
    return {
        FORWARD: (image, weight, out.detach()),
        GRAD_INPUT: (grad, weight, x.grad),
        GRAD_WEIGHT: (image, grad, w.grad),
    }


def case_of(spec):
    return Case("", spec.image, spec.weight, spec.stride, spec.padding, spec.dilation, spec.groups)


def ways_to_be_wrong(exact):
    """Tampered copies of an exact result; those that tampering leaves (nearly) as it is are left out."""
    yield "scaled", exact * 1.15
    if exact.numel() > 1:
        flat = exact.flatten()
        yield "nan first", flat.index_fill(0, torch.tensor([0]), math.nan).view_as(exact)
        yield "nan within", flat.index_fill(0, torch.tensor([exact.numel() // 2]), math.nan).view_as(exact)
        yield "inf last", flat.index_fill(0, torch.tensor([exact.numel() - 1]), -math.inf).view_as(exact)
    for dim in range(2, exact.dim()):
        size = exact.shape[dim]
        if size > 1:
            yield f"shifted in dim {dim}", exact.roll(1, dim)
        for border in {0, size - 1}:
            yield f"dim {dim} zero at {border}", exact.index_fill(dim, torch.tensor([border]), 0.0)
    if exact.shape[1] > 1:
        order = [1, 0, *range(2, exact.shape[1])]
        yield "channels 0 and 1 swapped", exact[:, order]
    if exact.shape[0] > 1:
        yield "last of dim 0 repeats the one before", torch.cat([exact[:-1], exact[-2:-1]])
    yield "zero", torch.zeros_like(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_right_results_are_ok_and_wrong_ones_are_seen(case, dtype):
    seen = 0
    for direction, (first, second, exact) in exact_results(case, dtype).items():
        spec = case.spec(direction, dtype)
        kind = first.dtype
        rtol = NATIVE_RTOL[dtype]
        right = judge(spec, first, second, exact.to(kind), rtol)
        assert right.kind == "ok", right
        assert right.error <= ROUNDED[dtype], right
        for name, tampered in ways_to_be_wrong(exact):
            change = (tampered - exact).nan_to_num(math.inf).norm() / exact.norm()
            if change < 0.1:  # a border whose exact value is zero, for example
                continue
            wrong = judge(spec, first, second, tampered.to(kind), rtol)
            assert wrong.kind == "wrong", (direction, name, wrong, float(change))
            assert wrong.error > rtol
            assert "instead of" in wrong.detail
            seen += 1
        if dtype != "bfloat16":
            assert judge(spec, first, second, (exact * 1.05).to(kind), rtol).kind == "wrong"
    assert seen >= 8


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_and_inf_are_located(direction):
    first, second, exact = exact_results(PLAIN, "float32")[direction]
    result = exact.float()
    place = tuple(size // 2 for size in result.shape)
    result[place] = math.nan
    found = judge(PLAIN.spec(direction), first, second, result, 2e-2)
    assert found.kind == "wrong" and found.error == math.inf
    assert f"1 of {result.numel()} elements" in found.detail and str(place) in found.detail
    result.fill_(math.inf)
    found = judge(PLAIN.spec(direction), first, second, result, 2e-2)
    assert found.kind == "wrong" and f"{result.numel()} of {result.numel()} elements" in found.detail


def test_nan_beyond_the_first_million_elements_is_found():
    case = Case("large", (1, 1, 1100, 1000), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1))
    first, second, exact = exact_results(case, "float32")[FORWARD]
    result = exact.float()
    assert judge(case.spec(FORWARD), first, second, result, 2e-2).kind == "ok"
    result[0, 0, 1099, 998] = math.nan
    found = judge(case.spec(FORWARD), first, second, result, 2e-2)
    assert found.kind == "wrong" and "(0, 0, 1099, 998)" in found.detail


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_overflow_in_float16_is_not_wrong(direction):
    few = 0
    for scale in (60.0, 300.0, 5000.0):
        first, second, exact = exact_results(PLAIN, "float16", scale=scale)[direction]
        result = exact.half()
        few += bool(result.isinf().any())
        assert judge(PLAIN.spec(direction, "float16"), first, second, result, 3e-2).kind in ("ok", "unknown")
        # inf - inf, where partial sums in float16 overflow
        result[result.isinf()] = math.nan
        assert judge(PLAIN.spec(direction, "float16"), first, second, result, 3e-2).kind in ("ok", "unknown")
    assert few
    # The same values in float32 overflow nowhere.
    result = exact.float()
    result.view(-1)[5] = math.inf
    assert judge(PLAIN.spec(direction), first.float(), second.float(), result, 2e-2).kind == "wrong"


def test_a_winograd_transform_may_overflow_in_float16():
    first, second, _ = exact_results(PLAIN, "float16")[FORWARD]
    first[0, 0, 5, 5] = 30000.0
    second.mul_(1e-3)
    result = F.conv2d(first.double(), second.double(), padding=1).half()
    assert result.isfinite().all()
    result[0, :, 4:8, 4:8] = math.nan  # the tile that holds it
    assert judge(PLAIN.spec(FORWARD, "float16"), first, second, result, 3e-2).kind == "ok"
    result[result.isfinite()] *= 1.2
    assert judge(PLAIN.spec(FORWARD, "float16"), first, second, result, 3e-2).kind == "wrong"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_non_finite_operands(direction, dtype, bad):
    spec = PLAIN.spec(direction, dtype)
    first, second, exact = exact_results(PLAIN, dtype)[direction]
    for operand in (first, second):
        kept = operand.clone()
        operand.fill_(bad)
        everything = torch.full_like(exact, math.nan).to(first.dtype)
        assert judge(spec, first, second, everything, 3e-2).kind == "unknown"
        operand.copy_(kept)
        operand.view(-1)[7] = bad
        assert judge(spec, first, second, everything, 3e-2).kind == "unknown"  # as an FFT may spread it
        operand.copy_(kept)


def test_few_nan_operands_leave_enough_to_judge():
    first, second, _ = exact_results(PLAIN, "float32")[FORWARD]
    first[1, 2, 3, 4] = math.nan
    result = F.conv2d(first.double(), second.double(), padding=1).float()
    assert judge(PLAIN.spec(FORWARD), first, second, result, 2e-2).kind == "ok"
    assert judge(PLAIN.spec(FORWARD), first, second, result * 1.05, 2e-2).kind == "wrong"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_operands_allow_zero_only(direction, dtype):
    spec = PLAIN.spec(direction, dtype)
    first, second, exact = exact_results(PLAIN, dtype)[direction]
    first.zero_()
    zero = torch.zeros(exact.shape, dtype=first.dtype)
    assert judge(spec, first, second, zero, 3e-2) == judge(spec, first, second, -zero, 3e-2)
    assert judge(spec, first, second, zero, 3e-2).kind == "ok"
    assert judge(spec, first, second, zero + 1e-3, 3e-2).kind == "wrong"
    if direction != GRAD_WEIGHT:
        bias = torch.linspace(-2, 3, spec.result[1]).to(first.dtype)
        shaped = (zero.transpose(1, -1) + bias).transpose(1, -1)
        assert judge(spec, first, second, shaped, 3e-2, bias).kind == "ok"
        assert judge(spec, first, second, zero, 3e-2, bias).kind == "wrong"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_counted_and_hides_nothing(dtype):
    first, second, exact = exact_results(PLAIN, dtype)[FORWARD]
    spec, rtol = PLAIN.spec(FORWARD, dtype), NATIVE_RTOL[dtype]
    bias = torch.linspace(30, 40, spec.result[1]).to(first.dtype)
    shaped = bias.double().view(-1, 1, 1)
    assert judge(spec, first, second, (exact + shaped).to(first.dtype), rtol, bias).kind == "ok"
    assert judge(spec, first, second, (exact * 1.3 + shaped).to(first.dtype), rtol, bias).kind == "wrong"
    assert judge(spec, first, second, (exact + shaped.flip(0)).to(first.dtype), rtol, bias).kind == "wrong"
    assert judge(spec, first, second, exact.to(first.dtype), rtol, bias).kind == "wrong"
    # Rounding to the spacing of a large bias is no error of the convolution.
    large = torch.full_like(bias, 3e4)
    assert judge(spec, first, second, (exact + 3e4).to(first.dtype), rtol, large).kind == "ok"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_with_output_padding_and_bias(dims, dtype):
    generator = torch.Generator().manual_seed(3)
    kind = getattr(torch, dtype)
    grad = torch.randn((2, 6, *(5, 6, 4)[:dims]), generator=generator, dtype=torch.float64).to(kind)
    weight = torch.randn((6, 2, *(3, 2, 3)[:dims]), generator=generator, dtype=torch.float64).to(kind)
    bias = torch.randn(4, generator=generator, dtype=torch.float64).to(kind)
    stride, padding, dilation, extra = (2, 3, 2)[:dims], (1, 0, 2)[:dims], (1, 2, 1)[:dims], (1, 2, 1)[:dims]
    out = TRANSPOSED[dims](
        grad.double(), weight.double(), bias.double(), stride, padding, extra, groups=2, dilation=dilation
    )
    plain = Case("", tuple(out.shape), tuple(weight.shape), stride, padding, dilation, 2)
    spec = dataclasses.replace(plain.spec(GRAD_INPUT, dtype), out=tuple(grad.shape[2:]))
    rtol = NATIVE_RTOL[dtype]
    assert judge(spec, grad, weight, out.to(kind), rtol, bias).kind == "ok"
    assert judge(spec, grad, weight, out.to(kind), rtol).kind == "wrong"
    for dim in range(2, 2 + dims):
        assert judge(spec, grad, weight, out.roll(1, dim).to(kind), rtol, bias).kind == "wrong"
    covered = out.clone()
    covered[..., -1] = 0  # what output_padding adds has the bias at least
    assert judge(spec, grad, weight, covered.to(kind), rtol, bias).kind == "wrong"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strides_do_not_matter(direction):
    first, second, exact = exact_results(PLAIN, "float32")[direction]
    spec = PLAIN.spec(direction, channels_last=True)
    result = exact.float().contiguous(memory_format=torch.channels_last)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (first, second)]
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (first, second)]
    for operands in (last, strided):
        assert judge(spec, *operands, result, 2e-2).kind == "ok"
        assert judge(spec, *operands, result * 1.05, 2e-2).kind == "wrong"
        assert judge(spec, *operands, result.roll(1, 3), 2e-2).kind == "wrong"
    # out.sum().backward() hands on an expanded gradient of one element
    one = torch.ones(()).expand(spec.grad)
    image, weight = (t.double() for t in exact_results(PLAIN, "float32")[FORWARD][:2])
    x, w = image.clone().requires_grad_(), weight.clone().requires_grad_()
    F.conv2d(x, w, padding=1).sum().backward()
    if direction == GRAD_INPUT:
        assert judge(spec, one, second, x.grad.float(), 2e-2).kind == "ok"
        assert judge(spec, one, second, x.grad.float() * 1.05, 2e-2).kind == "wrong"
    if direction == GRAD_WEIGHT:
        assert judge(spec, first, one, w.grad.float(), 2e-2).kind == "ok"
        assert judge(spec, first, one, w.grad.float() * 1.05, 2e-2).kind == "wrong"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_denormals_may_be_flushed(direction):
    spec = PLAIN.spec(direction, "float16")
    tiny = torch.finfo(torch.float16).tiny
    first, second, exact = exact_results(PLAIN, "float16", scale=1e-5)[direction]
    if direction == GRAD_WEIGHT:  # both operands are scaled: the result is flushed
        assert judge(spec, first, second, torch.zeros_like(exact).half(), 3e-2).kind == "ok"
        return
    assert judge(spec, first, second, exact.half(), 3e-2).kind == "ok"
    assert judge(spec, first, second, exact.half().masked_fill(exact.abs() < tiny, 0.0), 3e-2).kind == "ok"
    # operands flushed as they are read
    assert (first.abs() < tiny).any()
    flushed = first.masked_fill(first.abs() < tiny, 0.0)
    x, w = (exact.new_empty(spec.image), second.double())
    if direction == FORWARD:
        result = F.conv2d(flushed.double(), w, padding=1)
    else:
        result = F.conv_transpose2d(flushed.double(), w, padding=1)
    assert result.shape == (x.shape if direction == GRAD_INPUT else exact.shape)
    assert judge(spec, first, second, result.half(), 3e-2).kind == "ok"
    assert judge(spec, first, second, exact.half() + 1e-3, 3e-2).kind == "wrong"


def test_the_callers_state_is_left_alone():
    """Random numbers, gradients, autocast, and the defaults for new tensors."""
    for direction in DIRECTIONS:
        first, second, exact = exact_results(PLAIN, "float32")[direction]
        spec, result = PLAIN.spec(direction), exact.float()
        state = torch.random.get_rng_state()
        expected = judge(spec, first, second, result, 2e-2)
        assert torch.equal(state, torch.random.get_rng_state())
        first, second = first.requires_grad_(), second.requires_grad_()
        assert judge(spec, first, second, result, 2e-2) == expected
        with torch.inference_mode():
            assert judge(spec, first, second, result, 2e-2) == expected
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert judge(spec, first, second, result, 2e-2) == expected
        try:
            torch.set_default_dtype(torch.float16)
            if hasattr(torch, "set_default_device"):
                torch.set_default_device("meta")
            assert judge(spec, first, second, result, 2e-2) == expected
        finally:
            torch.set_default_dtype(torch.float32)
            if hasattr(torch, "set_default_device"):
                torch.set_default_device(None)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_result_of_another_shape_or_type_is_wrong(direction):
    first, second, exact = exact_results(PLAIN, "float32")[direction]
    spec = PLAIN.spec(direction)
    assert judge(spec, first, second, exact.float()[1:], 2e-2).kind == "wrong"
    assert judge(spec, first, second, exact, 2e-2).kind == "wrong"


def test_long_sums_are_judged_by_fewer_samples():
    """Kernels and batches beyond the bound on copied data."""
    wide = Case("", (1, 600, 40, 40), (2, 600, 33, 33), (1, 1), (16, 16), (1, 1))
    deep = Case("", (64, 2, 192, 192), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1))
    for case, direction in ((wide, FORWARD), (deep, GRAD_WEIGHT)):
        generator = torch.Generator().manual_seed(5)
        image = torch.randn(case.image, generator=generator)
        weight = torch.randn(case.weight, generator=generator).requires_grad_()
        spec = case.spec(direction)
        out = F.conv2d(image, weight, None, 1, case.padding)
        first, second, result = image, weight.detach(), out.detach()
        if direction == GRAD_WEIGHT:
            second = torch.randn(spec.grad, generator=generator)
            (result,) = torch.autograd.grad(out, weight, second)
        assert judge(spec, first, second, result, 2e-2).kind == "ok"
        assert judge(spec, first, second, result * 1.05, 2e-2).kind == "wrong"


@st.composite
def specs(draw):
    dims = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    groups, channels, filters = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 3)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    spatial = tuple(max(1, r - 2 * p) + draw(st.integers(0, 5)) for r, p in zip(reach, padding, strict=True))
    case = Case(
        "", (draw(st.integers(1, 3)), groups * channels, *spatial), (groups * filters, channels, *kernel),
        stride, padding, dilation, groups,
    )  # fmt: skip
    assert min(output_size(spatial, kernel, stride, padding, dilation)) >= 1
    return case.spec(draw(st.sampled_from(DIRECTIONS)), draw(st.sampled_from(DTYPES)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs(), st.integers(0, 1000))
def test_exact_results_of_random_specs_are_ok(spec, seed):
    first, second, exact = exact_results(case_of(spec), spec.dtype, seed)[spec.direction]
    judgement = judge(spec, first, second, exact.to(first.dtype), 4 * ROUNDED[spec.dtype])
    assert judgement.kind == "ok", judgement
    # Where almost everything cancels even the sign is lost in what rounding may do.
    if exact.square().mean().sqrt() > 0.3 * math.sqrt(spec.summed_length):
        assert judge(spec, first, second, -exact.to(first.dtype), 0.05).kind == "wrong"

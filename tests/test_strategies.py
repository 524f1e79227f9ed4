"""Every strategy on drawn specs against float64: tolerance, error bounds, derivatives, workspace.

The number of examples is raised by hand: CONV_EXAMPLES=50000 python -m pytest tests/test_strategies.py -k drawn
"""

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rocm_patch.conv import GROUPED, IM2COL, NATIVE, STRATEGIES
from rocm_patch.conv.autograd import convolution
from rocm_patch.conv.cases import CASES, Case
from rocm_patch.conv.spec import DIRECTIONS, FORWARD, GRAD_INPUT, GRAD_WEIGHT, ConvSpec, output_size
from rocm_patch.conv.winograd import magnitude

IS_TORCH_1 = torch.__version__.startswith("1.")
EXAMPLES = int(os.environ.get("CONV_EXAMPLES", "500" if IS_TORCH_1 else "2000"))
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = ["float32", "float32", "float64", "bfloat16", "complex64", "complex128"]
if not IS_TORCH_1:
    DTYPES.append("float16")  # torch 1.13 has no products of float16 matrices on the CPU
# The fused ones run on GPUs: tests/test_kernels.py.
ON_CPU = [s for s in STRATEGIES if "GPU" not in (s.rejects(CASES[3].spec(FORWARD)) or "")]
GEMMS = [strategy for strategy in STRATEGIES if not strategy.is_approximate]
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}
# The drawn cases plus layers long enough in the sum that rounding shows.
LONG = (
    Case("3x3, 64 channels", (2, 64, 20, 22), (48, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("3x3 stride 2, 128 channels", (2, 128, 14, 14), (64, 128, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("one tap, 512 channels", (2, 512, 7, 7), (64, 512, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("8 groups of 32 channels", (2, 256, 9, 9), (128, 32, 3, 3), (1, 1), (1, 1), (1, 1), 8),
    Case("depthwise, large map", (2, 16, 40, 40), (16, 1, 5, 5), (1, 1), (2, 2), (1, 1), 16),
    Case("1-d, 128 channels", (2, 128, 50), (64, 128, 9), (1,), (4,), (1,)),
)


@st.composite
def specs(draw):
    """Specs of every kind: grouped, depthwise with multiplier, 3x3 for Winograd, and with output_padding."""
    dims = draw(st.sampled_from((1, 2, 2, 2, 3)))
    small = [draw(st.integers(1, 3)) for _ in range(3 * dims)]
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    stride, dilation = small[:dims], small[dims : 2 * dims]
    if dims == 2 and draw(st.booleans()):
        kernel, stride, dilation = [3, 3], [1, 1], [1, 1]
    padding = [draw(st.integers(0, 4)) for _ in range(dims)]
    groups, channels = draw(st.sampled_from(((1, None), (1, None), (2, None), (3, None), (2, 1), (4, 1))))
    channels = channels or draw(st.integers(1, 5))
    out = [draw(st.integers(1, 7)) for _ in range(dims)]
    spatial = []
    for i, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
        # What a stride leaves over, or a transposed convolution's output_padding.
        size = (out[i] - 1) * s + d * (k - 1) + 1 - 2 * p + draw(st.integers(0, max(s, d) - 1))
        spatial.append(max(1, size))
        if size < 1:
            out[i] = output_size([1], [k], [s], [p], [d])[0]
    dtype = draw(st.sampled_from(DTYPES))
    return ConvSpec(
        draw(st.sampled_from(DIRECTIONS)), (draw(st.integers(1, 4)), channels * groups, *spatial),
        (draw(st.integers(1, 4)) * groups, channels, *kernel), tuple(stride), tuple(padding), tuple(dilation), groups,
        tuple(out), dtype, "cpu", dims > 1 and draw(st.booleans()),
    )  # fmt: skip


def operands_of(spec, seed=0):
    """(image, weight, grad) in the spec's type and layout."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in (spec.image, spec.weight, spec.grad):
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "complex" in spec.dtype:
            tensor = torch.complex(tensor, torch.randn(shape, generator=generator, dtype=torch.float64))
        tensor = tensor.to(getattr(torch, spec.dtype))
        made.append(tensor.contiguous(memory_format=LAST[tensor.dim()]) if spec.channels_last else tensor)
    return made


def pair_of(spec, image, weight, grad):
    return {FORWARD: (image, weight), GRAD_INPUT: (grad, weight), GRAD_WEIGHT: (image, grad)}[spec.direction]


def exactly(spec, image, weight, grad):
    """The spec's result in float64 by aten's own kernels; a complex product is four real ones."""
    if image.is_complex():
        parts = [(t.real, t.imag) for t in (image, weight, grad)]
        used = [i for i, name in enumerate(("image", "weight", "grad")) if name in _NEEDS[spec.direction]]

        def real(a, b):
            chosen = [parts[i][0] for i in range(3)]
            chosen[used[0]], chosen[used[1]] = parts[used[0]][a], parts[used[1]][b]
            return exactly(spec, *chosen)

        return torch.complex(real(0, 0) - real(1, 1), real(0, 1) + real(1, 0))
    image, weight, grad = (t.double().contiguous() for t in (image, weight, grad))
    if spec.direction != FORWARD:
        image, weight = image.requires_grad_(), weight.requires_grad_()
    out = CONVS[len(spec.out)](image, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)
    out = out[(slice(None), slice(None), *map(slice, spec.out))]
    if spec.direction == FORWARD:
        return out
    of_image, of_weight = torch.autograd.grad(out, (image, weight), grad)
    return of_image if spec.direction == GRAD_INPUT else of_weight


_NEEDS = {FORWARD: ("image", "weight"), GRAD_INPUT: ("weight", "grad"), GRAD_WEIGHT: ("image", "grad")}


def wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def of_absolutes(spec, tensors):
    """Sums of absolute values of the products."""
    return exactly(spec, *(t.abs() for t in tensors))


def error_of(result, exact, magnitude, spec):
    """||result - exact||, relative to ||exact|| where that is no accident of cancellation."""
    scale = max(exact.norm().item(), magnitude.norm().item() / math.sqrt(spec.summed_length), 1e-300)
    return (wide(result) - exact).norm().item() / scale


@pytest.mark.timeout(900)
@settings(
    max_examples=EXAMPLES, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(spec=specs(), budget=st.sampled_from((1 << 30, 5000, 1)))
def test_all_strategies_agree_with_float64_on_drawn_specs(spec, budget):
    tensors = operands_of(spec)
    exact, magnitude_ = exactly(spec, *tensors), of_absolutes(spec, tensors)
    ran = 0
    for strategy in STRATEGIES:
        if strategy.rejects(spec) is None:
            result = strategy.run(spec, *pair_of(spec, *tensors), budget)
            assert tuple(result.shape) == spec.result and result.dtype == tensors[0].dtype, strategy.name
            error = error_of(result, exact, magnitude_, spec)
            assert error <= strategy.rtol[spec.dtype], (strategy.name, str(spec), error)
            ran += 1
    assert ran


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=specs())
def test_native_computes_every_spec_that_it_is_given(spec):
    """Also those where the output is smaller than the plain operation's."""
    if spec.dtype in ("float32", "float64"):
        tensors = operands_of(spec)
        result = NATIVE.run(spec, *pair_of(spec, *tensors), 0)
        assert tuple(result.shape) == spec.result
        error = error_of(result, exactly(spec, *tensors), of_absolutes(spec, tensors), spec)
        assert error <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_error_of_matrix_products_is_that_of_native(dtype):
    """Each case below eps sqrt(K) ||w|| ||x||, and in the geometric mean at most twice native's error."""
    logs = {}
    for case in (*CASES, *LONG):
        for direction in DIRECTIONS:
            spec = case.spec(direction, dtype)
            image, weight, grad = operands_of(spec)
            first, second = pair_of(spec, image, weight, grad)
            exact = exactly(dataclasses.replace(spec, dtype="float64"), image, weight, grad)
            bound = EPSILON[dtype] * math.sqrt(spec.summed_length) * wide(first).norm() * wide(second).norm()
            if dtype == "float64":
                bound = 2 * bound  # what it is compared with has an error of its own
            errors = {}
            for strategy in (*GEMMS, NATIVE):
                if strategy.rejects(spec) is None:
                    difference = (strategy.run(spec, first, second, 1 << 30).double() - exact).norm()
                    assert difference <= bound, (strategy.name, str(spec))
                    errors[strategy.name] = max((difference / exact.norm()).item(), EPSILON[dtype] / 64)
            for name, error in errors.items():
                logs.setdefault(name, []).append(math.log(error / errors["native"]))
    means = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
    if dtype == "float32":  # native's float64 is what the error is measured by
        assert all(mean <= 2 for mean in means.values()), means


@pytest.mark.parametrize("strategy", GEMMS, ids=lambda s: s.name)
def test_no_element_exceeds_the_bound_of_a_sum(strategy):
    """|error| <= u (K + 2) sum|a||b| holds for any order of summation (Higham 2002, section 3.1)."""
    for case in (*CASES, *LONG):
        for direction in DIRECTIONS:
            spec = case.spec(direction)
            if strategy.rejects(spec) is None:
                tensors = operands_of(spec)
                result = strategy.run(spec, *pair_of(spec, *tensors), 1 << 30)
                bound = 2.0**-24 * (spec.summed_length + 2) * of_absolutes(spec, tensors) + 1e-30
                assert ((result.double() - exactly(spec, *tensors)).abs() <= bound).all(), str(spec)


@pytest.mark.parametrize("strategy", [s for s in ON_CPU if s.is_approximate], ids=lambda s: s.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_element_exceeds_winograds_bound(strategy, direction):
    """|error| <= u n |A^T| [(|G| |w| |G^T|) * (|B^T| |x| |B|)] |A|, n the roundings on the way to an element."""
    side = 2 if strategy.name == "winograd_f23" else 4
    tile = (side + 2) ** 2
    for case in (*CASES, LONG[0]):
        spec = case.spec(direction)
        if strategy.rejects(spec) is None:
            tensors = operands_of(spec)
            first, second = pair_of(spec, *tensors)
            result = strategy.run(spec, first, second, 1 << 30)
            roundings = spec.summed_length + 2 * tile + 9 + 6  # the sums, three transforms, their rounded entries
            bound = 2.0**-24 * roundings * magnitude(spec, first.double(), second.double(), side) + 1e-30
            assert ((result.double() - exactly(spec, *tensors)).abs() <= bound).all(), str(spec)


@pytest.mark.parametrize("channels", [64, 512, 2048])
@pytest.mark.parametrize("strategy", [s for s in ON_CPU if s.is_approximate], ids=lambda s: s.name)
def test_winograds_tolerance_leaves_room_for_many_channels(strategy, channels):
    case = Case("many channels", (1, channels, 8, 8), (8, channels, 3, 3), (1, 1), (1, 1), (1, 1))
    for scale_of in (lambda t: t, torch.relu):
        for direction in DIRECTIONS:
            spec = case.spec(direction)
            tensors = [scale_of(t) for t in operands_of(spec)]
            exact, size = exactly(spec, *tensors), of_absolutes(spec, tensors)
            result = strategy.run(spec, *pair_of(spec, *tensors), 1 << 30)
            assert 4 * error_of(result, exact, size, spec) <= strategy.rtol["float32"]


SMALL = (
    Case("one tap, stride 2", (2, 2, 4, 3), (3, 2, 1, 1), (2, 1), (0, 0), (1, 1)),
    Case("3x3", (1, 2, 5, 4), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("strided, dilated", (1, 2, 6, 5), (1, 2, 2, 2), (2, 1), (1, 0), (1, 2)),
    Case("depthwise with multiplier", (1, 2, 4, 4), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    Case("grouped", (2, 4, 4, 3), (2, 2, 2, 2), (2, 1), (1, 1), (1, 1), 2),
    Case("1-d", (2, 2, 6), (2, 2, 3), (2,), (1,), (1,)),
    Case("3-d", (1, 1, 3, 3, 3), (2, 1, 2, 2, 2), (1, 2, 1), (0, 1, 0), (1, 1, 1)),
)


@pytest.mark.parametrize("strategy", ON_CPU, ids=lambda s: s.name)
def test_gradcheck_and_gradgradcheck(strategy):
    checked = 0
    for case in SMALL:
        for budget in (1 << 30, 1):
            named = {direction: case.spec(direction, "float64") for direction in DIRECTIONS}
            if strategy.rejects(named[FORWARD]) is not None:
                continue

            def compute(direction, first, second, named=named, budget=budget):
                return strategy.run(named[direction], first, second, budget)

            generator = torch.Generator().manual_seed(0)
            image, weight = (
                torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
                for shape in (case.image, case.weight)
            )
            function = lambda x, w, compute=compute: convolution(compute, x, w)  # noqa: E731
            assert torch.autograd.gradcheck(function, (image, weight))
            assert torch.autograd.gradgradcheck(function, (image, weight))
            checked += 1
    assert checked >= 2


def test_which_strategy_comes_first():
    """Every strategy but the fallbacks is somebody's first choice, and the reasons are given in words."""
    from rocm_patch.trust.choose import Chooser

    chosen = {
        Chooser().choose(case.spec(direction)).strategy.name
        for case in (*CASES, *LONG, Case("wide", (8, 64, 40, 40), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1)))
        for direction in DIRECTIONS
    }
    assert chosen >= {"pointwise", "winograd_f43", "depthwise", "grouped", "im2col"}
    for name in ("taps", "winograd_f23", "im2col"):
        assert Chooser(preferred=name).choose(LONG[0].spec(FORWARD)).strategy.name == name
    assert Chooser(exact=True, preferred="winograd_f43").choose(LONG[0].spec(FORWARD)).strategy is IM2COL
    assert Chooser().choose(LONG[3].spec(FORWARD)).strategy is GROUPED
    for strategy in STRATEGIES:
        for case in (*CASES, *LONG):
            reason = strategy.rejects(case.spec(FORWARD))
            assert reason is None or len(reason) > 10
            assert reason is not None or 0 < strategy.seconds(case.spec(FORWARD)) < math.inf


@settings(max_examples=300, deadline=None)
@given(spec=specs(), budget=st.sampled_from((1 << 30, 100_000, 5000, 1)))
def test_workspace_follows_the_budget(spec, budget):
    """Beyond the budget: weights in the GEMM's layout, one output position, sums of half types in float32."""
    weights = math.prod(spec.weight) * (spec.batch + 9) * 4 * max(spec.itemsize, 4)
    for strategy in STRATEGIES:
        if strategy.rejects(spec) is None and strategy.name != "pointwise":
            stated = strategy.workspace_bytes(spec, budget)
            assert 0 <= stated <= strategy.workspace_bytes(spec, 1) + 2 * budget + weights
            assert stated <= strategy.workspace_bytes(spec, 1 << 40) + weights

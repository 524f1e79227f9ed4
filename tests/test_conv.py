"""Every strategy against float64, in all three directions."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from rocm_patch.conv import NATIVE, STRATEGIES
from rocm_patch.conv.cases import CASES, Case
from rocm_patch.conv.spec import DIRECTIONS, FORWARD, GRAD_INPUT, output_size
from rocm_patch.settings import STRATEGY_NAMES

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ALL = (*STRATEGIES, NATIVE)
# oneDNN has float16 on some CPUs only; torch 1.13's own transposed convolution in bfloat16 is wrong on the CPU
# (relative error 1.47 on the one-channel case).
NOT_NATIVE = {torch.float16, torch.bfloat16} if torch.__version__.startswith("1.") else {torch.float16}
BUDGETS = (1 << 30, 4000, 1)
# torch 1.13 has no half precision matrix products on the CPU.
HALF = [] if torch.__version__.startswith("1.") else [torch.float16]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, *HALF]


def tensors(case, dtype, channels_last=False):
    """Operands per direction, and the exact results in float64."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(case.image, generator=generator).to(dtype)
    weight = torch.randn(case.weight, generator=generator).to(dtype)
    exact_image, exact_weight = image.double().requires_grad_(), weight.double().requires_grad_()
    out = CONVS[len(case.stride)](
        exact_image, exact_weight, None, case.stride, case.padding, case.dilation, case.groups
    )
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    out.backward(grad.double())
    if channels_last:
        image, grad = (t.contiguous(memory_format=LAST[t.dim()]) for t in (image, grad))
    image, weight = image.detach(), weight.detach()
    operands = {"forward": (image, weight), "grad_input": (grad, weight), "grad_weight": (image, grad)}
    exact = {"forward": out.detach(), "grad_input": exact_image.grad, "grad_weight": exact_weight.grad}
    return operands, exact


def relative_error(result, exact):
    return ((result.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@cache
def error_of_products(dtype, length):
    """The relative error of torch's own product over so many terms, which no strategy can be better than.

    torch 1.13 adds bfloat16 up in bfloat16 where the processor has no AVX-512: 6.5e-2 over 1764 terms, seen on an AMD
    EPYC with AVX2; with the second operand transposed it is 1.7e-3 there.
    """
    if dtype is not torch.bfloat16:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 4, length, generator=generator).to(dtype)
    second = torch.randn(1, length, 3, generator=generator).to(dtype)
    return relative_error(torch.bmm(first, second), torch.bmm(first.double(), second.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_strategies_agree_with_float64(case, dtype):
    name = str(dtype).removeprefix("torch.")
    for channels_last in (False, True) if len(case.image) > 3 else (False,):
        operands, exact = tensors(case, dtype, channels_last)
        for direction in DIRECTIONS:
            spec = case.spec(direction, name, channels_last=channels_last)
            for strategy in ALL:
                if strategy.rejects(spec):
                    continue
                if strategy is NATIVE and dtype in NOT_NATIVE:
                    continue
                for budget in BUDGETS:
                    result = strategy.run(spec, *operands[direction], budget)
                    assert result.shape == spec.result
                    assert result.dtype == dtype
                    error = relative_error(result, exact[direction])
                    bound = max(strategy.rtol[name], 2 * error_of_products(dtype, math.prod(spec.out)))
                    assert error <= bound, (strategy.name, str(spec), budget, error)


def test_the_last_strategy_rejects_nothing():
    for case in CASES:
        for direction in DIRECTIONS:
            assert STRATEGIES[-1].rejects(case.spec(direction)) is None


def test_pointwise_says_why_it_rejects():
    pointwise = STRATEGIES[0]
    assert "9 taps" in pointwise.rejects(CASES[3].spec(FORWARD))
    assert "padded" in pointwise.rejects(CASES[2].spec(FORWARD))


def test_settings_name_every_strategy():
    """settings.py must know the names without importing torch."""
    assert tuple(strategy.name for strategy in STRATEGIES) == STRATEGY_NAMES


def test_inputs_may_be_views_and_expanded():
    base = torch.randn(2, 12, 9, 9, dtype=torch.float64)
    image = base[:, ::3, 1:, :]  # neither contiguous nor starting at 0
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64).transpose(2, 3)
    case = Case("view", tuple(image.shape), (5, 4, 3, 3), (1, 1), (1, 1), (1, 1))
    grad = torch.ones(1, dtype=torch.float64).expand(case.spec(FORWARD).grad)
    x, w = image.clone().requires_grad_(), weight.clone().requires_grad_()
    F.conv2d(x, w, padding=1).backward(grad)
    for strategy in STRATEGIES:
        spec = case.spec(FORWARD, "float64")
        if strategy.rejects(spec) is not None:
            continue
        assert torch.allclose(strategy.run(spec, image, weight, 1 << 30), F.conv2d(image, weight, padding=1))
        spec = case.spec(GRAD_INPUT, "float64")
        assert torch.allclose(strategy.run(spec, grad, weight, 1 << 30), x.grad)
        spec = case.spec("grad_weight", "float64")
        assert torch.allclose(strategy.run(spec, image, grad, 1 << 30), w.grad)


def test_no_result_depends_on_uninitialised_memory(monkeypatch):
    """Every buffer that a strategy takes from torch.empty starts as NaN."""
    original = torch.empty

    def poisoned(*args, **kwargs):
        result = original(*args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    def poisoned_like(self, *args, **kwargs):
        return new_empty(self, *args, **kwargs).fill_(math.nan)

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)
    for case in CASES:
        operands, exact = tensors(case, torch.float32)
        for direction in DIRECTIONS:
            for strategy in STRATEGIES:
                spec = case.spec(direction)
                if strategy.rejects(spec) is None:
                    result = strategy.run(spec, *operands[direction], 1)
                    assert relative_error(result, exact[direction]) <= strategy.rtol["float32"]


def test_output_size_is_pytorchs():
    for case in CASES:
        conv = CONVS[len(case.stride)]
        made = conv(
            torch.zeros(case.image), torch.zeros(case.weight), None,
            case.stride, case.padding, case.dilation, case.groups,
        )  # fmt: skip
        size = output_size(case.image[2:], case.weight[2:], case.stride, case.padding, case.dilation)
        assert tuple(made.shape[2:]) == size

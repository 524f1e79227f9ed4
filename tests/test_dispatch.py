"""The pair with aten's signatures: results, strides and errors as aten's own, and what happens when native fails."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F

import rocm_patch
from rocm_patch.conv.cases import CASES
from rocm_patch.dispatch import Dispatcher
from rocm_patch.errors import UsageError
from rocm_patch.overrides import guarding
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.routes import Routes
from rocm_patch.settings import Settings
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.native_errors import blame

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# (input, weight, bias, keyword arguments)
TRANSPOSED_CASES = [
    ((2, 4, 7), (4, 3, 5), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 4, 6, 5), (4, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 4, 6, 5), (4, 3, 3, 2), {"stride": (3, 2), "dilation": (1, 2), "output_padding": (2, 1)}),
    ((2, 6, 6, 6), (6, 2, 3, 3), {"groups": 3, "padding": 2}),
    ((2, 4, 5, 5), (4, 3, 1, 1), {"stride": 2, "output_padding": 1}),
    ((1, 4, 3, 4, 5), (4, 2, 2, 3, 2), {"stride": (2, 1, 2), "padding": (0, 1, 0)}),
]


@pytest.fixture
def override():
    """The override on the CPU; yields its dispatcher."""
    assert rocm_patch.enable_miopen_bypass(backend="cpu")
    return ACTIVE["CPU"]


def run_both(function, *inputs):
    """(result, *gradients) natively and under the override, from the same inputs."""
    answers = []
    for on in (False, True):
        rocm_patch.disable_all_patches()
        if on:
            rocm_patch.enable_miopen_bypass(backend="cpu")
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        out = function(*leaves)
        generator = torch.Generator().manual_seed(3)
        upstream = torch.randn(out.shape, generator=generator, dtype=out.dtype).contiguous(
            memory_format=torch.preserve_format
        )
        answers.append((out, *torch.autograd.grad(out, leaves, upstream)))
    return answers


def assert_same(native, ours, rtol=1e-5):
    for n, o in zip(native, ours, strict=True):
        assert o.shape == n.shape and o.dtype == n.dtype
        scale = n.double().norm().clamp_min(1e-6)
        assert (o.double() - n.double()).norm() <= rtol * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_plain_convolutions_equal_native(case, bias):
    inputs = [torch.randn(case.image), torch.randn(case.weight)]
    if bias:
        inputs.append(torch.randn(case.weight[0]))

    def call(image, weight, bias=None):
        conv = CONVS[len(case.stride)]
        return conv(image, weight, bias, case.stride, case.padding, case.dilation, case.groups)

    native, ours = run_both(call, *inputs)
    assert_same(native, ours)
    assert ours[0].stride() == native[0].stride()


@pytest.mark.parametrize(("image", "weight", "options"), TRANSPOSED_CASES, ids=str)
def test_transposed_convolutions_equal_native(image, weight, options):
    groups = options.get("groups", 1)
    inputs = [torch.randn(image), torch.randn(weight), torch.randn(weight[1] * groups)]
    native, ours = run_both(lambda x, w, b: TRANSPOSED[len(image) - 2](x, w, b, **options), *inputs)
    assert_same(native, ours)
    assert ours[0].stride() == native[0].stride()


@pytest.mark.parametrize("which", ["image", "weight", "both"])
@pytest.mark.parametrize("case", [c for c in CASES if len(c.image) == 4], ids=lambda case: case.why)
def test_channels_last_results_have_natives_strides(case, which):
    image, weight = torch.randn(case.image), torch.randn(case.weight)
    if which != "weight":
        image = image.contiguous(memory_format=LAST[image.dim()])
    if which != "image":
        weight = weight.contiguous(memory_format=LAST[image.dim()])
    arguments = (None, case.stride, case.padding, case.dilation, case.groups)
    native, ours = run_both(lambda x, w: F.conv2d(x, w, *arguments), image, weight)
    assert_same(native, ours)
    assert ours[0].stride() == native[0].stride()


def test_unbatched_same_and_valid_padding_and_padding_modes():
    for padding in ("same", "valid"):
        native, ours = run_both(
            lambda x, w, p=padding: F.conv2d(x, w, padding=p), *map(torch.randn, [(3, 8, 8), (4, 3, 4, 3)])
        )
        assert_same(native, ours)
    for mode in ("reflect", "replicate", "circular"):
        layer = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
        native, ours = run_both(lambda x, layer=layer: layer(x), torch.randn(2, 3, 8, 8))
        assert_same(native, ours)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 8)])
def test_empty_batches(shape):
    native, ours = run_both(lambda x, w: F.conv2d(x, w, padding=1), torch.randn(shape), torch.randn(4, 3, 3, 3))
    assert_same(native, ours)


@pytest.mark.parametrize("mask", [m for m in itertools.product([True, False], repeat=3) if any(m)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_output_mask(override, mask, transposed):
    x, w = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    arguments = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    out = torch.ops.aten.convolution(x, w, None, *arguments)
    grad = torch.randn_like(out)
    ours = torch.ops.aten.convolution_backward(grad, x, w, [4], *arguments, list(mask))
    rocm_patch.disable_all_patches()
    native = torch.ops.aten.convolution_backward(grad, x, w, [4], *arguments, list(mask))
    for mine, theirs, wanted in zip(ours, native, mask, strict=True):
        if wanted:
            assert torch.allclose(mine, theirs)
        else:
            assert mine is None or mine.numel() == 0


BAD_CALLS = {
    "channels do not fit": lambda: F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 2, 3, 3)),
    "kernel larger than the image": lambda: F.conv2d(torch.randn(1, 3, 2, 2), torch.randn(4, 3, 5, 5)),
    "types differ": lambda: F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3).double()),
    "groups do not divide": lambda: F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 1, 3, 3), groups=3),
    "negative padding": lambda: F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), padding=-1),
    "zero stride": lambda: F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), stride=0),
    "bias of the wrong size": lambda: F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(5)),
    "too many dimensions": lambda: F.conv2d(torch.randn(1, 1, 3, 8, 8), torch.randn(4, 3, 3, 3)),
    "integers": lambda: F.conv2d(torch.ones(1, 3, 8, 8, dtype=torch.int8), torch.randn(4, 3, 3, 3)),
    "output_padding too large": lambda: F.conv_transpose2d(
        torch.randn(1, 3, 8, 8), torch.randn(3, 4, 3, 3), stride=2, output_padding=2
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_errors_are_pytorchs_own(call):
    raised = []
    for on in (False, True):
        if on:
            rocm_patch.enable_miopen_bypass(backend="cpu")
        with pytest.raises(Exception) as info:
            call()
        raised.append((info.type, str(info.value)))
    assert raised[0] == raised[1]


def test_a_backward_under_autocast_stays_in_float32(override):
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, requires_grad=True)
    exact_x, exact_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    out = F.conv2d(x, w)
    grad = torch.randn_like(out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward(grad)
    rocm_patch.disable_all_patches()
    F.conv2d(exact_x, exact_w).backward(grad.double())
    for mine, exact in ((x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()


def test_autocast_casts_as_without_us(override):
    x, w = torch.randn(2, 8, 8, 8), torch.randn(8, 8, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.conv2d(x, w).dtype == torch.bfloat16


def test_the_workspace_is_what_was_asked_for(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_WORKSPACE", "10K")
    native, ours = run_both(
        lambda x, w, b: F.conv2d(x, w, b, padding=1), *map(torch.randn, [(4, 8, 16, 16), (8, 8, 3, 3), (8,)])
    )
    assert_same(native, ours)
    assert {route.budget for route in ACTIVE["CPU"].routes.taken()} == {10 << 10}
    assert rocm_patch.enable_miopen_bypass(backend="cpu", workspace="0.5M")
    F.conv2d(torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3))
    assert {route.budget for route in ACTIVE["CPU"].routes.taken()} == {512 << 10}
    for bad in ("much", "-3", "0"):
        with pytest.raises(UsageError, match=r"(?s)(not a size|is none).*hint: give bytes"):
            rocm_patch.enable_miopen_bypass(backend="cpu", workspace=bad)


def test_exact_leaves_winograd_out():
    x, w = torch.randn(8, 64, 40, 40), torch.randn(64, 64, 3, 3)
    for exact, served in ((None, "winograd_f43"), (True, "im2col")):
        assert rocm_patch.enable_miopen_bypass(backend="cpu", exact=exact)
        F.conv2d(x, w, padding=1)
        assert [route.strategy.name for route in ACTIVE["CPU"].routes.taken()] == [served]


def test_the_route_table_is_bounded(monkeypatch):
    monkeypatch.setattr("rocm_patch.routes.MOST_ENTRIES", 8)
    chooser = Chooser()
    dispatcher = Dispatcher(Routes(chooser, guarding.guard_for(chooser, Settings())))
    w = torch.randn(1, 1, 1, 1)
    for size in range(1, 40):
        out = dispatcher.convolution(torch.ones(1, 1, size, 1), w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        assert torch.allclose(out, w.expand(1, 1, size, 1))
    assert len(dispatcher._forward) <= 8 and len(dispatcher.routes._routes) <= 8


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_a_library_error_falls_through_with_one_warning(direction, monkeypatch, caplog):
    native = F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3))
    monkeypatch.setenv("ROCM_PATCH_FAULT", f"error:{direction}")
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    with caplog.at_level(logging.WARNING, "rocm_patch"):
        for _ in range(3):
            x = torch.ones(1, 2, 5, 5, requires_grad=True)
            w = torch.ones(3, 2, 3, 3, requires_grad=True)
            out = F.conv2d(x, w)
            out.sum().backward()
            assert torch.allclose(out, native)
            assert x.grad[0, 0, 2, 2] == 27 and w.grad[0, 0, 0, 0] == 9
    warned = [record for record in caplog.records if direction in record.getMessage()]
    assert len(warned) == 1
    assert "miopenStatusUnknownError" in warned[0].getMessage() and "hint:" in warned[0].getMessage()
    served = {route.spec.direction: route.strategy.name for route in ACTIVE["CPU"].routes.taken()}
    assert served[direction] == "im2col"
    assert served["forward"] == ("im2col" if direction == "forward" else "native")


def test_a_fault_can_wait(monkeypatch, caplog):
    monkeypatch.setenv("ROCM_PATCH_FAULT", "error:forward:after=2")
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    for _ in range(2):
        F.conv2d(x, w)
    assert not caplog.records
    F.conv2d(x, w)
    assert "miopenStatusUnknownError" in caplog.text


def test_a_device_error_is_raised_with_the_spec_and_a_hint(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_FAULT", "device:forward")
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    with pytest.raises(RuntimeError, match="HIP error") as info:
        F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3))
    assert "1x2x5x5 by 3x2x3x3" in str(info.value) and "hint:" in str(info.value)


def test_policy_native_raises_what_native_raises(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_FAULT", "error:forward")
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="native")
    with pytest.raises(RuntimeError, match="^miopenStatusUnknownError$"):
        F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3))


def test_an_unknown_fault_is_refused(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_FAULT", "explode:forward")
    with pytest.raises(rocm_patch.errors.UsageError, match="hint: ROCM_PATCH_FAULT=kind"):
        rocm_patch.enable_miopen_bypass(backend="cpu")
    assert not rocm_patch.patch_status()["miopen_bypass"]


@pytest.mark.parametrize(
    ("message", "culprit"),
    [
        ("miopenStatusUnknownError", "library"),
        ("MIOpen Error: /root/driver/MLOpen/src/ocl/convolutionocl.cpp:1044: No suitable algorithm", "library"),
        ("HIP error: the operation cannot be performed in the present state", "device"),
        ("HIP error: invalid device function\nmiopenStatusUnknownError", "device"),
        ("CUDA error: an illegal memory access was encountered", "device"),
        ("HIP out of memory. Tried to allocate 2.00 GiB", "memory"),
        ("Given groups=1, weight of size [4, 3, 3, 3], expected input[1, 2, 8, 8] to have 3 channels", "caller"),
    ],
)
def test_whose_fault_a_native_error_is(message, culprit):
    assert blame(RuntimeError(message)) == culprit


def test_selective_trusts_native_up_to_a_size():
    rocm_patch.enable_miopen_bypass("selective", backend="cpu", size_threshold=8)
    w = torch.randn(3, 2, 3, 3)
    F.conv2d(torch.randn(1, 2, 8, 8), w)
    F.conv2d(torch.randn(1, 2, 9, 8), w)
    assert [route.strategy.name for route in ACTIVE["CPU"].routes.taken()] == ["native", "im2col"]

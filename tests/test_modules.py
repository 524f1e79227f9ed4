"""SafeConv2d and patch_model: the same layers, another way to compute them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rocm_patch
from rocm_patch import Conv2dBypassConfig, FallbackStrategy, SafeConv2d, patch_model, unpatch_model
from rocm_patch.errors import NotAModuleError, UsageError

OPTIONS = [
    {},
    {"padding": 1, "bias": False},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"padding": "same"},
    {"padding": "valid", "groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular"},
]


def same_layers(options, dtype=torch.float64):
    plain = nn.Conv2d(4, 6, (3, 2), **options).to(dtype)
    safe = SafeConv2d(4, 6, (3, 2), **options).to(dtype)
    safe.load_state_dict(plain.state_dict())
    return plain, safe


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 9, 8), (4, 9, 8)])
def test_safe_conv_equals_conv_forward_and_backward(options, shape):
    if len(shape) == 3 and options.get("padding_mode") == "circular":
        shape = (1, *shape)  # torch 1.13 itself cannot pad an unbatched image so
    plain, safe = same_layers(options)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for layer in (plain, safe):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.pow(2).sum().backward()
        results.append((out, leaf.grad, *(p.grad for p in layer.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b) and a.stride() == b.stride()


def test_safe_conv_can_be_differentiated_any_number_of_times():
    layer = SafeConv2d(2, 3, 3, padding=1).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = layer.weight, layer.bias

    def call(x, weight, bias):
        return layer._conv_forward(x, weight, bias)

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))
    out = call(x, weight, bias)
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    reference = nn.Conv2d(2, 3, 3, padding=1).double()
    reference.load_state_dict(layer.state_dict())
    y = x.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(reference(y).pow(3).sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(second.sum(), y)
    assert torch.allclose(third, expected)


def test_safe_conv_in_forward_mode():
    import torch.autograd.forward_ad as forward_ad

    plain, safe = same_layers({})
    x, tangent = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    derivatives = []
    for layer in (plain, safe):
        with forward_ad.dual_level():
            derivatives.append(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent)
    assert torch.allclose(*derivatives)


def test_safe_conv_under_autocast_gives_autocasts_type():
    plain, safe = same_layers({}, torch.float32)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = safe(x), plain(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected.float(), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert safe.weight.grad.dtype == torch.float32


def test_safe_conv_raises_what_conv_raises():
    plain, safe = same_layers({})
    for bad in (torch.randn(2, 3, 9, 9).double(), torch.randn(2, 4, 1, 1).double(), torch.randn(2, 4, 9, 9)):
        messages = []
        for layer in (plain, safe):
            with pytest.raises(RuntimeError) as info:
                layer(bad)
            messages.append(str(info.value))
        assert messages[0] == messages[1]


def test_empty_batch():
    plain, safe = same_layers({})
    assert safe(torch.randn(0, 4, 9, 9).double()).shape == plain(torch.randn(0, 4, 9, 9).double()).shape


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Plain(nn.Conv2d):
    pass


def make_model():
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), shared, nn.Sequential(shared), nn.Conv2d(4, 2, 1))


def test_patch_model_keeps_everything_but_the_class():
    model = make_model().double().eval()
    heard = []
    model[0].register_forward_hook(lambda *_: heard.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: id(p) for name, p in model.named_parameters()}
    keys, layers = list(model.state_dict()), list(model.modules())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)

    assert patch_model(model) is model
    assert [type(m) for m in model if isinstance(m, nn.Conv2d)] == [SafeConv2d] * 3
    assert list(model.state_dict()) == keys and list(model.modules()) == layers
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not model[0].training and len(heard) == 1
    assert torch.allclose(model(x), expected) and len(heard) == 2

    model(x).sum().backward()
    weight = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, weight)

    assert unpatch_model(model) is model
    assert type(model[0]) is nn.Conv2d and "_was_conv2d" not in vars(model[0])
    assert unpatch_model(model) is model


def test_model_report_names_what_was_left_and_why():
    scripted = torch.jit.script(nn.Conv2d(1, 1, 1))
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1), OwnForward(1, 1, 1), Plain(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Linear(1, 1), scripted
    )
    assert rocm_patch.model_report(model).left == {
        **dict.fromkeys("0123", "not patched"),
        "5": "compiled by TorchScript",
    }
    patch_model(model)
    report = rocm_patch.model_report(model)
    assert report.replaced == ("0", "1", "2", "3") and report.left == {"5": "compiled by TorchScript"}
    assert "4 layers are Safe ones, 1 convolution layers were left" in str(report)


def test_made_layers_are_not_unpatched():
    model = nn.Sequential(SafeConv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    unpatch_model(patch_model(model, Conv2dBypassConfig(strategy="im2col")))
    assert type(model[0]) is SafeConv2d and type(model[1]) is nn.Conv2d


def test_patched_models_can_be_copied_and_saved():
    model = patch_model(make_model())
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    clone.load_state_dict(torch.load(buffer))
    assert type(unpatch_model(clone)[0]) is nn.Conv2d and type(model[0]) is SafeConv2d


@pytest.mark.parametrize("not_a_model", [None, 3, nn.Conv2d, "model", {}])
def test_not_a_module(not_a_model):
    for function in (patch_model, unpatch_model, rocm_patch.model_report):
        with pytest.raises(NotAModuleError, match=r"expected a torch.nn.Module, got .*\nhint:"):
            function(not_a_model)


def test_patch_torch_nn_serves_existing_layers_and_restores_the_object():
    original = nn.Conv2d._conv_forward
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(1, 2, 6, 6)
    expected = layer(x)
    config = Conv2dBypassConfig(strategy=FallbackStrategy.GPU_UNFOLD)
    assert rocm_patch.patch_torch_nn(config)
    assert type(layer) is nn.Conv2d and isinstance(layer, SafeConv2d)
    assert isinstance(nn.Conv2d(1, 1, 1), SafeConv2d) and not isinstance(nn.Linear(1, 1), SafeConv2d)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert "1x2x6x6 by 3x2x3x3" in rocm_patch.bypass_report()
    assert rocm_patch.patch_torch_nn(config)
    assert rocm_patch.restore_torch_nn()
    assert nn.Conv2d._conv_forward is original and not isinstance(layer, SafeConv2d)
    assert not rocm_patch.restore_torch_nn()


def test_patch_torch_nn_twice_with_another_config_warns_and_reverts_to_the_first(caplog):
    original = nn.Conv2d._conv_forward
    rocm_patch.patch_torch_nn()
    rocm_patch.patch_torch_nn(Conv2dBypassConfig(strategy="im2col"))
    assert "replace the old ones" in caplog.text
    rocm_patch.disable_all_patches()
    assert nn.Conv2d._conv_forward is original


MEANT = [
    ("auto", "pointwise"), ("gpu_unfold", "im2col"), ("pure_pytorch", "im2col"), ("implicit_gemm", "native"),
    ("im2col", "im2col"), ("native", "native"), (FallbackStrategy.CPU_FALLBACK, "im2col"), ("selective", "native"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "served"), MEANT)
def test_what_each_strategy_means(strategy, served, capsys):
    layer = SafeConv2d(2, 3, 1, config=Conv2dBypassConfig(strategy=strategy))
    side = 11 + MEANT.index((strategy, served))  # an image of its own per case, so that its line is found
    x = torch.randn(1, 2, side, 7)
    assert torch.allclose(layer(x), F.conv2d(x, layer.weight, layer.bias), atol=1e-6)
    rocm_patch.print_bypass_report()
    line = next(row for row in capsys.readouterr().out.splitlines() if f"1x2x{side}x7 " in row)
    assert f" {served} " in line


def test_selective_bypasses_above_the_threshold():
    config = Conv2dBypassConfig(strategy="selective", size_threshold=10)
    layer = SafeConv2d(1, 1, 3, config=config)
    layer(torch.randn(1, 1, 10, 10))
    layer(torch.randn(1, 1, 10, 11))
    report = rocm_patch.bypass_report()
    assert "native     forward 1x1x10x10" in report and "im2col     forward 1x1x10x11" in report


def test_unknown_strategy():
    for bad in ("quick", 3):
        with pytest.raises(UsageError, match=r"unknown strategy .*\nhint: give"):
            Conv2dBypassConfig(strategy=bad)


def test_the_configuration_of_layers_without_one():
    before = rocm_patch.get_config()
    try:
        rocm_patch.set_config(Conv2dBypassConfig(strategy="im2col"))
        SafeConv2d(1, 1, 1)(torch.randn(1, 1, 37, 41))
        assert "im2col     forward 1x1x37x41" in rocm_patch.bypass_report()
    finally:
        rocm_patch.set_config(before)


def test_verbose_says_once_per_convolution(capfd):
    from rocm_patch.settings import LOGGER

    handlers, level, propagate = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    try:
        layer = SafeConv2d(1, 1, 3, config=Conv2dBypassConfig(verbose=True))
        for _ in range(3):
            layer(torch.randn(1, 1, 33, 35))
        said = [line for line in capfd.readouterr().err.splitlines() if "1x1x33x35" in line]
        assert said == ["rocm-patch: forward 1x1x33x35 by 1x1x3x3 float32 cpu -> im2col (policy bypass)"]
    finally:
        LOGGER.handlers, LOGGER.propagate = handlers, propagate
        LOGGER.setLevel(level)


def test_a_traced_safe_conv_records_atens_operator():
    plain, safe = same_layers({"padding": 1})
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    traced = torch.jit.trace(safe, x)
    assert "aten::_convolution" in str(traced.inlined_graph)
    rocm_patch.enable_miopen_bypass("im2col", backend="cpu")
    assert torch.allclose(traced(x), plain(x))


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="needs torch.func, torch 2.x")
def test_torch_func_transforms_a_safe_conv():
    from torch.func import functional_call, grad, vmap

    plain, safe = same_layers({"padding": 1})
    x = torch.randn(3, 2, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(vmap(safe)(x), vmap(plain)(x))

    def loss(parameters, layer):
        return functional_call(layer, parameters, (x[0],)).pow(2).sum()

    ours, native = (grad(loss)(dict(layer.named_parameters()), layer) for layer in (safe, plain))
    assert all(torch.allclose(ours[name], native[name]) for name in native)

"""Safe layers in TorchScript, torch.func, batched gradients, export, fx, torch.compile; on meta tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rocm_patch
from rocm_patch import Conv2dBypassConfig, patch_model
from rocm_patch.overrides import bypassed

needs_torch_2 = pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.13 has no torch.func")
KINDS = {
    "conv1d": (nn.Conv1d, rocm_patch.SafeConv1d, (3, 4, 9)),
    "conv2d": (nn.Conv2d, rocm_patch.SafeConv2d, (3, 4, 6, 5)),
    "conv3d": (nn.Conv3d, rocm_patch.SafeConv3d, (3, 4, 4, 5, 4)),
    "transposed1d": (nn.ConvTranspose1d, rocm_patch.SafeConvTranspose1d, (3, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d, rocm_patch.SafeConvTranspose2d, (3, 4, 4, 5)),
    "transposed3d": (nn.ConvTranspose3d, rocm_patch.SafeConvTranspose3d, (3, 4, 3, 2, 3)),
}


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Plain(nn.Conv2d):
    pass


class Doubled(nn.ConvTranspose2d):
    pass


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 3, 3), Standardised(3, 3, 1), Plain(3, 3, 1), Doubled(3, 2, 2, stride=2))


def pair(kind, *arguments, **options):
    plain, safe = (made(*arguments, **options).double() for made in KINDS[kind][:2])
    safe.load_state_dict(plain.state_dict())
    return plain, safe


def served():
    """Calls of single layers' own dispatchers so far."""
    return sum(route.calls for part in bypassed.dispatchers() for route in part.routes.taken())


# TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, Conv2dBypassConfig(strategy="im2col")], ids=["no config", "im2col"])
def test_patched_models_are_scripted_and_traced_subclasses_too(config):
    model, x = make_model(), torch.randn(2, 4, 7, 7)
    expected = model(x)
    patch_model(model, config)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
        before = served()
        assert torch.allclose(compiled(x), expected, atol=1e-5) and served() == before
        rocm_patch.enable_miopen_bypass("im2col", backend="cpu")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        assert "im2col     forward 2x4x7x7" in rocm_patch.bypass_report()
        rocm_patch.disable_all_patches()


# torch.func and batched gradients ---------------------------------------------------------------------------------


def transformations(layer, w, x):
    from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

    def call(w, x):
        return functional_call(layer, {"weight": w}, (x,))

    def loss(w, x):
        return call(w, x).pow(2).sum()

    return {
        "images": lambda: vmap(layer)(x),
        "another dimension": lambda: vmap(layer, in_dims=1, out_dims=1)(x),
        "unbatched images": lambda: vmap(layer)(x[0]),
        "weights": lambda: vmap(call, in_dims=(0, None))(w, x[0]),
        "images and weights": lambda: vmap(call)(w, x),
        "gradient": lambda: grad(loss)(w[0], x[0]),
        "gradient per sample": lambda: vmap(grad(loss), in_dims=(None, 0))(w[0], x[0]),
        "gradient of an ensemble": lambda: vmap(grad(loss, argnums=1))(w, x),
        "tangent": lambda: jvp(call, (w[0], x[0]), (w[1], x[1]))[1],
        "jacobian, reverse": lambda: jacrev(call, argnums=1)(w[0], x[0][:1]),
        "jacobian, forward": lambda: jacfwd(call)(w[0], x[0][:1]),
        "hessian": lambda: hessian(loss, argnums=(0, 1))(w[0], x[0][:1, ..., :3])[0][1],
    }


@needs_torch_2
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "groups": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_is_served(kind, options):
    plain, safe = pair(kind, 4, 2, 3, **options)
    x = torch.randn(4, *KINDS[kind][2], dtype=torch.float64)
    w = torch.randn(4, *plain.weight.shape, dtype=torch.float64)
    ours = transformations(safe, w, x)
    for name, native in transformations(plain, w, x).items():
        if name == "hessian" and (options or kind not in ("conv1d", "transposed1d")):
            continue  # large
        before = served()
        assert torch.allclose(ours[name](), native()), name
        assert served() > before, name
        if name == "images":
            assert served() == before + 1, "one call for all where the weight is shared"


@needs_torch_2
def test_a_gradient_of_what_was_computed_outside_is_mapped():
    plain, safe = pair("conv2d", 4, 2, 3)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64)

    def mapped(layer):
        y = layer(x)
        return torch.func.vmap(lambda each: torch.autograd.grad(y, [x, layer.weight], each))(v)

    assert all(torch.allclose(a, b) for a, b in zip(mapped(plain), mapped(safe), strict=True))


@pytest.mark.skipif(not torch.__version__.startswith("1."), reason="functorch is torch.func in torch 2")
def test_functorch_of_torch_1_goes_through_aten():
    from functorch import grad, vmap

    plain, safe = pair("conv2d", 4, 2, 3)
    x = torch.randn(3, 2, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(vmap(safe)(x), vmap(plain)(x))
    ours, native = (grad(lambda x, layer=layer: layer(x).pow(2).sum())(x[0]) for layer in (safe, plain))
    assert torch.allclose(ours, native)


@pytest.mark.parametrize("strategy", ["auto", "im2col", "taps", "winograd_f23"])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients(kind, strategy):
    plain, safe = pair(kind, 4, 2, 3, padding=1)
    safe.config = Conv2dBypassConfig(strategy=strategy)
    x = torch.randn(KINDS[kind][2], dtype=torch.float64, requires_grad=True)
    y = safe(x)
    v = torch.randn(3, *y.shape, dtype=torch.float64)
    before = served()
    batched = torch.autograd.grad(y, [x, safe.weight], v, is_grads_batched=True)
    assert served() == before + 2 * len(v)
    for number, each in enumerate(v):
        for ours, native in zip(batched, torch.autograd.grad(plain(x), [x, plain.weight], each), strict=True):
            assert torch.allclose(ours[number], native)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians(strategy):
    plain, safe = pair("conv2d", 4, 2, 2)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    ours = torch.autograd.functional.jacobian(safe, x, vectorize=True, strategy=strategy)
    assert torch.allclose(ours, torch.autograd.functional.jacobian(plain, x))


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "transposed1d"])
def test_derivatives_of_complex_layers(kind):
    _, safe_class, shape = KINDS[kind]
    layer = safe_class(2, 2, 2, dtype=torch.complex128)
    x = torch.randn(1, 2, *[3] * (len(shape) - 2), dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


# Tensors that are not memory --------------------------------------------------------------------------------------


def test_meta_tensors_have_the_shape_and_strides_of_the_result():
    for kind, (plain_class, safe_class, shape) in KINDS.items():
        x = torch.randn(shape, device="meta")
        ours, native = (made(4, 2, 3, device="meta")(x) for made in (safe_class, plain_class))
        assert (ours.shape, ours.stride(), ours.device) == (native.shape, native.stride(), native.device), kind


def test_fx_traces_a_patched_model():
    import torch.fx

    model, x = make_model(), torch.randn(2, 4, 7, 7)
    expected = model(x)
    assert torch.allclose(torch.fx.symbolic_trace(patch_model(model[:3]))(x), model[:3](x), atol=1e-5)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_autocast_leaves_float64_operands_alone():
    said = []
    for layer in pair("conv2d", 4, 2, 3):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError) as caught:
            layer(torch.randn(2, 4, 6, 6))
        said.append(str(caught.value))
    assert said[0] == said[1]


@needs_torch_2
@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_atens_operators_only(strict):
    model, x = make_model().eval(), torch.randn(2, 4, 7, 7)
    expected = model(x)
    patch_model(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes if "conv" in str(node.target)]
    assert len(targets) == 4 and all(target.startswith("aten.conv") for target in targets)
    assert torch.allclose(exported.module()(x), expected, atol=1e-5)
    assert exported.module()(torch.randn(5, 4, 7, 7)).shape[0] == 5


@needs_torch_2
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    _, safe = pair("conv2d", 4, 2, 3)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    graph = make_fx(safe, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    assert torch.allclose(graph(x), safe(x))


# torch.compile ----------------------------------------------------------------------------------------------------


@needs_torch_2
@pytest.mark.parametrize("override", [False, True])
def test_compiled_subclasses(override):
    model, x = make_model(), torch.randn(2, 4, 7, 7)
    expected = model(x)
    patch_model(model)
    if override:
        rocm_patch.enable_miopen_bypass(backend="cpu")
    torch._dynamo.reset()
    before = served()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=override)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    assert served() - before == (0 if override else 4)
    rocm_patch.disable_all_patches()
    before = served()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5) and served() - before == 4, "the override is off now"


@needs_torch_2
@pytest.mark.parametrize("way", ["patch_model", "patch_torch_nn"])
def test_what_was_compiled_before_is_served_from_then_on(way):
    model, x = nn.Sequential(nn.Conv2d(4, 3, 3)), torch.randn(2, 4, 7, 7)
    torch._dynamo.reset()  # at its limit of compilations it runs all uncompiled
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(x)
    for is_on in (True, False):
        if way == "patch_model":
            (patch_model if is_on else rocm_patch.unpatch_model)(compiled)
        else:
            (rocm_patch.patch_torch_nn if is_on else rocm_patch.restore_torch_nn)()
        before = served()
        assert torch.allclose(compiled(x), expected, atol=1e-5) and served() - before == is_on


@needs_torch_2
def test_training_a_compiled_patched_model():
    plain = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), Standardised(3, 2, 1)).double()
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    parameters = []
    for model in (plain, patch_model(copy.deepcopy(plain))):
        torch._dynamo.reset()
        run = model if model is plain else torch.compile(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).pow(2).mean().backward()
            optimizer.step()
        parameters.append(list(model.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(*parameters, strict=True))

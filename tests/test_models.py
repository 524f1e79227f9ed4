"""patch_model on every kind of layer: served, the same results, and plain again where rocm-patch is not."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import rocm_patch
from conftest import clean_environ
from rocm_patch import Conv2dBypassConfig, SafeConv2d, patch_model, unpatch_model
from rocm_patch.overrides import bypassed

IS_TORCH_1 = torch.__version__.startswith("1.")
KINDS = {
    "conv1d": (nn.Conv1d, rocm_patch.SafeConv1d, (2, 4, 9)),
    "conv2d": (nn.Conv2d, rocm_patch.SafeConv2d, (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d, rocm_patch.SafeConv3d, (2, 4, 5, 6, 7)),
    "transposed1d": (nn.ConvTranspose1d, rocm_patch.SafeConvTranspose1d, (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d, rocm_patch.SafeConvTranspose2d, (2, 4, 6, 5)),
    "transposed3d": (nn.ConvTranspose3d, rocm_patch.SafeConvTranspose3d, (2, 4, 3, 4, 3)),
}
OPTIONS = [
    {}, {"stride": 2, "padding": 1, "groups": 2}, {"dilation": 2, "bias": False},
    {"padding": "same", "dilation": 3}, {"padding": 1, "padding_mode": "circular"},
    {"stride": 2, "output_padding": 1},
]  # fmt: skip


def served():
    """Calls of single layers' own dispatchers so far."""
    return sum(route.calls for part in bypassed.dispatchers() for route in part.routes.taken())


def results(layer, x):
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(leaf)
    (out * out.conj()).real.sum().backward()
    return (out, leaf.grad, *(p.grad for p in layer.parameters()))


def assert_same_and_served(plain, safe, x):
    expected = results(plain, x)
    before = served()
    ours = results(safe, x)
    assert served() >= before + 3, "forward and both gradients"
    for a, b in zip(expected, ours, strict=True):
        assert torch.allclose(a, b) and a.stride() == b.stride()


def applicable(kind, options):
    if "transposed" in kind:
        return "padding_mode" not in options and options.get("padding") != "same"
    return "output_padding" not in options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_safe_layers_equal_torchs(kind, options):
    if not applicable(kind, options):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            KINDS[kind][0](4, 6, 3, **options)(torch.randn(KINDS[kind][2]))
        return
    plain_class, safe_class, shape = KINDS[kind]
    plain, safe = plain_class(4, 6, 3, **options).double(), safe_class(4, 6, 3, **options).double()
    safe.load_state_dict(plain.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_and_served(plain, safe, x)
    if not (IS_TORCH_1 and "padding_mode" in options):  # which cannot pad an unbatched image
        assert torch.allclose(plain(x[0]), safe(x[0]))
    assert plain(x[:0]).shape == safe(x[:0]).shape
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last:
        assert_same_and_served(plain, safe, x.contiguous(memory_format=last))


@pytest.mark.parametrize("kind", KINDS)
def test_complex_safe_layers(kind):
    plain_class, safe_class, shape = KINDS[kind]
    plain, safe = (c(4, 2, 3, dtype=torch.complex128) for c in (plain_class, safe_class))
    safe.load_state_dict(plain.state_dict())
    x = torch.randn(shape, dtype=torch.complex128)
    if IS_TORCH_1 and kind in ("transposed2d", "transposed3d"):  # which torch 1.13 lacks: by its parts
        real = copy.deepcopy(plain).double()
        real.weight.data, real.bias.data = plain.weight.real.detach(), plain.bias.real.detach()
        assert torch.allclose(safe(x.real.to(x.dtype)).real, real(x.real))
    else:
        assert_same_and_served(plain, safe, x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "transposed" in kind])
def test_output_size_of_transposed_layers(kind):
    plain_class, safe_class, shape = KINDS[kind]
    plain, safe = plain_class(4, 2, 3, stride=2).double(), safe_class(4, 2, 3, stride=2).double()
    safe.load_state_dict(plain.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    size = [2 * length + 2 for length in shape[2:]]
    assert torch.allclose(safe(x, output_size=size), plain(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        safe(x, output_size=[100] * len(size))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_safe_layers(kind):
    _, safe_class, shape = KINDS[kind]
    layer = safe_class(2, 2, 2, stride=2, padding=1, groups=2).double()
    x = torch.randn(1, 2, *([3] * (len(shape) - 2)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_torchs(kind):
    plain_class, safe_class, shape = KINDS[kind]
    for wrong in (torch.randn(2, 3, *shape[2:]), torch.randn(3), torch.ones(shape, dtype=torch.int64)):
        said = []
        for layer in (plain_class(4, 2, 3), safe_class(4, 2, 3)):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                layer(wrong)
            said.append((caught.type, str(caught.value)))
        assert said[0] == said[1]


@pytest.mark.parametrize("kind", KINDS)
def test_scripted_and_traced_safe_layers(kind):
    """In TorchScript the layer calls aten's convolution, which the override serves."""
    plain_class, safe_class, shape = KINDS[kind]
    plain, safe = plain_class(4, 2, 3, padding=1).double(), safe_class(4, 2, 3, padding=1).double()
    safe.load_state_dict(plain.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    for compiled in (torch.jit.script(safe), torch.jit.script(nn.Sequential(safe)), torch.jit.trace(safe, x)):
        buffer = io.BytesIO()
        torch.jit.save(compiled, buffer)
        buffer.seek(0)
        assert torch.allclose(torch.jit.load(buffer)(x), plain(x))


@pytest.mark.skipif(IS_TORCH_1, reason="needs torch.compile")
@pytest.mark.parametrize("override", [False, True])
def test_compiled_safe_layers(override):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3)).double()
    model = patch_model(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = results(plain, x)
    if override:
        rocm_patch.enable_miopen_bypass(backend="cpu")
    torch._dynamo.reset()
    before = served()
    ours = results(torch.compile(model, backend="aot_eager", fullgraph=override), x)
    assert override or served() >= before + 6
    assert all(torch.allclose(a, b) for a, b in zip(expected, ours, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_reaches_safe_layers(dtype):
    for kind in ("conv2d", "transposed2d"):
        plain_class, safe_class, shape = KINDS[kind]
        plain, safe = plain_class(4, 2, 3), safe_class(4, 2, 3)
        safe.load_state_dict(plain.state_dict())
        x = torch.randn(shape)
        with torch.autocast("cpu", dtype=dtype):
            ours = safe(x)
        # torch 1.13 leaves transposed convolutions on the CPU alone, or computes them wrongly.
        if kind == "conv2d" or not IS_TORCH_1:
            assert ours.dtype == dtype
        assert torch.allclose(ours.float(), plain(x), atol=0.1)


# patch_model ------------------------------------------------------------------------------------------------------


class Plain(nn.Conv2d):
    """A subclass with nothing of its own."""


class Standardised(nn.Conv2d):
    """Weight standardisation, as in networks with group norm."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Doubled(nn.ConvTranspose2d):
    """A forward that calls the parent's."""

    def forward(self, x, output_size=None):
        return 2 * super().forward(x, output_size)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def weight_norm(layer):
    return nn.utils.weight_norm(layer)


def spectral_norm(layer):
    return nn.utils.spectral_norm(layer)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def parametrized_spectral_norm(layer):
    return nn.utils.parametrizations.spectral_norm(layer)


LAYERS = {
    "plain subclass": lambda: Plain(4, 3, 3, padding=1),
    "own forward": lambda: Standardised(4, 3, 3),
    "own forward that calls the parent's": lambda: Doubled(4, 3, 3, stride=2),
    "weight norm": lambda: weight_norm(nn.Conv2d(4, 3, 3)),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(4, 3, 3)),
    "parametrized": lambda: parametrized(nn.Conv2d(4, 3, 3)),
    "parametrized spectral norm": lambda: parametrized_spectral_norm(nn.Conv2d(4, 3, 3)),
    "parametrized subclass": lambda: parametrized(Standardised(4, 3, 3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2),
    "3-d": lambda: nn.Conv3d(4, 3, 2),
}


def input_of(layer):
    return torch.randn(2, 4, 5, 6, 4, dtype=torch.float64)[..., : 4 if isinstance(layer, nn.Conv3d) else 1].squeeze(
        0 if isinstance(layer, nn.Conv3d) else -1
    )


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_served_and_comes_back(name):
    plain, model = nn.Sequential(LAYERS[name]()).double().eval(), nn.Sequential(LAYERS[name]()).double().eval()
    kind, state = type(plain[0]), list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    x = input_of(plain[0])
    patch_model(model)
    assert rocm_patch.model_report(model).replaced == ("0",) and list(model.state_dict()) == state
    assert parametrize.is_parametrized(plain[0]) == parametrize.is_parametrized(model[0])
    assert_same_and_served(plain, model, x)
    if name not in ("weight norm", "spectral norm"):  # which cannot be copied, says torch
        clone = copy.deepcopy(model)
        assert rocm_patch.model_report(clone).replaced == ("0",)
        assert_same_and_served(plain, clone, x)
    patch_model(model)  # twice is once
    unpatch_model(model)
    assert rocm_patch.model_report(model).replaced == ()
    assert type(model[0]).__mro__[-4:] == kind.__mro__[-4:] and type(model[0]).__name__ == kind.__name__
    if not parametrize.is_parametrized(plain[0]):
        assert type(model[0]) is kind
    before = served()
    assert torch.allclose(model(x), plain(x)) and served() == before


def test_parametrizations_come_and_go_in_any_order():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer = nn.Conv2d(4, 3, 3).double()
    weight = layer.weight.detach().clone()
    patch_model(layer)
    parametrized(layer)
    assert rocm_patch.model_report(layer).replaced == ("",)
    before = served()
    assert torch.allclose(layer(x), F.conv2d(x, weight / 2, layer.bias)) and served() > before
    unpatch_model(layer)
    before = served()
    assert torch.allclose(layer(x), F.conv2d(x, weight / 2, layer.bias)) and served() == before
    patch_model(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is SafeConv2d and torch.allclose(layer.weight, weight / 2)
    unpatch_model(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("kind", KINDS)
def test_lazy_layers_become_safe_ones(kind):
    plain_class, safe_class, shape = KINDS[kind]
    lazy_class = getattr(nn, "Lazy" + plain_class.__name__)
    model = nn.Sequential(lazy_class(3, 2))
    patch_model(model)
    assert rocm_patch.model_report(model).replaced == ("0",)
    before = served()
    out = model(torch.randn(shape))
    assert type(model[0]) is safe_class and out.shape[1] == 3 and served() > before
    assert "cls_to_become" not in vars(model[0])
    unpatch_model(model)
    assert type(model[0]) is plain_class
    untouched = nn.Sequential(lazy_class(3, 2))
    unpatch_model(patch_model(untouched))
    assert type(untouched[0]) is lazy_class
    patch_model(untouched).load_state_dict(model.state_dict())
    assert untouched[0].weight.shape == model[0].weight.shape


def test_shared_layers_and_made_ones():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.ModuleList([shared]), "c": SafeConv2d(4, 4, 1)})
    patch_model(model, Conv2dBypassConfig(strategy="im2col"))
    assert model["a"][0] is model["b"][0] is shared and type(shared) is SafeConv2d
    unpatch_model(model)
    assert type(shared) is nn.Conv2d and type(model["c"]) is SafeConv2d


WITHOUT_US = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rocm_patch", "patches"):
            raise ImportError("not installed here")
sys.meta_path.insert(0, Blocker())
import torch
sys.modules["layers"] = layers = type(sys)("layers")
exec(open(sys.argv[2]).read(), layers.__dict__)
options = {} if torch.__version__.startswith("1.") else {"weights_only": False}
model, x, expected = torch.load(sys.argv[1], **options)
assert "rocm_patch" not in sys.modules
left = [name for m in model for name in vars(m) if "rocm" in name or name == "config"]
print([type(m).__name__ for m in model], left)
assert torch.allclose(model(x), expected)
"""
LAYERS_FILE = """
import torch
class Own(torch.nn.Conv2d):
    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.weight * 2, self.bias)
"""


def test_a_patched_model_is_saved_as_the_plain_one(tmp_path):
    """torch.save of the whole model, loaded by a process that cannot import rocm_patch."""
    (tmp_path / "layers.py").write_text(LAYERS_FILE)
    (tmp_path / "program.py").write_text(WITHOUT_US)
    module = type(sys)("layers")
    exec(LAYERS_FILE, module.__dict__)
    module.Own.__module__ = "layers"
    sys.modules["layers"] = module
    try:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), weight_norm(nn.Conv2d(4, 4, 1)), module.Own(4, 4, 3), nn.ConvTranspose2d(4, 2, 2)
        ).double()
        x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
        expected = model(x).detach()
        patch_model(model, Conv2dBypassConfig(strategy="im2col"))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert b"rocm_patch" not in pickle.dumps(model, protocol)
        again = pickle.loads(pickle.dumps(model))
        assert [type(layer) for layer in again] == [nn.Conv2d, nn.Conv2d, module.Own, nn.ConvTranspose2d]
        assert torch.allclose(again(x), expected)
        torch.save((model, x, expected), tmp_path / "model.pt")
    finally:
        del sys.modules["layers"]
    done = subprocess.run(
        [sys.executable, "program.py", "model.pt", "layers.py"], cwd=tmp_path, env=clean_environ(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['Conv2d', 'Conv2d', 'Own', 'ConvTranspose2d'] []"


def test_a_layer_made_safe_stays_safe_when_pickled():
    layer = SafeConv2d(2, 2, 1, config=Conv2dBypassConfig(strategy="im2col"))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is SafeConv2d and again.config == layer.config


def test_parametrized_layers_say_themselves_that_they_cannot_be_pickled():
    layer = patch_model(parametrized(nn.Conv2d(1, 1, 1)))
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_patch_torch_nn_reaches_all_six(kind):
    plain_class, safe_class, shape = KINDS[kind]
    methods = plain_class.forward, plain_class._conv_forward if hasattr(plain_class, "_conv_forward") else None
    layer = plain_class(4, 2, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer(x)
    rocm_patch.patch_torch_nn()
    before = served()
    assert torch.allclose(layer(x), expected) and served() == before + 1
    assert isinstance(layer, safe_class) and type(layer) is plain_class
    assert torch.allclose(torch.jit.script(layer)(x), expected)
    rocm_patch.restore_torch_nn()
    assert (plain_class.forward, getattr(plain_class, "_conv_forward", None)) == methods
    assert not isinstance(layer, safe_class) and not [name for name in vars(plain_class) if "native" in name]

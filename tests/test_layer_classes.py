"""The classes of served layers: made, taken back, copied, pickled and sent, whatever the program's own class does."""

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import rocm_patch
from conftest import clean_environ
from rocm_patch import Conv2dBypassConfig, SafeConv2d, patch_model, unpatch_model
from rocm_patch.overrides import bypassed

IMAGE = torch.randn(2, 4, 7, 7)
IM2COL = Conv2dBypassConfig(strategy="im2col")


def served():
    """Calls of single layers' own dispatchers so far."""
    return sum(route.calls for part in bypassed.dispatchers() for route in part.routes.taken())


def assert_served(layer, expected, image=IMAGE):
    before = served()
    assert torch.allclose(layer(image), expected, atol=1e-5) and served() > before


def assert_not_served(layer, expected, image=IMAGE):
    before = served()
    assert torch.allclose(layer(image), expected, atol=1e-5) and served() == before


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Plain(nn.Conv2d):
    pass


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WithConfig(nn.Conv2d):
    """Has a `config` that is none of ours."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.config = {"scale": 2}

    def forward(self, x):
        return self.config["scale"] * super().forward(x)


class WithLock(nn.Conv2d):
    """Holds what neither pickle nor deepcopy can take."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def made_again(channels, filters):
    return Reducing(channels, filters, 3)


class Reducing(nn.Conv2d):
    """Says itself how it is made again."""

    def __reduce__(self):
        return made_again, (self.in_channels, self.out_channels), (self.state_dict(),)

    def __setstate__(self, state):
        self.load_state_dict(state[0])


class CopiesItself(nn.Conv2d):
    def __deepcopy__(self, memo):
        copied = CopiesItself(self.in_channels, self.out_channels, self.kernel_size)
        copied.load_state_dict(self.state_dict())
        return copied


@pytest.mark.parametrize("kind", [Plain, Standardised, WithConfig, WithLock, Reducing, CopiesItself])
@pytest.mark.parametrize("config", [None, IM2COL], ids=["no config", "im2col"])
def test_copies_stay_served_and_pickles_are_plain(kind, config):
    layer = kind(4, 3, 3)
    expected = layer(IMAGE)
    before = set(vars(layer))
    patch_model(layer, config)
    assert isinstance(layer, kind) and isinstance(layer, SafeConv2d)
    assert_served(layer, expected)
    assert_served(copy.deepcopy(layer), expected)
    assert_served(copy.copy(layer), expected)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        again = pickle.loads(pickle.dumps(layer, protocol))
        assert type(again) is kind and set(vars(again)) == before
        assert_not_served(again, expected)
    unpatch_model(layer)
    assert type(layer) is kind and set(vars(layer)) == before
    assert_not_served(layer, expected)


def test_a_program_s_own_config_is_left_alone():
    layer = patch_model(patch_model(WithConfig(4, 3, 3)), IM2COL)
    assert layer.config == {"scale": 2}
    image = torch.randn(1, 4, 39, 7)
    layer(image)
    assert "im2col     forward 1x4x39x7" in rocm_patch.bypass_report()
    assert unpatch_model(layer).config == {"scale": 2}


def test_parametrized_while_patched_and_copied_after():
    layer = patch_model(nn.Conv2d(4, 3, 3))
    parametrize.register_parametrization(layer, "weight", Halved())
    expected = layer(IMAGE)
    assert_served(copy.deepcopy(layer), expected)
    unpatch_model(layer)
    assert type(layer).__name__ == "ParametrizedConv2d"
    assert_not_served(copy.deepcopy(layer), expected)
    patch_model(layer)
    parametrize.register_parametrization(layer, "bias", Halved())
    parametrize.remove_parametrizations(layer, "weight")
    unpatch_model(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("first", ["patched", "mixed in"])
def test_a_class_that_others_have_put_on_the_layer(first):
    """As torch's fully_shard does it: a class of its own over the layer's."""

    class Mixin:
        pass

    def mix_in():
        layer.__class__ = type(f"Sharded{type(layer).__name__}", (Mixin, type(layer)), {})

    layer = nn.Conv2d(4, 3, 3)
    expected = layer(IMAGE)
    for act in (lambda: patch_model(layer), mix_in) if first == "patched" else (mix_in, lambda: patch_model(layer)):
        act()
    assert_served(layer, expected)
    unpatch_model(layer)
    assert isinstance(layer, Mixin) and not isinstance(layer, SafeConv2d)
    assert_not_served(layer, expected)


def test_classes_that_register_their_subclasses_do_not_hear_of_ours():
    heard = []

    class Base(nn.Conv2d):
        def __init_subclass__(cls, *, key, **kwargs):
            super().__init_subclass__(**kwargs)
            heard.append((cls.__name__, key))

    class Registered(Base, key=1):
        pass

    layer = Registered(4, 3, 3)
    expected = layer(IMAGE)
    assert_served(patch_model(layer), expected)
    assert heard == [("Registered", 1)]


def test_a_class_that_takes_no_subclass_is_left_with_the_reason():
    class Closed(type):
        def __new__(cls, name, bases, body, **kwargs):
            if any(isinstance(base, Closed) for base in bases):
                raise TypeError("no more subclasses")
            return super().__new__(cls, name, bases, body)

    class Sealed(nn.Conv2d, metaclass=Closed):
        pass

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Sealed(4, 4, 1), nn.Conv2d(4, 4, 1))
    patch_model(model)
    report = rocm_patch.model_report(model)
    assert report.replaced == ("0", "2") and list(report.left) == ["1"]
    assert "Sealed cannot have a subclass that is served: no more subclasses" in str(report)
    assert type(unpatch_model(model)[1]) is Sealed


def test_scripted_layers_that_are_no_convolutions_are_not_reported():
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.conv2d(x, weight)

    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "calls": Calls(), "nested": nn.Sequential(nn.Conv1d(1, 1, 1))})
    scripted = nn.ModuleDict({name: torch.jit.script(module) for name, module in model.items()})
    compiled = "compiled by TorchScript"
    assert rocm_patch.model_report(scripted).left == {"calls": compiled, "nested.0": compiled}


def test_methods_keep_their_signature_and_other_ways_in_are_served():
    class Scaled(nn.Conv2d):
        def forward(self, x, scale=2):
            return scale * super().forward(x)

    layer = Scaled(4, 3, 3)
    expected, signature = layer(IMAGE, scale=3), inspect.signature(layer.forward)
    patch_model(layer)
    assert inspect.signature(layer.forward) == signature
    assert_served(functools.partial(layer, scale=3), expected)
    assert_served(functools.partial(layer.forward, scale=3), expected)
    plain = patch_model(Plain(4, 3, 3))
    assert_served(lambda x: plain._conv_forward(x, plain.weight, plain.bias), plain(IMAGE))


@pytest.mark.parametrize("is_patched_first", [False, True])
def test_methods_that_a_program_has_put_on_one_layer(is_patched_first):
    """Seamless images by a _conv_forward of the layer's own, and wrappers around the forward that was there."""

    def seamless(layer):
        def conv_forward(input, weight, bias):
            return F.conv2d(F.pad(input, (1, 1, 0, 0), mode="circular"), weight, bias)

        layer._conv_forward = conv_forward

    def wrapped(layer):
        native = layer.forward
        layer.forward = lambda *arguments: 2 * native(*arguments)

    for kind, change in (
        (nn.Conv2d, seamless),
        *((k, wrapped) for k in (nn.Conv2d, Standardised, nn.ConvTranspose2d)),
    ):
        layer = kind(4, 3, 3)
        for act in (patch_model, change) if is_patched_first else (change, patch_model):
            act(layer)
        ours = layer(IMAGE)
        before = served()
        assert torch.equal(layer(IMAGE), ours) and served() == before + 1
        unpatch_model(layer)
        if not is_patched_first:  # else the wrapper holds on to the method that it found
            assert_not_served(layer, ours)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_calls_inside_a_forward_that_are_served(kind):
    """torch.convolution, and what torch takes for a number."""
    from fractions import Fraction

    class Index:
        def __index__(self):
            return 2

    class Direct(kind):
        way = "torch.convolution"

        def forward(self, x):
            if self.way == "torch.convolution":
                is_transposed = isinstance(self, nn.ConvTranspose2d)
                return torch.convolution(x, self.weight, self.bias, (2,), (0, 0), (1, 1), is_transposed, (0, 0), 1)
            function = F.conv_transpose2d if isinstance(self, nn.ConvTranspose2d) else F.conv2d
            return function(x, self.weight, self.bias, stride=self.way)

    layer = Direct(4, 3, 3, stride=2)
    expected = layer(IMAGE)
    patch_model(layer)
    assert_served(layer, expected)
    ways = (
        [(2,), [2, 2]] if torch.__version__.startswith("1.") else [Index(), (2,), [2, 2]]
    )  # 1.13 takes no such number
    for way in ways:
        layer.way = way
        assert_served(layer, expected)
    layer.way = Fraction(2)
    with pytest.raises(TypeError):
        layer(IMAGE)


@pytest.mark.parametrize("is_patched", [False, True])
def test_a_layer_of_other_dimensions_is_an_error_as_natively(is_patched):
    class Wrong(nn.Conv2d):
        def forward(self, x):
            return F.conv1d(x, self.weight, self.bias)

    layer = Wrong(4, 3, 3)
    if is_patched:
        patch_model(layer)
    with pytest.raises(RuntimeError, match="conv1d"):
        layer(IMAGE)


def test_lazy_layers_are_copied_and_pickled_before_they_know_their_shape():
    model = patch_model(nn.Sequential(nn.LazyConv2d(3, 3)))
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert type(loaded[0]) is nn.LazyConv2d
    copied(IMAGE), loaded(IMAGE)
    assert type(copied[0]) is SafeConv2d and type(loaded[0]) is nn.Conv2d
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    assert b"rocm_patch" not in buffer.getvalue()


SENT = """
import sys, torch
from torch import multiprocessing, nn
class Own(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * 2, self.bias)
def child(model, x, queue):
    import rocm_patch
    from rocm_patch.overrides import bypassed
    out = model(x)
    calls = sum(route.calls for part in bypassed.dispatchers() for route in part.routes.taken())
    config = getattr(model[0], "config", None)
    queue.put((rocm_patch.model_report(model).replaced, calls, config and config.strategy, out.tolist()))
if __name__ == "__main__":
    import rocm_patch
    torch.set_num_threads(1)
    made = rocm_patch.SafeConv2d(2, 1, 1)
    model = nn.Sequential(nn.Conv2d(4, 3, 3), Own(3, 3, 1), nn.ConvTranspose2d(3, 2, 2), made)
    x = torch.randn(1, 4, 6, 6)
    expected = model(x).detach()
    rocm_patch.patch_model(model, rocm_patch.Conv2dBypassConfig(strategy="im2col")).requires_grad_(False)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(model, x, queue))
    process.start()
    replaced, calls, strategy, out = queue.get()
    process.join()
    assert torch.allclose(torch.tensor(out), expected, atol=1e-5)
    print(replaced, calls, strategy, process.exitcode)
"""


def test_a_model_sent_to_a_spawned_process_stays_patched(tmp_path):
    """pickle would write the plain model; there the very convolutions that are to be kept from MIOpen would run."""
    (tmp_path / "program.py").write_text(SENT)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=clean_environ(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('0', '1', '2', '3') 4 im2col 0"

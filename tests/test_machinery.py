"""The override under autograd, torch.func, autocast, modes, subclasses and processes: served, and as natively.

What compiles is in test_compile.py; strides and errors have files of their own.
"""

import copy
import io
import itertools
import pickle
import threading
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rocm_patch
from against_native import CONVS, LAST, TRANSPOSED, calls, flat, image, same
from conftest import python
from rocm_patch.overrides.cudnn_flag import real_flag

ONE = torch.__version__.startswith("1.")
torch2 = pytest.mark.skipif(ONE, reason="needs torch 2.x")
pytestmark = pytest.mark.usefixtures("one_thread")

if ONE:
    from functorch import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
    from torch.nn.utils.stateless import functional_call
else:
    from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap


def network(dtype=torch.float64):
    """Plain, grouped, pointwise and transposed convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh(),
        nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 2, 3, stride=2),
    ).to(dtype)  # fmt: skip


# The calls of one forward, and of one forward and backward, of the network.
FORWARD = {"forward": 3, "grad_input": 1, "grad_weight": 0}
STEP = {"forward": 4, "grad_input": 4, "grad_weight": 4}


def step(net, x, loss=lambda out: out.square().sum()):
    """Output, and the gradients of the input and of all parameters."""
    x = x.detach().clone().requires_grad_()
    out = net(x)
    return out, torch.autograd.grad(loss(out), [x, *net.parameters()])


# Autograd


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_output_mask_computes_what_it_asks_for_and_no_more(transposed, dims, groups):
    x, w = image(2, 4, *[5] * dims), image(4, 4 // groups, *[3] * dims)
    arguments = ([2] * dims, [1] * dims, [1] * dims, transposed, [1 if transposed else 0] * dims, groups)
    grad_output = torch.ones_like(torch.ops.aten.convolution(x, w, None, *arguments))
    of_input = "forward" if transposed else "grad_input"
    for mask in itertools.product([True, False], repeat=3):

        def backward(mask=mask):
            grads = torch.ops.aten.convolution_backward(grad_output, x, w, [4], *arguments, list(mask))
            return [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)]

        served = same(backward)
        assert (served[of_input], served["grad_weight"]) == mask[:2] and sum(served.values()) == sum(mask[:2])


@pytest.mark.parametrize("transposed", [False, True])
def test_third_derivatives(transposed):
    def third():
        x, w, b = (t.requires_grad_() for t in (image(2, 4, 5, 5), image(4, 2, 3, 3), image(4)))
        out = (TRANSPOSED if transposed else CONVS)[2](x, w, b, stride=2, padding=1, groups=2)
        found, value = [out], out.pow(4).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, (x, w, b), create_graph=True)
            found += grads
            value = sum(g.pow(2).sum() for g in grads) * 1e-3
        return found

    assert min(same(third).values()) >= 3


@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_the_gradient_of_one_operand_alone(wanted):
    def one():
        operands = {"input": image(2, 4, 5, 5), "weight": image(4, 2, 3, 3), "bias": image(4)}
        operands[wanted].requires_grad_()
        F.conv2d(*operands.values(), groups=2).square().sum().backward()
        return [operand.grad for operand in operands.values()]

    assert same(one) == {"forward": 1, "grad_input": wanted == "input", "grad_weight": wanted == "weight"}


def test_a_second_backward_adds_up_and_one_too_many_is_refused():
    def twice():
        net, x = network(), image().requires_grad_()
        value = net(x).square().sum()
        value.backward(retain_graph=True)
        value.backward()
        with pytest.raises(RuntimeError) as refused:
            value.backward()
        return x.grad, [p.grad for p in net.parameters()], str(refused.value)

    assert same(twice) == {"forward": 5, "grad_input": 7, "grad_weight": 8}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    from torch.utils.checkpoint import checkpoint

    def checkpointed():
        net, x = network(), image().requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        return x.grad, [p.grad for p in net.parameters()]

    assert same(checkpointed)["forward"] >= 2 * FORWARD["forward"]  # run again for the backward


def test_hooks_of_modules_tensors_and_saved_tensors():
    def hooked():
        net, x, seen = network(), image().requires_grad_(), []
        net[2].register_forward_pre_hook(lambda module, given: (given[0] * 2,))
        net[2].register_forward_hook(lambda module, given, out: out + 1)
        net[4].register_full_backward_hook(lambda module, before, after: (before[0] * 3,))
        net[0].weight.register_hook(lambda g: g.clamp(-1, 1))
        if not ONE:
            net[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        packed = []

        def pack(tensor):
            packed.append(tuple(tensor.shape))
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            middle = net[:4](x)
        middle.register_hook(lambda g: g + 1)
        middle.retain_grad()
        with torch.autograd.graph.save_on_cpu():
            out = net[4:](middle)
        out.square().sum().backward()
        return out, middle.grad, x.grad, [p.grad for p in net.parameters()], seen, packed

    assert same(hooked) == STEP


def test_in_place_operations_after_and_on_saved_operands():
    def after():
        net, x = network(), image().requires_grad_()
        out = net[0](x)
        out.add_(1)
        out[:, 0] = 0
        out = net[2](out.relu_())
        out.mul_(2).clamp_(-1, 1)
        out.square().sum().backward()
        return out, x.grad

    def on_saved():
        x = (image() * 1).requires_grad_() * 1
        out = network()[0](x)
        x.add_(1)
        with pytest.raises(RuntimeError) as refused:
            out.sum().backward()
        return str(refused.value)

    assert same(after)["grad_weight"] == 2
    assert same(on_saved)["forward"] == 1


def test_anomaly_mode_names_the_convolution():
    def anomalous():
        x, w = image(1, 1, 4, 4).requires_grad_(), torch.full((1, 1, 2, 2), float("inf"), dtype=torch.float64)
        with (
            pytest.warns(UserWarning, match="Anomaly|Error detected"),
            torch.autograd.detect_anomaly(),
            pytest.raises(RuntimeError) as found,
        ):
            (F.conv2d(x, w.requires_grad_()) * 0).sum().backward()
        return str(found.value)

    assert "ConvolutionBackward" in anomalous()
    assert same(anomalous) == {"forward": 1, "grad_input": 1, "grad_weight": 1}


def test_threads_train_at_once():
    def trained():
        shared, results = network(), {}

        def work(number):
            own = copy.deepcopy(shared)
            for _ in range(5):
                _, grads = step(own, image() * (number + 1))
                with torch.no_grad():
                    for parameter, g in zip(own.parameters(), grads[1:], strict=True):
                        parameter -= 1e-3 * g
            results[number] = list(own.parameters())
            (shared(image() * number).sum() * 1e-2).backward()  # all into the same .grad

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[number] for number in range(4)]

    assert min(same(trained).values()) > 0


# Forward mode and torch.func (functorch in torch 1.13)


def test_forward_mode_through_every_operand():
    import torch.autograd.forward_ad as forward_ad

    def derivative(conv, *operands, **options):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in operands]
            return tuple(forward_ad.unpack_dual(conv(*duals, **options)))

    for conv, weight in ((F.conv2d, (6, 2, 3, 3)), (F.conv_transpose2d, (4, 3, 3, 3))):
        operands = image(2, 4, 6, 6), image(*weight), image(6)
        served = same(lambda conv=conv, operands=operands: derivative(conv, *operands, stride=2, groups=2))
        assert sum(served.values()) == 3  # the value, and a tangent for each of input and weight


def test_jacobians_and_hessians():
    x, w = image(1, 2, 4, 4), image(2, 2, 2, 2)

    def conv(x, w):
        return F.conv2d(x, w, padding=1).pow(3)

    def value(x, w):
        return conv(x, w).sum()

    ways = {
        "jvp": lambda: jvp(conv, (x, w), (x, w)),
        "vjp": lambda: vjp(conv, x, w)[1](conv(x, w).detach()),
        "jacrev": lambda: jacrev(conv, argnums=(0, 1))(x, w),
        "jacfwd": lambda: jacfwd(conv, argnums=(0, 1))(x, w),
        "hessian": lambda: hessian(value, argnums=(0, 1))(x, w),
        "reverse over forward": lambda: jacrev(jacfwd(value, argnums=1), argnums=0)(x, w),
        "grad of grad": lambda: grad(lambda x: grad(value)(x, w).square().sum())(x),
    }
    for name, way in ways.items():
        assert sum(same(way).values()) >= 2, name


def test_gradients_per_sample():
    net = network()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    images = image(5, 3, 8, 8)

    def loss(parameters, x):
        return functional_call(net, parameters, (x.unsqueeze(0),)).square().sum()

    def per_sample():
        return vmap(grad(loss), in_dims=(None, 0))(parameters, images)

    def one_by_one():
        each = [step(net, x.unsqueeze(0))[1][1:] for x in images]
        return {name: torch.stack(g) for name, g in zip(parameters, zip(*each, strict=True), strict=True)}

    assert min(same(per_sample).values()) > 0
    rocm_patch.enable_miopen_bypass(backend="cpu")
    for ours, alone in zip(flat(per_sample()), flat(one_by_one()), strict=True):
        assert torch.allclose(ours, alone)


@pytest.mark.parametrize("transposed", [False, True])
def test_vmap_over_each_operand(transposed):
    conv = F.conv_transpose2d if transposed else F.conv2d
    x, w, b = image(3, 2, 4, 5, 5), image(4, 3, 2, 3, 3), image(3, 4)
    for in_dims in ((0, None), (None, 1), (0, 1)):
        for bias in (None, 0):
            one = [x if in_dims[0] is not None else x[0], w if in_dims[1] is not None else w[:, 0]]

            def mapped(one=one, in_dims=in_dims, bias=bias):
                return vmap(
                    lambda x, w, b: conv(x, w, b, stride=2, padding=1, groups=2),
                    in_dims=(*in_dims, bias),
                )(*one, None if bias is None else b)

            assert sum(same(mapped).values()) >= 1


def test_a_functional_call_with_other_parameters():
    net = network()

    def called():
        return functional_call(net, {name: p * 2 for name, p in net.named_parameters()}, (image(),))

    assert same(called) == FORWARD


# Precision, gradients off, determinism, default types and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16] if ONE else [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_nested_regions_and_backward_inside_and_outside(dtype):
    def cast(inside):
        net, x = network(torch.float32), image(dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            low = net[:2](x)
            with torch.autocast("cpu", enabled=False):
                full = net[2](low.float())
            out = net[3:](full)
            loss = out.float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert (low.dtype, full.dtype) == (dtype, torch.float32)
        return low, full, out, x.grad, [p.grad for p in net.parameters()]

    for inside in (True, False):
        assert same(lambda inside=inside: cast(inside), rtol=5e-2, atol=5e-2) == STEP


@torch2
def test_a_gradient_scaler_trains_as_natively_and_skips_overflowing_steps():
    def trained():
        net = network(torch.float32)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scales, losses = [], []
        for turn in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = net(image(dtype=torch.float32)).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss * (float("inf") if turn == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            losses.append(loss.detach())
        assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
        return list(net.parameters()), losses, scales

    assert same(trained, rtol=2e-2, atol=2e-3)["grad_weight"] == 16


def test_deterministic_algorithms_repeat_bit_for_bit():
    def repeated():
        torch.use_deterministic_algorithms(True)
        try:
            runs = [flat(step(network(torch.float32), image(dtype=torch.float32))) for _ in range(3)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        return runs[0]

    assert same(repeated, rtol=1e-4, atol=1e-4)["forward"] == 12


def test_inference_mode_makes_inference_tensors():
    def inferred():
        net = network()
        with torch.inference_mode():
            out = net(image())
        with pytest.raises(RuntimeError) as refused:
            F.conv2d(out, net[0].weight[:, :2])
        with torch.no_grad():
            quiet = net(image())
        return out.clone(), out.is_inference(), str(refused.value), quiet

    assert same(inferred)["forward"] >= 6


def test_default_types_and_devices():
    def in_double():
        torch.set_default_dtype(torch.float64)
        try:
            return nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 5, 5))
        finally:
            torch.set_default_dtype(torch.float32)

    def on_meta():
        torch.set_default_device("meta")
        try:
            return nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 5, 5))
        finally:
            torch.set_default_device(None)

    assert same(in_double)["forward"] == 1
    if not ONE:
        assert sum(same(on_meta).values()) == 0


# What looks at operators: meta and fake tensors, modes, subclasses, counters


def test_meta_and_fake_tensors_take_no_route_and_have_natives_strides():
    from torch._subclasses import FakeTensorMode

    def shapes():
        found = []
        for dims, last in itertools.product((1, 2, 3), (False, True)):
            x, w = torch.empty(2, 4, *[5] * dims, device="meta"), torch.empty(4, 2, *[3] * dims, device="meta")
            if last and dims in LAST:
                x, w = x.to(memory_format=LAST[dims]), w.to(memory_format=LAST[dims])
            for conv in (CONVS[dims], TRANSPOSED[dims]):
                found.append(conv(x.requires_grad_(), w.requires_grad_(), groups=2))
                if not ONE:  # aten has no backward there
                    found += torch.autograd.grad(found[-1], [x, w], torch.empty_like(found[-1]))
        with FakeTensorMode():
            x, w = torch.empty(2, 4, 5, 5), torch.empty(4, 2, 3, 3).to(memory_format=torch.channels_last)
            for conv in (F.conv2d, F.conv_transpose2d):
                found.append(conv(x.requires_grad_(), w.requires_grad_(), groups=2))
                if not ONE:  # runs the real kernel there
                    found += torch.autograd.grad(found[-1], [x, w], torch.empty_like(found[-1]))
        return [(tuple(t.shape), t.stride(), t.dtype, str(t.device)) for t in found]

    assert sum(same(shapes).values()) == 0


def test_make_fx_traces_the_same_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    net = network()

    def traced():
        def value(x):
            return torch.autograd.grad(net(x).square().sum(), x)[0]

        graph = make_fx(value)(image().requires_grad_())
        return graph.code, graph(image() * 2)

    served = same(traced)
    assert served["forward"] >= FORWARD["forward"] and served["grad_input"] >= STEP["grad_input"]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenAbove(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


def test_modes_see_natives_operators():
    def seen():
        net = network()
        with SeenAbove() as above, Seen() as below:
            out, grads = step(net, image())
        return above.names, below.names, out, grads

    assert same(seen) == STEP


class Tagged(torch.Tensor):
    """A subclass by __torch_function__."""


class Logged(torch.Tensor):
    """A wrapper subclass by __torch_dispatch__."""

    names: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        plain = [[a.inner if isinstance(a, cls) else a for a in part] for part in (args, (kwargs or {}).values())]
        out = function(*plain[0], **dict(zip(kwargs or {}, plain[1], strict=True)))
        return cls(out) if isinstance(out, torch.Tensor) else out


def test_subclasses_of_tensors():
    def tagged():
        x = image().as_subclass(Tagged).requires_grad_()
        out = network()(x)
        assert type(out) is Tagged
        (of_x,) = torch.autograd.grad(out.square().sum(), x)
        return out.as_subclass(torch.Tensor), of_x.as_subclass(torch.Tensor), type(of_x).__name__

    def logged():
        Logged.names.clear()
        out = network().requires_grad_(False)(Logged(image()))
        assert type(out) is Logged
        return out.inner, list(Logged.names)

    served = same(tagged)
    assert served["forward"] == STEP["forward"] and served["grad_input"] == STEP["grad_input"]
    assert same(logged) == FORWARD


@torch2
def test_the_flop_counter_counts_the_same():
    from torch.utils.flop_counter import FlopCounterMode

    def counted():
        net = network()
        with FlopCounterMode(display=False) as counter:
            net(image()).sum().backward()
        return counter.get_total_flops()

    assert same(counted)["grad_weight"] == STEP["grad_weight"]


def test_the_profiler_shows_aten_convolutions_and_no_native_kernel():
    def profiled():
        net = network(torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(net, image(dtype=torch.float32))
        return {event.name for event in profile.events()}

    rocm_patch.disable_all_patches()
    native = profiled()
    rocm_patch.enable_miopen_bypass(backend="cpu")
    ours = profiled()
    expected = {"aten::conv2d", "aten::conv_transpose2d", "aten::convolution", "aten::_convolution",
                "aten::convolution_backward", "ConvolutionBackward0"}  # fmt: skip
    assert expected <= ours and expected <= native
    kernels = {name for name in native if "mkldnn" in name or "slow_conv" in name or "thnn" in name}
    assert kernels and not kernels & ours


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_copies_pickles_and_reparametrized_models():
    def copied():
        net = network()
        kept = io.BytesIO()
        torch.save(net.state_dict(), kept)
        kept.seek(0)
        loaded = network()
        loaded.load_state_dict(torch.load(kept))
        models = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded]
        nn.utils.weight_norm(net[2])
        nn.utils.parametrizations.spectral_norm(net[0])
        return [step(model, image()) for model in (*models, net)]

    assert same(copied)["grad_weight"] == 4 * STEP["grad_weight"]


# MIOpen's other clients


@pytest.mark.parametrize("kind", ["BatchNorm", "LSTM", "GRU", "RNN"])
def test_norms_and_rnns_train_to_the_same_parameters(kind):
    def trained():
        torch.manual_seed(3)
        if kind == "BatchNorm":
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
            x = image()
        else:
            net, x = getattr(nn, kind)(5, 4, num_layers=2, bidirectional=True, batch_first=True), image(3, 7, 5)
        net.double().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            out = net(x)
            optimizer.zero_grad()
            (out if kind == "BatchNorm" else out[0]).square().mean().backward()
            optimizer.step()
        evaluated = net.eval()(x)
        return list(net.parameters()), list(net.buffers()), evaluated, real_flag() or "off"

    rocm_patch.disable_all_patches()
    native = flat(trained())
    rocm_patch.enable_miopen_bypass(backend="cpu")
    ours = flat(trained())
    assert native.pop() is True and ours.pop() == "off"  # aten's flag: MIOpen's on ROCm
    for n, o in zip(native, ours, strict=True):
        assert torch.allclose(n, o, 1e-7, 1e-9)
    assert calls()["grad_weight"] == (10 if kind == "BatchNorm" else 0)


# Scripts, processes


SAVED = """
import sys, torch
from rocm_patch.overrides.aten import ACTIVE
model, x, expected = torch.jit.load(sys.argv[1]), *torch.load(sys.argv[2])
out = model(x)
assert torch.allclose(out, expected, 1e-9, 1e-11), (out - expected).abs().max()
print(sum(route.calls for route in ACTIVE["CPU"].routes.taken()))
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_traced_and_frozen_models_are_served_here_and_in_a_fresh_process(tmp_path):
    net, x = network().eval(), image()
    expected = net(x).detach()
    torch.save((x, expected), tmp_path / "tensors.pt")
    (tmp_path / "program.py").write_text(SAVED)
    made = {
        "scripted": torch.jit.script(net),
        "traced": torch.jit.trace(net, x),
        "frozen": torch.jit.freeze(torch.jit.script(net)),
        # On the CPU it turns float32 convolutions into oneDNN's own operators; float64 ones stay aten's.
        "optimized": torch.jit.optimize_for_inference(torch.jit.script(net)),
    }
    for name, model in made.items():

        def run(model=model):
            with torch.no_grad():
                return [model(x) for _ in range(3)]  # the profiling executor optimizes at the second

        assert same(run) == {**FORWARD, "forward": 9, "grad_input": 3}, name
    for name in ("scripted", "traced"):

        def train(model=made[name]):
            return step(model, x)

        assert same(train) == STEP, name
    made["frozen"].save(str(tmp_path / "frozen.pt"))
    done = python(
        "-m", "rocm_patch", "run", "-q", "--backend", "cpu", str(tmp_path / "program.py"),
        str(tmp_path / "frozen.pt"), str(tmp_path / "tensors.pt"),
    )  # fmt: skip
    assert done.stdout == "4\n"


DISTRIBUTED = """
import os, sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3)
    return nn.Sequential(*layers).double()

def trained(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]

def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt")
    options = ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True})
    results = [trained(DistributedDataParallel(network(), **o), x[rank::2]) for o in options]
    aten = sys.modules.get("rocm_patch.overrides.aten")
    routes = [r for d in (aten.ACTIVE.values() if aten else ()) for r in d.routes.taken()]
    strategies = sorted({r.strategy.name for r in routes})
    torch.save((results, strategies, sum(r.calls for r in routes)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort at interpreter exit now and then

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""


def test_distributed_data_parallel_trains_as_one_native_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(DISTRIBUTED)
    torch.save(image(4, 3, 8, 8), tmp_path / "x.pt")
    space = {"__name__": "program"}
    exec(DISTRIBUTED, space)
    alone = space["trained"](space["network"](), image(4, 3, 8, 8))
    python("-m", "rocm_patch", "run", "-q", "--backend", "cpu", str(program), str(tmp_path))
    for rank in (0, 1):
        results, strategies, served = torch.load(tmp_path / f"{rank}.pt")
        assert strategies and "native" not in strategies
        assert served == len(results) * 3 * (3 + 2 + 3)  # options, steps, and the calls of a step
        for parameters in results:
            for single, parallel in zip(alone, parameters, strict=True):
                assert torch.allclose(single, parallel, 1e-9, 1e-12)

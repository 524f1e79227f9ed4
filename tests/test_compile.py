"""The override under torch.compile, torch.export, inductor's cpp_wrapper and AOTInductor: served, and as natively.

Inductor's CPU backend leaves convolutions to aten, as it does on a GPU, unless it freezes weights: then they become
oneDNN's own operators, which is why the test of freezing switches oneDNN off.
"""

import contextlib

import pytest
import torch
from torch import nn

import rocm_patch
from conftest import python
from rocm_patch.overrides.aten import ACTIVE

pytestmark = [
    pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.13 has no torch.compile"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:TF32 acceleration:UserWarning"
    ),
]
# The calls of one forward, and of one forward and backward, of the network.
FORWARD = {"forward": 2, "grad_input": 1, "grad_weight": 0}
STEP = {"forward": 3, "grad_input": 3, "grad_weight": 3}


@pytest.fixture(autouse=True)
def _fresh():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


def on():
    rocm_patch.disable_all_patches()
    assert rocm_patch.enable_miopen_bypass(backend="cpu")


def calls():
    """Calls by direction of the override in force; none of them may have gone to aten."""
    found = dict.fromkeys(("forward", "grad_input", "grad_weight"), 0)
    for route in ACTIVE["CPU"].routes.taken():
        assert route.strategy.name != "native", route
        found[route.spec.direction] += route.calls
    return found


class Network(nn.Module):
    """A plain, a grouped and a transposed convolution; breaks the graph in the middle if asked to."""

    def __init__(self, breaks=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, groups=2)
        self.third = nn.ConvTranspose2d(4, 2, 3, stride=2)
        self.breaks = breaks

    def forward(self, x):
        x = self.second(self.first(x).relu())
        if self.breaks:
            torch._dynamo.graph_break()
        return self.third(x.relu())


def image(batch=2, height=8, width=8):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


def step(run, net, x):
    """Output, and the gradients of the input and of all parameters; run is net or what was made of it."""
    x = x.detach().requires_grad_()
    out = run(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *net.parameters()])]


def assert_same(native, ours, strides=True):
    """With strides=False but for the first: inductor lays out gradients as it likes, with and without us."""
    for number, (n, o) in enumerate(zip(native, ours, strict=True)):
        assert (o.shape, o.dtype) == (n.shape, n.dtype)
        assert o.stride() == n.stride() or (number and not strides)
        assert torch.allclose(n, o, 1e-4, 1e-4), (n - o).abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inductor_trains_with_natives_results_and_strides(memory_format):
    net, x = Network().to(memory_format=memory_format), image().contiguous(memory_format=memory_format)
    eager = step(net, net, x)
    compiled = torch.compile(net, fullgraph=True)
    native = step(compiled, net, x)
    torch._dynamo.reset()
    on()
    compiled = torch.compile(net, fullgraph=True)
    ours = step(compiled, net, x)
    assert calls() == STEP
    assert_same(native, ours)
    assert_same(eager, ours, strides=False)


def test_a_graph_compiled_before_follows_the_override_on_and_off():
    net, x = Network(), image()
    compiled = torch.compile(net, fullgraph=True)
    native = step(compiled, net, x)
    on()
    dispatcher = ACTIVE["CPU"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(native, step(compiled, net, x))
        assert calls() == STEP
        rocm_patch.disable_all_patches()
        assert_same(native, step(compiled, net, x))
    assert sum(route.calls for route in dispatcher.routes.taken()) == sum(STEP.values())


def test_dynamic_shapes_compile_as_often_as_natively():
    from torch._dynamo.testing import CompileCounterWithBackend

    net = Network()
    images = [image(*size) for size in ((2, 8, 8), (3, 8, 8), (5, 9, 11))]
    eager = [step(net, net, x) for x in images]
    frames = []
    for patched in (False, True):
        torch._dynamo.reset()
        if patched:
            on()
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
        for x, expected in zip(images, eager, strict=True):
            assert_same(expected, step(compiled, net, x), strides=False)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]
    assert sum(calls().values()) == len(images) * sum(STEP.values())


def test_graphs_break_where_natively():
    net, x = Network(breaks=True), image()
    found = []
    for patched in (False, True):
        torch._dynamo.reset()
        if patched:
            on()
        explained = torch._dynamo.explain(net)(x)
        compiled = torch.compile(net, backend="aot_eager")
        found.append((explained.graph_count, explained.graph_break_count, step(compiled, net, x)))
    assert found[0][:2] == found[1][:2] == (2, 1)
    assert_same(found[0][2], found[1][2])
    assert calls()["grad_weight"] == STEP["grad_weight"]


@pytest.mark.parametrize("way", ["no_grad", "reduce-overhead", "freezing without oneDNN", "autocast"])
def test_other_ways_to_compile(way):
    net, x = Network(), image()
    tolerance = 5e-2 if way == "autocast" else 1e-4
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if way == "freezing without oneDNN":
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch._inductor.config.patch(freezing=True))
        if way == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        native = net(x)
        on()
        compiled = torch.compile(net, fullgraph=True, **({"mode": way} if way == "reduce-overhead" else {}))
        ours = [compiled(x) for _ in range(3)]
    assert calls() == {direction: 3 * count for direction, count in FORWARD.items()}
    for out in ours:
        assert (out.dtype, out.stride()) == (native.dtype, native.stride())
        assert torch.allclose(native.float(), out.float(), tolerance, tolerance)


LOADED = """
import sys, torch
from rocm_patch.overrides.aten import ACTIVE
path, kind = sys.argv[1:]
x, expected = torch.load(f"{path}/tensors.pt")
if kind == "export":
    model = torch.export.load(f"{path}/model.pt2").module()
else:
    model = torch._inductor.aoti_load_package(f"{path}/model.pt2")
with torch.no_grad():
    for image, wanted in zip(x, expected):
        out = model(image)
        assert out.stride() == wanted.stride() and torch.allclose(out, wanted, 1e-4, 1e-4), (out - wanted).abs().max()
routes = ACTIVE["CPU"].routes.taken()
assert all(route.strategy.name != "native" for route in routes)
print(sum(route.calls for route in routes))
"""


@pytest.mark.parametrize("kind", ["export", "aoti"])
def test_programs_exported_natively_are_served_in_a_fresh_process(kind, tmp_path):
    net, images = Network().eval().requires_grad_(False), [image(), image(3, 10, 12)]
    torch.save((images, [net(x) for x in images]), tmp_path / "tensors.pt")
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(net, (images[0],), dynamic_shapes=(sizes,))
    if kind == "export":
        torch.export.save(exported, tmp_path / "model.pt2")
    else:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    (tmp_path / "program.py").write_text(LOADED)
    done = python(
        "-m", "rocm_patch", "run", "-q", "--backend", "cpu", str(tmp_path / "program.py"), str(tmp_path), kind
    )
    assert done.stdout == f"{2 * sum(FORWARD.values())}\n"


def test_export_under_the_override_gives_natives_program():
    net, x = Network(), image()
    expected, native = net(x), torch.export.export(net, (x,))
    on()
    ours = torch.export.export(net, (x,))
    assert sum(calls().values()) == 0
    assert ours.graph_module.code == native.graph_module.code
    decomposed = ours.run_decompositions()
    for program in (ours, decomposed):
        before = calls()
        out = program.module()(x)
        assert {d: n - before[d] for d, n in calls().items()} == FORWARD
        assert torch.allclose(out, expected, 1e-4, 1e-4)


def test_cpp_wrapper_is_served_forward_and_right_but_not_reached_backward():
    """Its backward calls aten's convolution_backward past the dispatcher, as the documents say."""
    net, x = Network(), image()
    native = step(net, net, x)
    on()
    with torch._inductor.config.patch(cpp_wrapper=True):
        compiled = torch.compile(net, fullgraph=True)
        ours = step(compiled, net, x)
    assert_same(native, ours, strides=False)
    assert calls() == FORWARD, "the backward is reached now: README and documents say that it is not"

"""The override under PyTorch's own machinery: every way to a convolution arrives, and goes away again."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rocm_patch
from conftest import clean_environ, python
from rocm_patch.overrides.aten import ACTIVE

torch2 = pytest.mark.skipif(torch.__version__.startswith("1."), reason="needs torch 2.x")


@pytest.fixture(autouse=True)
def _on():
    rocm_patch.enable_miopen_bypass(backend="cpu")


def calls(direction="forward"):
    return sum(route.calls for route in ACTIVE["CPU"].routes.taken() if route.spec.direction == direction)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


IMAGE = torch.randn(2, 3, 6, 6, dtype=torch.float64)


def natively(function):
    rocm_patch.disable_all_patches()
    result = function()
    rocm_patch.enable_miopen_bypass(backend="cpu")
    return result


def test_eager_no_grad_and_inference_mode_arrive():
    net = model()
    expected = natively(lambda: net(IMAGE))
    assert torch.allclose(net(IMAGE), expected)
    with torch.no_grad():
        net(IMAGE)
    with torch.inference_mode():
        net(IMAGE.clone())
    assert calls() == 6


def test_traced_and_scripted_models_arrive():
    net = model()
    expected = natively(lambda: net(IMAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torch.jit.trace", DeprecationWarning)
        traced = torch.jit.trace(net, IMAGE)
    before = calls()
    assert torch.allclose(traced(IMAGE), expected)
    assert calls() == before + 2
    scripted = torch.jit.script(net)
    assert torch.allclose(scripted(IMAGE), expected)
    assert calls() == before + 4


def test_a_model_traced_before_arrives_too():
    net = model()
    traced = natively(lambda: torch.jit.trace(net, IMAGE))
    traced(IMAGE)
    assert calls() == 2


def test_gradcheck_and_gradgradcheck():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(x, w, b):
        return F.conv2d(x, w, b, stride=2, padding=1)

    assert torch.autograd.gradcheck(call, (x, w, b))
    assert torch.autograd.gradgradcheck(call, (x, w, b))


def test_forward_mode():
    import torch.autograd.forward_ad as forward_ad

    net, tangent = model(), torch.randn_like(IMAGE)

    def derivative():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(net(forward_ad.make_dual(IMAGE, tangent))).tangent

    assert torch.allclose(derivative(), natively(derivative))


@torch2
def test_vmap_and_hessian():
    from torch.func import hessian, vmap

    weights = torch.randn(5, 4, 3, 3, 3, dtype=torch.float64)

    def per_weight():
        return vmap(lambda w: F.conv2d(IMAGE, w))(weights)

    def second():
        return hessian(lambda x: F.conv2d(x, weights[0]).pow(3).sum())(IMAGE[:1, :, :4, :4])

    for function in (per_weight, second):
        before = calls()
        ours = function()
        assert calls() > before
        assert torch.allclose(ours, natively(function))


@torch2
def test_compiled_and_exported_models_arrive():
    net = model().float()
    image = IMAGE.float().requires_grad_()
    expected = natively(lambda: net(image))
    compiled = torch.compile(net, fullgraph=True)
    before = calls()
    out = compiled(image)
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    assert calls() > before and calls("grad_weight") > 0
    exported = torch.export.export(net.eval(), (image.detach(),)).module()
    before = calls()
    assert torch.allclose(exported(image.detach()), expected, atol=1e-6)
    assert calls() == before + 2


@torch2
def test_fake_and_meta_tensors_are_untouched():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        out = F.conv2d(torch.empty(2, 3, 8, 8), torch.empty(4, 3, 3, 3))
        assert out.shape == (2, 4, 6, 6)
    assert F.conv2d(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")).is_meta
    assert calls() == 0


def test_a_checkpointed_threaded_training_step():
    """Autograd's worker thread reaches us as well as the main one."""
    from torch.utils.checkpoint import checkpoint

    net = model()
    image = IMAGE.clone().requires_grad_()

    def step():
        image.grad = None
        options = {} if torch.__version__.startswith("1.") else {"use_reentrant": False}
        checkpoint(net, image, **options).sum().backward()
        return image.grad.clone()

    assert torch.allclose(step(), natively(step))


def test_complex_convolutions_equal_native():
    x = torch.randn(2, 3, 6, 6, dtype=torch.complex64)
    w = torch.randn(4, 3, 3, 3, dtype=torch.complex64)
    assert torch.allclose(F.conv2d(x, w), natively(lambda: F.conv2d(x, w)), atol=1e-5)


def test_the_second_call_does_nothing_and_other_arguments_warn(caplog):
    first = ACTIVE["CPU"]
    with caplog.at_level(logging.WARNING, "rocm_patch"):
        assert rocm_patch.enable_miopen_bypass(backend="cpu")
        assert ACTIVE["CPU"] is first and not caplog.records
        assert rocm_patch.enable_miopen_bypass("im2col", backend="cpu")
    assert len(caplog.records) == 1
    assert ACTIVE["CPU"].routes.chooser.preferred == "im2col"


def test_reverting_gives_aten_back():
    dispatcher = ACTIVE["CPU"]
    rocm_patch.disable_all_patches()
    F.conv2d(torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3, requires_grad=True)).sum().backward()
    assert dispatcher.routes.taken() == [] and ACTIVE == {}


def test_another_packages_override_is_reported_or_replaced_never_half_way():
    """Some torch releases refuse a second Python kernel for an operator (1.13, 2.11), some take it (2.13)."""
    code = """
import torch, rocm_patch
library = torch.library.Library("aten", "IMPL")
library.impl("convolution_backward", lambda *a: None, "CPU")
entry = rocm_patch.enable_miopen_bypass(backend="cpu")
torch.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))
served = "no convolution was served" not in rocm_patch.bypass_report()
assert served == bool(entry) == bool(rocm_patch.patch_status()["miopen_bypass"]), entry
assert entry or "another package" in entry.why, entry
"""
    python("-c", code)


def test_no_warning_reaches_the_user():
    code = (
        "import torch, rocm_patch\n"
        "for _ in range(3):\n"
        "    rocm_patch.enable_miopen_bypass(backend='cpu'); rocm_patch.disable_all_patches()\n"
        "rocm_patch.enable_miopen_bypass(backend='cpu')\n"
        "m = torch.nn.Conv2d(1, 1, 3)\n"
        "torch.jit.trace(m, torch.randn(1, 1, 5, 5))(torch.randn(1, 1, 5, 5)).sum().backward()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        env=clean_environ(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""


def test_the_override_needs_nothing_that_windows_lacks():
    """Without fork, file locks, sysconf and the like: convolutions are served, and nothing is guarded."""
    code = (
        "import os, signal, sys, torch, torch.nn.functional as F\n"
        "torch.set_num_threads(1)\n"
        "sys.platform = 'win32'\n"
        "for module in ('fcntl', 'resource', 'pty', 'termios'): sys.modules[module] = None\n"
        "for name in ('fork', 'register_at_fork', 'killpg', 'posix_fallocate', 'pidfd_open', 'waitid'):\n"
        "    delattr(os, name)\n"
        "for name in ('SIGKILL', 'SIGBUS', 'SIGHUP', 'SIGTRAP', 'SIGQUIT', 'SIGUSR1'): delattr(signal, name)\n"
        "import rocm_patch\n"
        "from rocm_patch.overrides.aten import ACTIVE\n"
        "for policy in ('bypass', 'guarded'):\n"
        "    assert rocm_patch.enable_miopen_bypass(policy, backend='cpu')\n"
        "    x = torch.ones(1, 2, 5, 5, requires_grad=True)\n"
        "    F.conv2d(x, torch.ones(3, 2, 3, 3)).sum().backward()\n"
        "    assert len(ACTIVE['CPU'].routes.taken()) == 2\n"
        "    rocm_patch.disable_all_patches()\n"
    )
    python("-c", code)


def test_operators_that_name_miopen_are_served_under_bypass():
    """On the CPU they have no kernel of their own, so what answers is ours."""
    x, w, b = torch.randn(2, 4, 7, 6, requires_grad=True), torch.randn(6, 4, 3, 3), torch.randn(6)
    geometry = ([1, 0], [2, 1], [1, 1], 1)  # padding, stride, dilation, groups
    plain = natively(lambda: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 0)))
    aten = torch.ops.aten
    ours = aten.miopen_convolution(x, w, b, *geometry, False, False)
    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (ours, plain)), atol=1e-3)
    fused = aten.miopen_convolution_relu(x.detach(), w, b, [2, 1], [1, 0], [1, 1], 1)
    assert torch.allclose(fused, plain.relu(), atol=1e-5)
    z = torch.randn_like(plain)
    added = aten.miopen_convolution_add_relu(x.detach(), w, z, 0.5, b, [2, 1], [1, 0], [1, 1], 1)
    assert torch.allclose(added, (plain + 0.5 * z).relu(), atol=1e-5)
    back = aten.miopen_convolution_transpose(plain.detach(), w, None, [1, 0], [0, 0], *geometry[1:], False, False)
    assert torch.allclose(back, F.conv_transpose2d(plain, w, None, (2, 1), (1, 0)), atol=1e-4)
    depthwise = torch.randn(4, 1, 3, 3)
    ours = aten.miopen_depthwise_convolution(x, depthwise, None, *geometry[:3], 4, False, False)
    assert torch.allclose(ours, F.conv2d(x, depthwise, None, (2, 1), (1, 0), 1, 4), atol=1e-5)
    rocm_patch.disable_all_patches()
    with pytest.raises(NotImplementedError):
        torch.ops.aten.miopen_convolution(x, w, b, *geometry, False, False)


def test_miopens_batch_norm_is_natives_under_bypass():
    made = {}
    for which in ("miopen", "native"):
        torch.manual_seed(0)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
        running = torch.zeros(3), torch.ones(3)
        if which == "miopen":
            out = torch.ops.aten.miopen_batch_norm(x, weight, bias, *running, True, 0.1, 1e-5)[0]
        else:
            out = F.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5)
        out.pow(3).sum().backward()
        made[which] = (out, x.grad, weight.grad, bias.grad, *running)
    for ours, natives in zip(*made.values(), strict=True):
        assert torch.allclose(ours, natives, atol=1e-5)

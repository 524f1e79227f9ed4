"""What each box of the document's checklist does, in a process of its own under the program's Python.

torch is imported inside the functions: its import is itself a box, and the first two must come before it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rocm_patch.machine import environment
from rocm_patch.tools import box_process
from rocm_patch.tools.box_process import Failed, Here, NotRun, expect, tolerances, trying

TORCH_IMPORTS = "torch imports"


def _start_method() -> str:
    from rocm_patch.api import setup_multiprocessing

    here = Here.read()
    here.must_be_on()
    asked = here.settings.start_method
    if asked not in (None, "spawn"):
        raise NotRun(f"the start method {asked} was asked for, this box is about spawn")
    said, method = setup_multiprocessing(), multiprocessing.get_start_method()
    expect(said and method == "spawn", f"setup_multiprocessing() says {said}, and get_start_method() {method}")
    reader, writer = multiprocessing.Pipe(duplex=False)
    # A builtin is the target: with pipx the child's Python cannot import this module.
    code = f"import sys; connection.send({__name__!r} in sys.modules)"
    child = multiprocessing.Process(target=exec, args=(code, {"connection": writer}))
    child.start()
    child.join()
    expect(child.exitcode == 0 and reader.poll(), f"a spawned process ended with exit code {child.exitcode}")
    expect(not reader.recv(), "a child process has its parent's modules: it was forked")
    return "spawn, and a child process started afresh"


def _variables() -> str:
    here = Here.read()
    here.must_be_on()
    # The plan depends on what it finds, so it is made again from what the launch has found.
    found = {name: value for name, value in os.environ.items() if name not in box_process.launch_variables}
    changes = environment.plan(here.machine, here.build, here.settings, found).changes
    missing = [change.name for change in changes if change.changes and os.environ.get(change.name) != change.value]
    expect(not missing, f"planned, but not so in the program's environment: {', '.join(missing)}")
    if not changes:
        return "this machine needs none" if here.settings.profile != "none" else "profile none asks for none"
    own = [change for change in changes if change.found not in (None, change.value)]
    kept = [f"{change.name}={change.found} is the user's own, {change.value} was planned" for change in own]
    return "; ".join([f"{len(changes) - len(own)} as planned", *kept])


def _torch_imports() -> str:
    start = time.perf_counter()
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Failed(f"{sys.executable} has no torch") from error
    return f"torch {torch.__version__} from {Path(torch.__file__).parent} in {time.perf_counter() - start:.1f} s"


def _gpu() -> str:
    here = Here.read()
    here.must_want_gpu()
    import torch

    from rocm_patch.conv.strategy import GEMM_RTOL

    if not torch.cuda.is_available():
        kind = f"torch {torch.__version__}, a {here.build.kind if here.build else 'broken'} build, sees no GPU"
        if here.machine.gpus:
            chips = ", ".join(gpu.gfx for gpu in here.machine.gpus)
            raise Failed(f"{kind}, and this machine has {chips}; next: rocm-patch doctor")
        if here.machine.can_have_amd_gpu and torch.version.hip:
            raise Failed(f"{kind}, and the driver's device file is here; next: rocm-patch doctor")
        raise NotRun(f"{kind}, and no AMD GPU is listed")
    torch.backends.cuda.matmul.allow_tf32 = False  # the default, but NVIDIA's containers set a variable
    name = torch.cuda.get_device_name()
    trying(f"a matrix product on {name}")
    first, second = torch.randn(2, 96, 96)
    product = (first.cuda() @ second.cuda()).cpu()
    error = tolerances(product, first.double() @ second.double(), GEMM_RTOL["float32"], "a matrix product")
    return f"{name}; a matrix product agrees with float64, error {error:.3f} of the tolerance"


def _safe_conv2d() -> str:
    import torch

    from rocm_patch.conv.cases import CASES

    device = Here.read().device()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    cases = [case for case in CASES if len(case.stride) == 2]
    large = next(case for case in cases if case.image[2:] == (42, 42))
    cases.append(replace(large, why="44x44, likewise", image=(*large.image[:2], 44, 44)))
    dtypes = ("float32", "float16") if device == "cuda" else ("float32",)
    error, where = max(_safe_error(case, dtype, device) for dtype in dtypes for case in cases)
    count = f"{len(cases) * len(dtypes)} cases on {device} in {' and '.join(dtypes)}"
    return f"{count}; the largest error is {error:.3f} of the tolerance ({where})"


def _safe_error(case: Any, dtype: str, device: str) -> tuple[float, str]:
    """The largest error of one case's output and gradients in units of the tolerance, and whose it is."""
    import torch

    from rocm_patch.conv import NATIVE, native
    from rocm_patch.conv.spec import DIRECTIONS
    from rocm_patch.overrides import aten, bypassed, modules

    trying(f"{case.why}, {dtype} on {device}")
    sizes = (case.image[1], case.weight[0], case.weight[2:])
    layer: Any = modules.SafeConv2d(*sizes, case.stride, case.padding, case.dilation, case.groups)
    layer.to(device, getattr(torch, dtype))
    image = torch.randn(case.image).to(layer.weight).requires_grad_()
    out = layer(image)
    grad = torch.randn(out.shape).to(out)
    out.backward(grad)

    # The truth comes from aten's own kernels on the CPU, beneath any override.
    x, w, b, g = (tensor.detach().cpu().double() for tensor in (image, layer.weight, layer.bias, grad))
    geometry = [list(case.stride), list(case.padding), list(case.dilation), False, [0, 0], case.groups]
    with torch.no_grad():
        exact = native.convolution(x, w, b, *geometry, False, False, True, True)
        exact_grads = native.convolution_backward(g, x, w, list(b.shape), *geometry, [True, True, True])

    routes = [route for part in (*aten.ACTIVE.values(), *bypassed.dispatchers()) for route in part.routes.taken()]
    by_spec = {replace(route.spec, device="cpu", channels_last=False): route.strategy for route in routes}
    served = [by_spec.get(case.spec(direction, dtype)) for direction in DIRECTIONS]
    results: Any = (out.detach(), image.grad, layer.weight.grad, layer.bias.grad)
    errors = []
    for index, what in enumerate((*DIRECTIONS, "grad_bias")):
        where = f"{what} of {case.why}, {dtype}"
        strategy = served[index % 3]
        if strategy is None or strategy is NATIVE:
            raise Failed(f"{where} was not served by a strategy of ours")
        error = tolerances(results[index].cpu(), (exact, *exact_grads)[index], strategy.rtol[dtype], where)
        errors.append((error, where))
    return max(errors)


class Samples:
    """32 pictures, made on `device`, that show their own number; each with its process and how that was started."""

    METHODS = ("the program itself", "fork", "spawn", "forkserver")

    def __init__(self, device: str) -> None:
        self.device = device
        self.program = os.getpid()

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Any, int, int, int]:
        import torch

        picture = torch.full((3, 8, 8), index / 2, device=self.device) * 2
        return picture.cpu(), index, os.getpid(), self.METHODS.index(self._started_by())

    def _started_by(self) -> str:
        if os.getpid() == self.program:
            return "the program itself"
        if box_process.box_process is not None:
            return "fork"
        return "spawn" if os.getppid() == self.program else "forkserver"


def _load(workers: int, made_on: str, moved_to: str) -> str:
    """Two epochs of a DataLoader; says how the processes were started that the samples came from."""
    import torch
    from torch.utils.data import DataLoader

    from rocm_patch.api import patch_dataloader

    patch_dataloader()  # as the document's programs do; without effect under ROCM_PATCH=0
    samples: Any = Samples(made_on)
    loader = DataLoader(samples, batch_size=4, shuffle=True, num_workers=workers)
    processes, methods = set(), set()
    for epoch in (1, 2):
        trying(f"epoch {epoch} with {workers} workers")
        arrived: list[int] = []
        for pictures, indices, pids, started in loader:
            pictures = pictures.to(moved_to)
            expected = indices.to(pictures).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
            expect(torch.equal(pictures, expected), f"samples {indices.tolist()} arrived with wrong values")
            arrived += indices.tolist()
            processes.update(pids.tolist())
            methods.update(started.tolist())
        expect(sorted(arrived) == list(range(32)), f"not every sample arrived once in epoch {epoch}: {arrived}")
    # Workers that are not kept are others in the second epoch.
    expect(len(processes) in (max(workers, 1), 2 * workers), f"the samples came from {len(processes)} processes")
    return " and ".join(samples.METHODS[method] for method in sorted(methods))


def _loader(workers: int) -> str:
    device = Here.read().device()
    made = _load(workers, "cpu", device)
    by = f"{workers} workers started by {made}" if workers else made
    return f"32 samples from {by}, each once in both epochs, moved to {device}"


def _training() -> str:
    """Horizontal against vertical bars: no single pixel tells them apart, a convolution does."""
    import torch
    from torch import nn

    device = Here.read().device()
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 16, 16) * 0.2, torch.arange(64) % 2
    for image, label, place in zip(images, labels, torch.randint(16, (64,)), strict=True):
        (image[0] if label else image[0].T)[place] += 1
    images, labels = images.to(device), labels.to(device)
    features = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for step in range(40):
        trying(f"step {step + 1} on {device}")
        loss: Any = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expect(all(map(math.isfinite, losses)), f"the loss is not finite: {losses}")
    first, last = losses[0], max(losses[-5:])
    expect(last < 0.2 * first, f"the loss fell from {first:.3f} to {last:.3f} only, not below a fifth")
    return f"40 steps on {device}: the loss fell from {first:.3f} to {last:.3f}, a fifth was asked for"


def _gpu_in_workers() -> str:
    here = Here.read()
    here.must_be_on()
    here.must_want_gpu()
    import torch

    if not torch.cuda.is_available():
        raise NotRun("torch sees no GPU, and a forked worker that stays on the CPU cannot show the error")
    torch.ones(1, device="cuda").sum().item()
    method = _load(2, "cuda", "cuda")
    return f"2 workers started by {method} made 32 samples on {torch.cuda.get_device_name()}, in use by the program"


def _bypass() -> str:
    activation = Here.read().activation
    key = activation.dispatch_key
    if key is None:
        force = "" if "ROCM_PATCH=0" in activation.why else "; to force it: rocm-patch verify --backend cpu"
        raise NotRun(f"the override is off here: {activation.why}{force}")
    if activation.policy == "native":
        raise NotRun("the policy native was asked for, which bypasses nothing")
    import torch
    from torch import nn

    from rocm_patch.api import patch_status
    from rocm_patch.conv import NATIVE
    from rocm_patch.overrides import aten

    if key == "CUDA" and not torch.cuda.is_available():
        raise NotRun(f"the override is for {activation.backend}, and torch sees no GPU")
    expect(key in aten.ACTIVE, f"the override is not in force: {patch_status()['miopen_bypass'].why}")
    device = key.lower()
    trying(f"two nn.Conv2d on {device}")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).to(device)
    result: Any = model(torch.randn(2, 3, 42, 42, device=device, requires_grad=True))
    result.square().mean().backward()
    routes = aten.ACTIVE[key].routes.taken()
    calls = sum(route.calls for route in routes)
    natively = sum(route.calls for route in routes if route.strategy is NATIVE)
    used = ", ".join(sorted({route.strategy.name for route in routes}))
    counted = f"{calls - natively} of {calls} calls bypassed, {natively} native ({used})"
    expect(calls == 6, f"two layers in three directions make 6 calls, and the override saw {counted}")
    expect(natively == 0 or activation.policy != "bypass", f"{counted}, under the policy bypass")
    return f"{counted}, under the policy {activation.policy}"


# The document's words, shortened, in its order. The names are part of the JSON document and stay for ever.
BOXES: dict[str, Callable[[], str]] = {
    "start method is spawn": _start_method,
    "environment variables set": _variables,
    TORCH_IMPORTS: _torch_imports,
    "GPU available": _gpu,
    "SafeConv2d works": _safe_conv2d,
    "DataLoader with 0 workers": partial(_loader, 0),
    "DataLoader with 4 workers": partial(_loader, 4),
    "training loop completes": _training,
    "no initialisation error in workers": _gpu_in_workers,
    "bypass in use": _bypass,
}

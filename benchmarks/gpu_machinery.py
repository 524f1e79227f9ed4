"""The convolution override under PyTorch's machinery on a real GPU: what a CPU cannot show; writes one JSON file.

    python benchmarks/gpu_machinery.py OUT.json

Needs a CUDA or ROCm build of torch 2.x with a visible GPU, and a C++ compiler. On an NVIDIA GPU, cuDNN stands in for
MIOpen. Every check trains or runs natively and under the override and compares, and asserts that no convolution was
served natively. What does not work natively on the machine, and what wants two GPUs where there is one, is recorded
as "not run". Exits 1 if anything that is asserted here does not hold. `--device cpu` runs what does not need a GPU,
to try the script itself.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import nn

import rocm_patch
from rocm_patch.overrides.aten import ACTIVE

DEVICE = "cuda"


def backend() -> str:
    if DEVICE == "cpu":
        return "cpu"
    return "hip" if torch.version.hip else "cuda"


def off() -> None:
    rocm_patch.disable_all_patches()


def on() -> None:
    off()
    assert rocm_patch.enable_miopen_bypass(backend=backend())


def served() -> dict[str, int]:
    """Calls by direction since on(); none of them may have been native."""
    found = dict.fromkeys(("forward", "grad_input", "grad_weight"), 0)
    for route in ACTIVE["CPU" if DEVICE == "cpu" else "CUDA"].routes.taken():
        assert route.strategy.name != "native", route
        found[route.spec.direction] += route.calls
    return found


@contextmanager
def overridden() -> Iterator[None]:
    """The override on inside, and off afterwards; it must have served something."""
    on()
    try:
        yield
        assert sum(served().values()) > 0, "nothing was served"
    finally:
        off()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def needs_gpu() -> None:
    if DEVICE == "cpu":
        raise harness.NotRunError("needs a GPU")


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    result, expected = result.detach().double().cpu(), expected.detach().double().cpu()
    return float((result - expected).norm() / expected.norm().clamp_min(1e-30))


def worst(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    for one, other in zip(results, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    return max(relative(one, other) for one, other in zip(results, expected, strict=True))


class Network(nn.Module):
    """Plain, strided, grouped, pointwise and transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=4), nn.SiLU(),
            nn.Conv2d(width, width, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, 4, 3, stride=2, padding=1, output_padding=1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def network() -> Network:
    return Network().to(DEVICE)


def images(batch: int = 8, size: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def step(run: Callable[[torch.Tensor], torch.Tensor], net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and the gradients of all parameters; run is net, or what was made of it."""
    net.zero_grad(set_to_none=True)
    out = run(x)
    out.float().square().mean().backward()
    gradients = [p.grad.detach().clone() for p in net.parameters() if p.grad is not None]
    return [out.detach().clone(), *gradients]


def check_cuda_graphs() -> dict[str, Any]:
    """A captured training step replays as eager steps do; so does a model of make_graphed_callables."""
    needs_gpu()

    def eager() -> list[torch.Tensor]:
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for turn in range(4):
            optimizer.zero_grad()
            net(images(seed=turn)).square().mean().backward()
            optimizer.step()
        return list(net.parameters())

    def captured() -> list[torch.Tensor]:
        net = network()
        start = copy.deepcopy(net.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        x = images(seed=0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        net.load_state_dict(start)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            net(x).square().mean().backward()
            optimizer.step()
        for turn in range(4):
            x.copy_(images(seed=turn))
            graph.replay()
        return list(net.parameters())

    def graphed() -> list[torch.Tensor]:
        net = network()
        sample = images(seed=9).requires_grad_()
        replayed = torch.cuda.make_graphed_callables(net, (sample,))
        return step(replayed, net, images(seed=2).requires_grad_())

    def unseen() -> list[torch.Tensor]:
        """Captured with no call before; the shapes run eagerly once the graph and its memory are gone."""
        net, x = network(), images(5, 28, seed=7)
        torch.eye(2, device=x.device) @ torch.eye(2, device=x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            out = net(x)
        graph.replay()
        replayed = out.clone()
        del graph, out
        gc.collect()
        torch.cuda.empty_cache()
        with torch.no_grad():
            return [replayed, net(x)]

    native = eager()
    native_step = step(net := network(), net, images(seed=2))
    with torch.no_grad():
        native_unseen = net(images(5, 28, seed=7))
    errors = {}
    with overridden():
        errors["captured with no call before"] = worst(unseen(), [native_unseen, native_unseen])
    with overridden():
        errors["eager"] = worst(eager(), native)
        errors["captured"] = worst(captured(), native)
        errors["make_graphed_callables"] = worst(graphed(), native_step)
    assert max(errors.values()) < 1e-4, errors
    return {"relative_errors": errors}


def check_mixed_precision() -> dict[str, Any]:
    """20 steps of autocast and GradScaler, contiguous and channels_last: losses stay by native's."""

    def losses(dtype: torch.dtype, memory_format: torch.memory_format) -> list[float]:
        net = network().to(memory_format=memory_format)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
        seen = []
        for turn in range(20):
            x = images(seed=turn % 4).contiguous(memory_format=memory_format)
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=dtype):
                out = net(x)
                assert out.dtype == dtype
                loss = F.mse_loss(out.float(), x.mean(1, keepdim=True).expand_as(out))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(float(loss))
        return seen

    report = {}
    for dtype, limit in ((torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            native = losses(dtype, memory_format)
            with overridden():
                ours = losses(dtype, memory_format)
            drift = max(abs(a - b) / a for a, b in zip(native, ours, strict=True))
            report[f"{dtype} {memory_format}"] = {"drift": drift, "first": native[0], "last": [native[-1], ours[-1]]}
            assert drift < limit and ours[-1] < ours[0], report
    return report


def check_inductor() -> dict[str, Any]:
    """Inductor by default, with CUDA graphs, and on channels_last: three training steps each."""
    report = {}
    for name, options, memory_format in (
        ("default", {"fullgraph": True}, torch.contiguous_format),
        ("reduce-overhead", {"mode": "reduce-overhead"}, torch.contiguous_format),
        ("channels_last", {"fullgraph": True}, torch.channels_last),
    ):
        torch._dynamo.reset()
        net = network().to(memory_format=memory_format)
        inputs = [images(seed=seed).contiguous(memory_format=memory_format) for seed in range(5)]
        native = [step(net, net, x) for x in inputs]
        with overridden():
            compiled = torch.compile(net, **options)
            ours = []
            for x in inputs:
                torch.compiler.cudagraph_mark_step_begin()
                ours.append(step(compiled, net, x))
            calls = served()
        error = max(worst(one, other) for one, other in zip(ours, native, strict=True))
        same_strides = ours[0][0].stride() == native[0][0].stride()
        report[name] = {"relative_error": error, "calls": calls, "strides_equal": same_strides}
        assert error < 1e-4, report
        assert calls["grad_weight"] > 0 and (name == "reduce-overhead" or calls["grad_weight"] == 4 * len(inputs)), (
            report
        )
    torch._dynamo.reset()
    return report


def check_dynamic_shapes() -> dict[str, Any]:
    """dynamic=True over batch and image sizes: as many compilations as natively."""
    from torch._dynamo.testing import CompileCounterWithBackend

    net = network()
    inputs = [images(batch, size) for batch, size in ((4, 16), (6, 16), (4, 24), (7, 20))]
    eager = [step(net, net, x) for x in inputs]

    def run() -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
        for x, expected in zip(inputs, eager, strict=True):
            assert worst(step(compiled, net, x), expected) < 1e-4
        return int(counter.frame_count)

    native = run()
    with overridden():
        ours = run()
        calls = served()
    torch._dynamo.reset()
    assert ours == native, (ours, native)
    assert calls["grad_weight"] == 4 * len(inputs), calls
    return {"compilations": {"native": native, "ours": ours}, "calls": calls}


def natively_first(run: Callable[[], Any]) -> Any:
    """The result without the override; what fails there is no affair of ours."""
    try:
        return run()
    except Exception as error:
        raise harness.NotRunError(
            f"fails natively on this machine: {type(error).__name__}: {str(error)[:800]}"
        ) from error


def check_cpp_wrapper() -> dict[str, Any]:
    """cpp_wrapper's forward is served; its backward is right, and whether it is served is recorded."""
    x = images()

    def run() -> list[torch.Tensor]:
        torch._dynamo.reset()
        net = network()
        with torch._inductor.config.patch(cpp_wrapper=True):
            return step(torch.compile(net, fullgraph=True), net, x)

    native = natively_first(run)
    with overridden():
        ours = run()
        calls = served()
    torch._dynamo.reset()
    error = worst(ours, native)
    assert error < 1e-4, error
    assert calls["forward"] >= 2 and calls["grad_input"] >= 1, calls
    return {"relative_error": error, "calls": calls, "backward_is_served": calls["grad_weight"] > 0}


DETERMINISTIC = """
import hashlib, sys, torch
from torch import nn
torch.use_deterministic_algorithms(True)
device, backend = sys.argv[1:]
if backend != "native":
    import rocm_patch
    assert rocm_patch.enable_miopen_bypass(backend=backend)

def trained():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 3, stride=2),
    ).to(device)
    x, seen = torch.randn(4, 3, 20, 20).to(device), hashlib.sha256()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        net, x = net.to(dtype), x.to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            out = net(x)
            out.float().square().mean().backward()
            for tensor in (out, *(p.grad for p in net.parameters())):
                assert bool(tensor.isfinite().all())
                seen.update(str(tensor.detach().double().flatten().tolist()).encode())
            optimizer.step()
    return seen.hexdigest()

print(*[trained() for _ in range(3)])
if backend != "native":
    from rocm_patch.overrides.aten import ACTIVE
    assert all(route.strategy.name != "native" for d in ACTIVE.values() for route in d.routes.taken())
    assert any(d.routes.taken() for d in ACTIVE.values())
"""


def run_program(text: str, *arguments: str, **environ: str | None) -> subprocess.CompletedProcess[str]:
    """A program from a file in a fresh process; a variable that is None is not set."""
    names = {**os.environ, **environ}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(text)
        return subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=240,
            env={name: value for name, value in names.items() if value is not None},
        )  # fmt: skip


AHEAD_OF_TIME = """
import sys
sys.path.insert(0, sys.argv[4])
import torch
import gpu_machinery
device, chosen, folder, _ = sys.argv[1:]
gpu_machinery.DEVICE = device
net, x = gpu_machinery.network().eval().requires_grad_(False), gpu_machinery.images()
path, calls = folder + "/model.pt2", {}
exported = torch.export.export(net, (x,))
if chosen == "native":
    torch._inductor.aoti_compile_and_package(exported, package_path=path)
else:
    gpu_machinery.on()
out = torch._inductor.aoti_load_package(path)(x)
if chosen != "native":
    calls = gpu_machinery.served()
    again = exported.module()(x)
    assert gpu_machinery.relative(again, out) < 1e-4
torch.save((out.cpu(), out.stride(), net(x).cpu(), calls), folder + "/" + chosen + ".pt")
"""


def check_aot_inductor() -> dict[str, Any]:
    """A package that AOTInductor made natively runs with its convolutions served; each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for chosen in ("native", backend()):
            done = run_program(AHEAD_OF_TIME, DEVICE, chosen, folder, str(Path(__file__).resolve().parent))
            if done.returncode and chosen == "native":
                raise harness.NotRunError(
                    f"fails natively here (exit code {done.returncode}): {done.stderr.strip()[-300:]}"
                )
            assert done.returncode == 0, done.stderr[-2000:]
            made[chosen] = torch.load(Path(folder) / f"{chosen}.pt")
    (_, strides, expected, _), (ours, our_strides, _, calls) = made.values()
    assert our_strides == strides
    error = relative(ours, expected)
    assert error < 1e-4, error
    assert calls["forward"] >= 2 and calls["grad_input"] >= 1, calls
    return {"relative_error": error, "calls": calls}


def check_deterministic_algorithms() -> dict[str, Any]:
    """Convolutions train in deterministic mode bit for bit, with CUBLAS_WORKSPACE_CONFIG and without it."""

    def run(chosen: str, config: str | None) -> dict[str, Any]:
        done = run_program(DETERMINISTIC, DEVICE, chosen, CUBLAS_WORKSPACE_CONFIG=config)
        hashes = done.stdout.split()
        return {
            "exit_code": done.returncode,
            "equal": len(hashes) == 3 and len(set(hashes)) == 1,
            "hash": hashes[:1],
            "error": done.stderr[-1500:] if done.returncode else "",
        }

    choices = [("native", None), (backend(), None), (backend(), ":4096:8")]
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda choice: run(*choice), choices))
    report = {f"{chosen}, {config or 'not set'}": row for (chosen, config), row in zip(choices, rows, strict=True)}
    assert all(row["equal"] for row in rows), report
    return report


def vendor_events(run: Callable[[], Any]) -> list[str]:
    """What the profiler sees of the vendor's library."""
    run()
    synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        run()
        synchronize()
    names = {event.name for event in profile.events()}
    return sorted(n for n in names if ("cudnn" in n.lower() or "miopen" in n.lower()) and "is_acceptable" not in n)


def check_norms_and_rnns() -> dict[str, Any]:
    """BatchNorm, LSTM, GRU and RNN train as with the vendor's library, and none of its kernels runs."""

    def build(kind: str) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        if kind == "BatchNorm2d":
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), images().cpu()
        if kind == "BatchNorm3d":
            return nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), torch.randn(3, 2, 6, 6, 6)
        return getattr(nn, kind)(12, 16, num_layers=2, bidirectional=True, batch_first=True), torch.randn(5, 9, 12)

    def trained(kind: str) -> tuple[list[torch.Tensor], list[str]]:
        net, x = build(kind)
        net, x = net.to(DEVICE).train(), x.to(DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

        def one() -> torch.Tensor:
            out = net(x)
            out = out[0] if isinstance(out, tuple) else out
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            return out.detach()

        for _ in range(5):
            one()
        buffers = [b for b in net.buffers() if b.is_floating_point()]
        values = [t.detach().clone() for t in (*net.parameters(), *buffers)]
        evaluated = net.eval()(x)
        values.append((evaluated[0] if isinstance(evaluated, tuple) else evaluated).detach())
        net.train()
        return values, vendor_events(one)

    report: dict[str, Any] = {}
    for kind in ("BatchNorm2d", "BatchNorm3d", "LSTM", "GRU", "RNN"):
        native, native_events = trained(kind)
        on()
        ours, events = trained(kind)
        calls = served()
        off()
        report[kind] = {"relative_error": worst(ours, native), "native_events": native_events, "ours": events}
        assert report[kind]["relative_error"] < 1e-3, report[kind]
        assert not events, report[kind]
        assert native_events or DEVICE == "cpu", (
            "the profiler saw no vendor kernel natively: it would see none at all"
        )
        assert (sum(calls.values()) > 0) == kind.startswith("BatchNorm"), calls
    return report


def check_streams() -> dict[str, Any]:
    """Training steps on a side stream, and on two streams at once, 50 times; memory is reused in between."""
    needs_gpu()
    net = network()
    inputs = [images(16, 32, seed) for seed in range(2)]
    native = [step(net, net, x) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    error = 0.0
    with overridden():
        for _ in range(50):
            outs = []
            for stream, x in zip(streams, inputs, strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    own = copy.deepcopy(net)
                    outs.append(step(own, own, x))
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)
            error = max(error, *(worst(one, other) for one, other in zip(outs, native, strict=True)))
            del outs
    assert error < 1e-4, error
    return {"relative_error": error}


def check_torch_func() -> dict[str, Any]:
    """Gradients per sample, jvp, Jacobians and a Hessian."""
    from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

    net, x = network(), images(6, 12)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return functional_call(net, parameters, (one.unsqueeze(0),)).square().sum()

    small, weight = images(1, 5), parameters["layers.0.weight"][:2]

    def conv(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight).pow(3)

    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        "per sample": lambda: list(vmap(grad(loss), in_dims=(None, 0))(parameters, x).values()),
        "jvp": lambda: list(jvp(conv, (small,), (small,))),
        "jacrev": lambda: [jacrev(conv)(small)],
        "jacfwd": lambda: [jacfwd(conv)(small)],
        "hessian": lambda: [hessian(lambda x: conv(x).sum())(small)],
    }
    errors = {}
    for name, way in ways.items():
        native = way()
        with overridden():
            errors[name] = worst(way(), native)
    with overridden():
        together = ways["per sample"]()
        each = [list(grad(loss)(parameters, one).values()) for one in x]
        errors["per sample against one by one"] = worst(together, [torch.stack(g) for g in zip(*each, strict=True)])
    assert max(errors.values()) < 1e-4, errors
    return {"relative_errors": errors}


DISTRIBUTED = """
import os, sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3))

def trained(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]

def work(rank, folder, device):
    where = "cpu" if device == "cpu" else f"cuda:{rank}"
    if device != "cpu":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=2)
    x = torch.load(f"{folder}/x.pt")[rank::2].to(where)
    options = ({}, {"gradient_as_bucket_view": True}, {"static_graph": True})
    results = [trained(DistributedDataParallel(network().to(where), **o), x) for o in options]
    from rocm_patch.overrides.aten import ACTIVE
    routes = [route for dispatcher in ACTIVE.values() for route in dispatcher.routes.taken()]
    torch.save((results, sorted({r.strategy.name for r in routes})), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)

if __name__ == "__main__":
    mp.spawn(work, sys.argv[1:], nprocs=2)
"""


def check_distributed_data_parallel() -> dict[str, Any]:
    """Two processes with a GPU each under `rocm-patch run` train to what one does natively with the whole batch."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        raise harness.NotRunError("one GPU")
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(DISTRIBUTED)
        x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.save(x, Path(folder) / "x.pt")
        space: dict[str, Any] = {"__name__": "program"}
        exec(DISTRIBUTED, space)
        alone = space["trained"](space["network"]().to(DEVICE), x.to(DEVICE))
        done = subprocess.run(
            [sys.executable, "-m", "rocm_patch", "run", "-q", "--backend", backend(), str(script), folder, DEVICE],
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        for rank in (0, 1):
            results, names[f"strategies of rank {rank}"] = torch.load(Path(folder) / f"{rank}.pt")
            errors = [worst(parameters, alone) for parameters in results]
            names[f"relative errors of rank {rank}"] = errors
            assert max(errors) < 1e-4, names
            assert "native" not in names[f"strategies of rank {rank}"] != [], names
    return names


def check_inference_mode() -> dict[str, Any]:
    """inference_mode and no_grad, with autocast and without."""
    net, x = network().eval(), images()
    errors = {}
    for name, guard in (("inference_mode", torch.inference_mode), ("no_grad", torch.no_grad)):
        for half in (False, True):
            with guard(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
                native = net(x)
                with overridden():
                    ours = net(x)
            assert ours.is_inference() == native.is_inference() and not ours.requires_grad
            assert (ours.dtype, ours.stride()) == (native.dtype, native.stride())
            errors[f"{name}{' bfloat16' if half else ''}"] = relative(ours, native)
            assert errors[f"{name}{' bfloat16' if half else ''}"] < (3e-2 if half else 1e-4), errors
    return {"relative_errors": errors}


def memory_in_use() -> int:
    """Bytes that live tensors hold on the GPU; the resident memory of the process on the CPU."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_memory() -> dict[str, Any]:
    """200 training steps of three sizes in turn hold no more memory than 20 do, and peak no higher."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    inputs = [images(8, size) for size in (16, 24, 33)]

    def steps(count: int) -> tuple[int, int]:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for turn in range(count):
            optimizer.zero_grad(set_to_none=True)
            out = net(inputs[turn % 3])
            (gradient,) = torch.autograd.grad(out.square().mean(), [net.layers[0].weight], create_graph=True)
            (gradient.square().sum() + out.mean()).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del out, gradient
        return memory_in_use(), torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0

    with overridden():
        before, after = steps(20), steps(200)
    report = {"after_20": before[0], "after_220": after[0], "peak_20": before[1], "peak_200": after[1]}
    slack = 0 if DEVICE == "cuda" else 32 << 20
    assert after[0] <= before[0] + slack and after[1] <= 1.01 * before[1], report
    return report


def main() -> int:
    global DEVICE
    parser = harness.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = parser.parse_args()
    DEVICE = chosen.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return harness.run_all(globals(), chosen, DEVICE)


if __name__ == "__main__":
    sys.exit(main())

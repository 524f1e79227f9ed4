"""The guard, the sandbox and the restart on a real GPU, run for real; writes one JSON file.

    python benchmarks/gpu_guard.py OUT.json

Needs a CUDA or ROCm build of torch with a visible GPU. On an NVIDIA GPU, cuDNN stands in for MIOpen. Exits 1 if
anything that is asserted here does not hold. Every failure in every direction is tried by
`rocm-patch demo --faults --backend cuda`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from gpu_strategies import compile_ahead

import rocm_patch
from rocm_patch.child import Child
from rocm_patch.conv import NATIVE, STRATEGIES
from rocm_patch.conv.cases import CASES, Case
from rocm_patch.conv.spec import DIRECTIONS
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.tools import demo
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.sandbox import Sandbox
from rocm_patch.trust.store import Store

BACKEND = "hip" if torch.version.hip else "cuda"
DEVICE = "cuda:0"
SMALL = CASES[3]
# TF32 shows in the first; the second is judged in float64 on the GPU.
LARGER = Case("ResNet", (8, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1))
LARGEST = Case("beyond the CPU", (16, 128, 64, 64), (128, 128, 3, 3), (1, 1), (1, 1), (1, 1))
EXPECTED = {
    "hang": "hang", "segfault": "crash", "abort": "crash", "device": "crash", "error": "error", "memory": "error",
    "nan": "wrong", "wrong": "wrong",
}  # fmt: skip


def gpu_answers() -> float:
    """Seconds until this process's own use of the GPU has come back right."""
    start = time.perf_counter()
    ones = torch.ones(2048, 2048, device=DEVICE)
    assert float((ones @ ones).sum()) == 2048.0**3
    return round(time.perf_counter() - start, 3)


def check_faults_in_the_sandbox() -> dict[str, Any]:
    """Each failure gets its verdict, and this process's GPU answers at once after."""
    still, rows = 4.0, {}
    for kind, expected in EXPECTED.items():
        environ = {**os.environ, "ROCM_PATCH_FAULT": f"{kind}:forward"}
        with Sandbox(DEVICE, Limits(still, 20.0), environ, cool_down=0.01) as sandbox:
            other = sandbox.prove(SMALL.spec("grad_input", "float32", DEVICE).to_json(), "native")
            assert other.kind == "ok", other
            start = time.perf_counter()
            trial = sandbox.prove(SMALL.spec("forward", "float32", DEVICE).to_json(), "native")
            took = time.perf_counter() - start
            assert trial.kind == expected, trial
            assert sandbox.device_usable
            assert not sandbox.left_behind
            rows[kind] = {"took_s": round(took, 2), "gpu_answers_after_s": gpu_answers()}
    return {"limit_s": still, "faults": rows}


def check_an_endless_kernel_dies_with_its_process() -> dict[str, Any]:
    """From SIGKILL at a process with an endless kernel until it is gone, and until another has used the GPU."""
    environ = {**os.environ, "ROCM_PATCH": "0", "ROCM_PATCH_FAULT": "hang:forward"}
    child = Child(sys.executable, "rocm_patch.trust.trial", [DEVICE], environ)
    asked, called, end = False, False, time.monotonic() + 120
    spec = SMALL.spec("forward", "float32", DEVICE).to_json()
    while not called and time.monotonic() < end:
        line = child.line() or {}
        if line.get("phase") == "ready" and not asked:
            asked = True
            child.send({"spec": spec, "strategy": "native", "calls": 1, "seconds": 1.0})
        called = line.get("phase") == "called"
    assert called
    time.sleep(1)
    assert child.line() is None
    assert not child.is_over()
    start = time.perf_counter()
    assert child.end(30.0) == -signal.SIGKILL
    gone = time.perf_counter() - start
    answers = gpu_answers()
    with Sandbox(DEVICE, Limits(60.0, 60.0)) as sandbox:
        assert sandbox.prove(spec, "native").kind == "ok"
    usable = time.perf_counter() - start
    return {"gone_s": round(gone, 3), "gpu_answers_s": answers, "another_process_s": round(usable, 2)}


def check_healthy_kernels_are_believed() -> dict[str, Any]:
    """Native (TF32 on) and our own: every direction, type and strategy of some shapes is ok in the sandbox."""
    worst: dict[str, dict[str, float]] = {}
    specs = [
        case.spec(direction, dtype, DEVICE, last)
        for case in (*CASES, LARGER, LARGEST)
        for direction in DIRECTIONS
        for dtype in ("float32", "float16", "bfloat16")
        for last in ((False, True) if case in (CASES[3], LARGER) else (False,))
    ]
    compile_ahead(specs)
    for spec in specs:  # the sandbox, which has one compiler at work, finds them on the disk
        all(strategy.is_ready(spec, True) for strategy in STRATEGIES if strategy.rejects(spec) is None)
    with Sandbox(DEVICE, Limits(60.0, 300.0), cool_down=0.01) as sandbox:
        for spec in specs:
            for strategy in (NATIVE, *STRATEGIES):
                if strategy.rejects(spec) is not None:
                    continue
                trial = sandbox.prove(spec.to_json(), strategy.name, calls=4)
                assert trial.kind == "ok", (strategy.name, str(spec), trial)
                row = worst.setdefault(f"{strategy.name} {spec.dtype}", {"trials": 0, "error": 0.0})
                row["trials"] += 1
                row["error"] = max(row["error"], trial.error)
    return worst


def run_program(cache: str, *options: str, fault: str = "", steps: int = 60, **environ: str) -> Any:
    command = [sys.executable, "-m", "rocm_patch", "run", "--backend", BACKEND, "--conv", "guarded", *options]
    child = {**os.environ, "ROCM_PATCH_CACHE_DIR": cache, "VIRTUAL_ENV": sys.prefix, **environ}
    if fault:
        child["ROCM_PATCH_FAULT"] = fault
    return subprocess.run(
        [*command, str(demo.PROGRAM), str(steps), "cuda"], env=child, capture_output=True, text=True, timeout=300
    )


def check_a_hang_ends_within_the_limit() -> dict[str, Any]:
    """An endless kernel in the guarded first run, and after 100 good calls, under --restart."""
    rows = {}
    for name, fault in (("first call", "hang:forward"), ("call 101", "hang:forward:after=100")):
        with tempfile.TemporaryDirectory() as cache:
            limit = 4.0
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "rocm_patch", "run", "--restart", "--backend", BACKEND, "--conv", "guarded",
                 str(demo.PROGRAM), "60", "cuda"],
                env={**os.environ, "ROCM_PATCH_CACHE_DIR": cache, "VIRTUAL_ENV": sys.prefix,
                     "ROCM_PATCH_FAULT": fault, "ROCM_PATCH_HANG_LIMIT": f"{limit:g}"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            began, ended, said = None, None, ""
            for line in process.stderr:  # type: ignore[union-attr]
                said += line
                now = time.perf_counter()
                if "a convolution hangs" in line or "the GPU stands still" in line:
                    began = now
                if "starting it again" in line:
                    ended = now
            process.wait()
            assert process.returncode == 0, said
            assert began is not None
            assert ended is not None
            assert ended - began < 5.0, (ended - began, said)
            rows[name] = {
                "limit_s": limit,
                "noticed_to_restarted_s": round(ended - began, 2),
                "start_to_noticed_s": round(began - started, 2),
                "verdicts": sorted({row.verdict.kind for row in Store(Path(cache)).rows()}),
            }
    return rows


def check_three_runs_in_a_row() -> dict[str, Any]:
    """The first one meets a crash; all three end with the right loss, and the last two do not meet it."""
    with tempfile.TemporaryDirectory() as cache:
        right = json.loads(run_program(cache, steps=60).stdout)["loss"]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(3):
            done = run_program(cache, "--restart", fault="segfault:grad_weight", ROCM_PATCH_HANG_LIMIT="5")
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout.splitlines()[-1])
            rows.append({**answer, "restarts": done.stderr.count("starting it again")})
    assert [row["restarts"] for row in rows] == [1, 0, 0], rows
    assert [row["faults"] for row in rows] == [0, 0, 0], rows
    assert all(abs(row["loss"] - right) <= 1e-3 * right for row in rows), (right, rows)
    return {"right_loss": right, "runs": rows}


def check_graph_capture_tries_nothing() -> dict[str, Any]:
    """Unproven convolutions in a capture are served by ours, without a synchronisation; proven ones stay native."""
    rocm_patch.disable_all_patches()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ROCM_PATCH_CACHE_DIR"] = cache
        rocm_patch.enable_miopen_bypass("guarded", backend=BACKEND)
        results = {}
        for name, is_proven in (("unproven", False), ("proven", True)):
            size = 16 if is_proven else 18
            x, w = torch.randn(2, 8, size, size, device=DEVICE), torch.randn(8, 8, 3, 3, device=DEVICE)
            exact = F.conv2d(x.double(), w.double(), padding=1)
            if is_proven:
                F.conv2d(x, w, padding=1)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = F.conv2d(x, w, padding=1)
            graph.replay()
            torch.cuda.synchronize()
            results[name] = float((out - exact).norm() / exact.norm())
            assert results[name] < 2e-3, results
        served = {r.spec.image[-1]: (r.strategy.name, r.proven) for r in ACTIVE["CUDA"].routes.taken()
                  if r.spec.dtype == "float32"}  # fmt: skip
        assert served[16] == ("native", True), served
        assert served[18] == ("native", False), served  # the route waits for its proof; the graph has ours
        rocm_patch.disable_all_patches()
    return results


def check_guarded_training_in_all_modes() -> dict[str, Any]:
    """First runs are judged under autocast with GradScaler, channels_last, determinism, inference and compile."""

    def train(mode: str) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 16, 3, stride=2, groups=2), torch.nn.ReLU(),
            torch.nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, 4),
        ).to(DEVICE)  # fmt: skip
        x, y = torch.randn(8, 3, 21, 21, device=DEVICE), torch.arange(8, device=DEVICE) % 4
        if mode == "channels_last":
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        torch.use_deterministic_algorithms(mode == "deterministic")
        scaler = torch.amp.GradScaler("cuda", enabled=mode == "autocast")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        forward = torch.compile(model) if mode == "compile" else model
        losses = []
        for _ in range(5):
            with torch.autocast("cuda", torch.float16, enabled=mode == "autocast"):
                loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        with torch.inference_mode():
            losses.append(float(F.cross_entropy(model.eval()(x), y)))
        torch.use_deterministic_algorithms(False)
        return losses

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {}
    for mode in ("plain", "autocast", "channels_last", "deterministic", "compile"):
        rocm_patch.disable_all_patches()
        native = train(mode)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["ROCM_PATCH_CACHE_DIR"] = cache
            rocm_patch.enable_miopen_bypass("guarded", backend=BACKEND)
            ours = train(mode)
            routes = ACTIVE["CUDA"].routes.taken()
            rocm_patch.disable_all_patches()
            verdicts = {row.verdict.kind for row in Store(Path(cache)).rows()}
        error = max(abs(a - b) / abs(b) for a, b in zip(ours, native, strict=True))
        unproven = [str(route.spec) for route in routes if not route.proven]
        results[mode] = {"loss_error": error, "convolutions": len(routes), "unproven": unproven}
        assert error < (2e-3 if mode == "autocast" else 1e-4), results
        assert verdicts == {"ok"}, results
        assert {route.strategy.name for route in routes} == {"native"}, results
    return results


def check_the_cost_of_a_proven_call() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "overhead.json")
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("guard_overhead.py")), str(out), BACKEND],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def check_flag_and_its_other_users() -> dict[str, Any]:
    """With the bypass on, batch norm and RNNs run without the vendor's library, and the program sees its own flag."""
    from torch.profiler import ProfilerActivity, profile

    makers = {
        "batch_norm": (lambda: torch.nn.BatchNorm2d(8), (4, 8, 9, 9)),
        "lstm": (lambda: torch.nn.LSTM(8, 16), (5, 4, 8)),
        "gru": (lambda: torch.nn.GRU(8, 16), (5, 4, 8)),
    }

    def run(name: str) -> tuple[list[torch.Tensor], bool]:
        make, shape = makers[name]
        torch.manual_seed(0)
        layer, x = make().to(DEVICE), torch.randn(shape, device=DEVICE, requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            out = layer(x)
            out = out[0] if isinstance(out, tuple) else out
            (out * torch.randn(out.shape, device=DEVICE)).sum().backward()
            torch.cuda.synchronize()
        # aten::cudnn_is_acceptable asks, and uses nothing.
        names = {event.key.lower() for event in recorded.key_averages()} - {"aten::cudnn_is_acceptable"}
        grads = [p.grad for p in layer.parameters()]
        return [out.detach(), x.grad, *grads], any("cudnn" in n or "miopen" in n for n in names)  # type: ignore[list-item]

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {}
    for name in makers:
        rocm_patch.disable_all_patches()
        exact, by_vendor = run(name)
        rocm_patch.enable_miopen_bypass(backend=BACKEND)
        assert torch.backends.cudnn.enabled
        ours, by_vendor_still = run(name)
        assert torch.backends.cudnn.enabled
        rocm_patch.disable_all_patches()
        error = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(ours, exact, strict=True))
        results[name] = {"vendor_without_us": by_vendor, "vendor_with_us": by_vendor_still, "relative_error": error}
        assert not by_vendor_still, results
        assert error < 1e-4, results
    assert any(row["vendor_without_us"] for row in results.values()), results
    return results


def main() -> int:
    chosen = harness.parser(__doc__).parse_args()
    gpu_answers()
    status = harness.run_all(globals(), chosen)
    gpu_answers()
    return status


if __name__ == "__main__":
    sys.exit(main())

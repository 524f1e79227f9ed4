"""Whole training steps of three models: ours against the vendor library on and off, and unfold + matmul.

Forward, backward and an optimizer's step of torchvision's ResNet-50 (batch 32, 224x224), ultralytics' YOLOv8n (batch
8, 640x640) and a UNet of Stable Diffusion 1.5's size by diffusers (batch 2, 64x64 latents), in float32 and under
float16 autocast: milliseconds a step, those of its kernels alone, and peak memory. Weights are random. And what the
first step costs, in a process of its own: natively, with an empty store, and with what that run has left.

    python benchmarks/model_steps.py OUT.json [--only ...]

YOLOv8n can be a traced module (--yolo FILE, made by --trace FILE where ultralytics is installed). Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import about

Step = Callable[[], torch.Tensor]
MIB = 1 << 20


def resnet50(device: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    import torchvision

    return torchvision.models.resnet50().to(device).train(), (torch.randn(32, 3, 224, 224, device=device),)


def yolov8n(device: str, traced: Path | None) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    images = torch.randn(8, 3, 640, 640, device=device)
    if traced is not None:
        return torch.jit.load(traced, map_location=device).train(), (images,)
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False).to(device).train(), (images,)


def unet(device: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return model.train(), (torch.randn(2, 4, 64, 64), torch.tensor([1, 500]), torch.randn(2, 77, 768))


def sum_of_squares(output: Any) -> torch.Tensor:
    """A loss for any output."""
    if isinstance(output, torch.Tensor):
        return output.float().square().mean()
    values = output.values() if isinstance(output, dict) else output
    return torch.stack([sum_of_squares(value) for value in values]).sum()


def step_of(name: str, dtype: str, device: str, traced: Path | None) -> Step:
    torch.manual_seed(0)
    made = {"resnet50": resnet50, "unet": unet}.get(name)
    model, inputs = yolov8n(device, traced) if made is None else made(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.float16, enabled=dtype == "float16"):
            loss = sum_of_squares(model(*inputs))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@contextmanager
def vendor() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


@contextmanager
def vendor_off() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=False):
        yield


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def unfold_matmul(
    input: torch.Tensor, weight: torch.Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:  # fmt: skip
    """The original's convolution: all columns at once, and a matrix product."""
    if torch.is_autocast_enabled():
        input, weight, bias = (
            x if x is None else x.to(torch.get_autocast_gpu_dtype()) for x in (input, weight, bias)
        )
    stride, padding, dilation = map(_pair, (stride, padding, dilation))
    columns = F.unfold(input, weight.shape[2:], dilation, padding, stride).unflatten(1, (groups, -1))
    result = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns
    sizes = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    result = result.view(input.shape[0], weight.shape[0], *sizes)
    return result if bias is None else result + bias.view(-1, 1, 1)


@contextmanager
def unfold() -> Iterator[None]:
    before = F.conv2d
    torch.nn.functional.conv2d = unfold_matmul
    try:
        yield
    finally:
        torch.nn.functional.conv2d = before


@contextmanager
def ours() -> Iterator[None]:
    import rocm_patch

    rocm_patch.enable_miopen_bypass(backend="cuda")
    try:
        yield
    finally:
        rocm_patch.disable_all_patches()


@contextmanager
def ours_tuned() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), ours():
        yield


CONTENDERS = {
    "vendor": vendor,
    "vendor_off": vendor_off,
    "unfold_matmul": unfold,
    "ours": ours,
    "ours_tuned": ours_tuned,
}


def measured(step: Step, steps: int = 12) -> dict[str, float]:
    """Median milliseconds of a step and peak MiB, once the kernels that are being compiled are there."""
    before = torch.cuda.memory_allocated()
    deadline = time.monotonic() + 60
    losses = [float(step()) for _ in range(3)]
    while is_compiling() and time.monotonic() < deadline:
        time.sleep(0.5)
        step()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "ms": round(sorted(taken)[steps // 2], 3), "device_ms": round(device_ms(step), 3),
        "mib": round(peak / MIB, 1), "first_loss": losses[0],
    }  # fmt: skip


def device_ms(step: Step) -> float:
    """The sum of the times of a step's kernels: what is left of it where the host keeps up."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e3


def is_compiling() -> bool:
    from rocm_patch.overrides.aten import ACTIVE

    return any(route.better is not None for each in ACTIVE.values() for route in each.routes.taken())


def steps(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in ("resnet50", "yolov8n", "unet"):
        for dtype in ("float32", "float16"):
            label = f"{name} {dtype}"
            if not any(part in label for part in chosen.only or [""]):
                continue
            for contender, use in CONTENDERS.items():
                row: dict[str, Any] = {"model": name, "dtype": dtype, "contender": contender}
                try:
                    with use():
                        row |= measured(step_of(name, dtype, "cuda", chosen.yolo))
                except (RuntimeError, ImportError, TypeError) as error:
                    row["why"] = f"{type(error).__name__}: {error}"[:300]
                torch.cuda.empty_cache()
                print(row, flush=True)
                yield row


FIRST_STEP = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from model_steps import step_of
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
torch.zeros(1, device="cuda")
if sys.argv[2] == "ours":
    import rocm_patch
    rocm_patch.enable_miopen_bypass(backend="cuda")
step = step_of(sys.argv[3], sys.argv[4], "cuda", Path(sys.argv[5]) if sys.argv[5] else None)
torch.cuda.synchronize()
times = []
for _ in range(3):
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
# What is being compiled goes on while the program runs.
from rocm_patch.kernels.compiling import COMPILER
deadline = time.monotonic() + float(sys.argv[6])
while time.monotonic() < deadline:
    time.sleep(0.2)
    step()
print(times[0], times[1])
"""


def first_steps(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of the first and the second step of a fresh process."""
    for name in ("resnet50", "yolov8n", "unet"):
        for dtype in ("float32", "float16"):
            label = f"start {name} {dtype}"
            if not any(part in label for part in chosen.only or [""]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                environ = {**os.environ, "ROCM_PATCH_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
                runs = [
                    ("native", "native", 0),
                    ("native again", "native", 0),
                    ("cold", "ours", 10),
                    ("warm", "ours", 0),
                ]
                for run, which, wait in runs:
                    command = [
                        sys.executable, "-c", FIRST_STEP, str(Path(__file__).parent), which, name, dtype,
                        str(chosen.yolo or ""), str(wait),
                    ]  # fmt: skip
                    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
                    row: dict[str, Any] = {"model": name, "dtype": dtype, "run": run}
                    if done.returncode:
                        row["why"] = done.stderr[-300:]
                    else:
                        row["first_step_s"], row["second_step_s"] = map(float, done.stdout.split()[-2:])
                    print(row, flush=True)
                    yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="part of 'resnet50 float32'")
    parser.add_argument("--yolo", type=Path, metavar="FILE", help="a traced YOLOv8n")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="trace YOLOv8n into a file, and end")
    parser.add_argument("--no-start", action="store_true", help="leave the first steps out")
    chosen = parser.parse_args()
    if chosen.trace:
        model, (images,) = yolov8n("cpu", None)
        torch.jit.trace(model, images[:, :, :64, :64], check_trace=False).save(chosen.trace)
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    document = {**about(__file__), "steps": [], "first_steps": []}
    for row in steps(chosen):
        document["steps"].append(row)
        chosen.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not chosen.no_start:
        for row in first_steps(chosen):
            document["first_steps"].append(row)
            chosen.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

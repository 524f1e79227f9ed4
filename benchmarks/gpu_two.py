"""ResNet-50 with DistributedDataParallel on one and on two GPUs, patched and native; writes one JSON file.

    python benchmarks/gpu_two.py OUT.json [--only PART] [--side 160] [--batch 64]

Needs two GPUs of a CUDA or ROCm build of torch, and torchvision. What torchrun, FSDP, accelerate, a killed rank and
the shared store need of us is in `tests/test_distributed.py`, which takes two GPUs where it finds them.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch

STEPS = 50
LOSSES_WITHIN = 1e-3  # relative, of every step
SCALING_WITHIN = 0.05

PROGRAM = """
import os, sys, time, torch, torchvision
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

steps, side, batch = map(int, sys.argv[1:4])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
torch.manual_seed(0)
model = torchvision.models.resnet50(num_classes=100).cuda()
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
data = torch.Generator().manual_seed(1 + rank)
images = torch.randn(4, batch, 3, side, side, generator=data).cuda()
labels = torch.randint(100, (4, batch), generator=data).cuda()
for step in range(steps):
    torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images[step % 4]), labels[step % 4])
    loss.backward()
    optimizer.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    mean = loss.detach()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    if rank == 0:
        print(f"step {step} loss {mean.item():.7f} seconds {seconds:.6f}", flush=True)
if rank == 0:
    print(f"memory {torch.cuda.max_memory_allocated()}")
dist.destroy_process_group()
"""


@functools.cache
def training(gpus: int, patched: bool, repeat: int = 0) -> tuple[list[float], float, int]:
    """Losses of all steps, the median seconds of the second half of them, and the bytes taken at most.

    Args:
        gpus: how many processes, one GPU each, with as many images each.
        patched: under `rocm-patch run`, every convolution bypassed.
        repeat: tells runs apart that are the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(PROGRAM)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command = [*torchrun, str(script), str(STEPS), str(CHOSEN.side), str(CHOSEN.batch)]
        if patched:
            command = [sys.executable, "-m", "rocm_patch", "run", "-q", "--backend", "cuda", "--", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=dict(os.environ), check=False)
    if done.returncode:
        raise RuntimeError(f"{command} exited with {done.returncode}: {done.stderr[-3000:]}")
    steps = re.findall(r"step \d+ loss ([\d.]+) seconds ([\d.]+)", done.stdout)
    assert len(steps) == STEPS, done.stdout
    memory = re.search(r"memory (\d+)", done.stdout)
    seconds = statistics.median(float(second) for _, second in steps[STEPS // 2 :])
    return [float(loss) for loss, _ in steps], seconds, int(memory[1]) if memory else 0


def apart(ours: list[float], native: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, native, strict=True))


def check_losses_of_two_gpus() -> Mapping[str, Any]:
    """Each step's loss, averaged over the ranks, is native's; and how far native is from itself."""
    native, ours = training(2, patched=False)[0], training(2, patched=True)[0]
    row = {
        "steps": STEPS,
        "patched_against_native": apart(ours, native),
        "native_against_itself": apart(training(2, patched=False, repeat=1)[0], native),
        "first_and_last_loss": [native[0], native[-1]],
        "native": native,
        "patched": ours,
    }
    assert row["patched_against_native"] <= LOSSES_WITHIN, row
    return row


def check_scaling_from_one_gpu_to_two() -> Mapping[str, Any]:
    """Images per second of two GPUs against one, patched and native; the second patched run has its kernels."""
    row: dict[str, Any] = {"images_per_gpu": CHOSEN.batch, "side": CHOSEN.side}
    for name, patched in (("native", False), ("patched", True)):
        seconds = {gpus: min(training(gpus, patched, repeat)[1] for repeat in (0, 1)) for gpus in (1, 2)}
        row[name] = {
            "seconds_per_step": seconds,
            "images_per_second": {gpus: gpus * CHOSEN.batch / second for gpus, second in seconds.items()},
            "speedup": 2 * seconds[1] / seconds[2],
            "bytes": {gpus: training(gpus, patched)[2] for gpus in (1, 2)},
        }
    row["patched_over_native"] = row["patched"]["speedup"] / row["native"]["speedup"]
    assert row["patched_over_native"] >= 1 - SCALING_WITHIN, row
    return row


if __name__ == "__main__":
    arguments = harness.parser(__doc__)
    arguments.add_argument("--side", type=int, default=160, help="pixels of an image's side")
    arguments.add_argument("--batch", type=int, default=64, help="images of one GPU in a step")
    CHOSEN = arguments.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit("gpu_two.py needs two GPUs\nhint: python -m pytest tests/test_distributed.py runs on a CPU")
    sys.exit(harness.run_all(globals(), CHOSEN))

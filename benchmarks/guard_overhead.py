"""What the guard costs once a convolution is proven; writes one JSON file.

    python benchmarks/guard_overhead.py OUT.json [cpu|cuda|hip]

The same small convolution through the override, with a guard that watches (policy `guarded`) and with one that does
not (policy `native`), in turns; and natively, without the override.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F

import rocm_patch
from rocm_patch.overrides.aten import ACTIVE

CALLS, ROUNDS = 2000, 41
# What routes.Routes.serve does for the guard where a route is proven.
_STATEMENTS = "route.proven; witness.count += 1; witness.slots[0] = route.number"


def per_call(x: torch.Tensor, w: torch.Tensor) -> float:
    """Microseconds of host time."""
    start = time.perf_counter()
    for _ in range(CALLS):
        F.conv2d(x, w)
    took = time.perf_counter() - start
    if x.is_cuda:
        torch.cuda.synchronize()
    return took / CALLS * 1e6


def main() -> None:
    backend = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    device = "cpu" if backend == "cpu" else "cuda"
    torch.set_num_threads(1)
    x, w = torch.randn(1, 1, 3, 3, device=device), torch.randn(1, 1, 3, 3, device=device)
    times: dict[str, list[float]] = {"aten": [], "native": [], "guarded": []}
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["ROCM_PATCH_CACHE_DIR"] = cache
        for _ in range(ROUNDS):
            for policy, found in times.items():
                rocm_patch.disable_all_patches()
                if policy != "aten":
                    rocm_patch.enable_miopen_bypass(policy, backend=backend)
                per_call(x, w)
                found.append(per_call(x, w))
        rocm_patch.disable_all_patches()
        rocm_patch.enable_miopen_bypass("guarded", backend=backend)
        F.conv2d(x, w)
        routes = ACTIVE["CPU" if device == "cpu" else "CUDA"].routes
        route, witness = routes.taken()[0], routes.guard.witness
        assert route.proven
        assert route.number
        bare = min(timeit.repeat(_STATEMENTS, globals={"route": route, "witness": witness}, number=100_000, repeat=9))
        rocm_patch.disable_all_patches()
    extra = [guarded - native for guarded, native in zip(times["guarded"], times["native"], strict=True)]
    quartiles = statistics.quantiles(extra, n=4)
    result = {
        "command": "python benchmarks/guard_overhead.py OUT.json " + backend,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "median_us_per_call": {policy: round(statistics.median(found), 3) for policy, found in times.items()},
        "guarded_minus_native_us": {
            "median": round(quartiles[1], 3),
            "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        },
        "its_statements_alone_us": round(bare / 100_000 * 1e6, 4),
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

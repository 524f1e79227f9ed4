"""Every strategy in every direction of the 18 layers, timed on a GPU, beside what the cost model says of it.

    python benchmarks/directions.py OUT.json

What `tests/test_cost.py` holds the cost model against. Needs a CUDA or ROCm build of torch with a visible GPU, and
the Triton that belongs to it.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import harness
import torch

from rocm_patch.conv import likeliest
from rocm_patch.conv.cases import LAYERS
from rocm_patch.conv.spec import DIRECTIONS, ConvSpec

DTYPES = ("float32", "float16")
BUDGET = 1 << 30
# A strategy that is estimated to take so many times the best one's time is not timed.
HOPELESS = 12.0


def specs() -> list[tuple[str, ConvSpec]]:
    return [
        (case.why, case.spec(direction, dtype, "cuda:0", last))
        for case in LAYERS
        for dtype in DTYPES
        for last in (False, True)
        for direction in DIRECTIONS
    ]


def candidates(spec: ConvSpec) -> list[Any]:
    ranked = likeliest(spec)
    return [strategy for strategy in ranked if strategy.seconds(spec) < HOPELESS * ranked[0].seconds(spec)]


def operands(spec: ConvSpec) -> tuple[torch.Tensor, torch.Tensor]:
    made = {}
    for name, shape in (("image", spec.image), ("weight", spec.weight), ("grad", spec.grad)):
        tensor = torch.randn(shape, device="cuda").to(getattr(torch, spec.dtype))
        made[name] = tensor.contiguous(memory_format=torch.channels_last) if spec.channels_last else tensor
    first, second = {"forward": ("image", "weight"), "grad_input": ("grad", "weight")}.get(
        spec.direction, ("image", "grad")
    )
    return made[first], made[second]


def device_ms(strategy: Any, spec: ConvSpec, first: torch.Tensor, second: torch.Tensor) -> float:
    """The device's own time: the queue is filled before the call, so that the host is ahead."""
    strategy.run(spec, first, second, BUDGET)
    taken = []
    for _ in range(7):
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        strategy.run(spec, first, second, BUDGET)
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    # All kernels are asked for before one is waited for.
    for _, spec in specs():
        for strategy in candidates(spec):
            strategy.is_ready(spec, False)
    rows = []
    for layer, spec in specs():
        pair = operands(spec)
        row: dict[str, Any] = {
            "layer": layer, "dtype": spec.dtype, "channels_last": spec.channels_last, "direction": spec.direction,
            "ms": {}, "estimated_ms": {},
        }  # fmt: skip
        for strategy in candidates(spec):
            if not strategy.is_ready(spec, True):
                sys.exit(f"{strategy.name} of {spec} cannot be compiled: {strategy.rejects(spec)}")
            row["ms"][strategy.name] = round(device_ms(strategy, spec, *pair), 5)
            row["estimated_ms"][strategy.name] = round(1e3 * strategy.seconds(spec), 5)
        chosen = min(row["estimated_ms"], key=row["estimated_ms"].get)
        best = min(row["ms"], key=row["ms"].get)
        print(
            f"{layer} {spec.dtype} {'last' if spec.channels_last else 'first'} {spec.direction}: "
            f"{chosen} {row['ms'][chosen]:.3f} ms, fastest {best} {row['ms'][best]:.3f} ms",
            flush=True,
        )
        rows.append(row)
    document = {**harness.about(__file__), "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

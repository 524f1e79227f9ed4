"""Every convolution algorithm on a real GPU: exactness, memory, sizes beyond 32 bits; writes one JSON file.

    python benchmarks/gpu_strategies.py OUT.json

Needs a CUDA or ROCm build of torch with a visible GPU. Exits 1 if anything that is asserted here does not hold.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import harness
import torch
import torch.nn.functional as F

from rocm_patch.conv import NATIVE, STRATEGIES
from rocm_patch.conv.cases import CASES, LAYERS, Case
from rocm_patch.conv.spec import DIRECTIONS, ConvSpec
from rocm_patch.conv.strategy import workspace_budget
from rocm_patch.trust.reference import judge

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}
LONG = (
    Case("3x3, 256 channels", (2, 256, 28, 28), (128, 256, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("3x3 stride 2, 128 channels", (2, 128, 28, 28), (256, 128, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("one tap, 1024 channels", (2, 1024, 14, 14), (256, 1024, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("8 groups of 32 channels", (2, 256, 28, 28), (256, 32, 3, 3), (1, 1), (1, 1), (1, 1), 8),
    Case("3-d, 32 channels", (1, 32, 16, 16, 16), (32, 32, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
)


def operands(spec: ConvSpec, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = []
    for shape in (spec.image, spec.weight, spec.grad):
        tensor = torch.randn(shape, device=device, dtype=getattr(torch, spec.dtype))
        last = LAST.get(tensor.dim()) if spec.channels_last else None
        made.append(tensor if last is None else tensor.contiguous(memory_format=last))
    return made[0], made[1], made[2]


def pair(spec: ConvSpec, image: Any, weight: Any, grad: Any) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = {"forward": (image, weight), "grad_input": (grad, weight), "grad_weight": (image, grad)}
    return chosen[spec.direction]


def exactly(case: Case, image: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """All three directions in float64 on the CPU; of complex operands without conjugates, as the strategies."""
    wide = torch.complex128 if image.is_complex() else torch.float64
    x, w, g = (t.to("cpu", wide) for t in (image, weight, grad))
    x, w = x.requires_grad_(), w.requires_grad_()
    out = CONVS[len(case.stride)](x, w, None, case.stride, case.padding, case.dilation, case.groups)
    # torch's complex gradients conjugate the other factor: grad and the result are conjugated to undo it.
    of_image, of_weight = torch.autograd.grad(out, (x, w), g.conj())
    return {"forward": out.detach(), "grad_input": of_image.conj(), "grad_weight": of_weight.conj()}


def cases(dtypes: Any = DTYPES) -> Iterator[tuple[Case, str, bool]]:
    for case in (*CASES, *LONG):
        for dtype in dtypes:
            if dtype.is_complex and case in LONG:  # the reference takes minutes
                continue
            for last in (False, True) if len(case.image) > 3 else (False,):
                yield case, str(dtype).removeprefix("torch."), last


def compile_ahead(specs: Iterable[ConvSpec]) -> None:
    """Have the kernels of all strategies compiled side by side, instead of one by one at their first call."""
    for spec in specs:
        for strategy in STRATEGIES:
            if strategy.rejects(spec) is None:
                strategy.is_ready(spec, False)


def check_exactness() -> dict[str, Any]:
    """Every strategy, direction, type, memory format and budget against float64 on the CPU, TF32 off."""
    worst: dict[str, float] = {}
    ran = 0
    compile_ahead(c.spec(d, dtype, "cuda:0", last) for c, dtype, last in cases() for d in DIRECTIONS)
    for case, dtype, last in cases():
        spec = case.spec("forward", dtype, "cuda:0", last)
        tensors = operands(spec)
        exact = exactly(case, *tensors)
        for direction in DIRECTIONS:
            spec = case.spec(direction, dtype, "cuda:0", last)
            for strategy in STRATEGIES:
                if strategy.rejects(spec) is None:
                    for budget in (1 << 30, 4000):
                        result = strategy.run(spec, *pair(spec, *tensors), budget)
                        assert tuple(result.shape) == spec.result and result.dtype == tensors[0].dtype
                        error = (result.cpu().to(exact[direction].dtype) - exact[direction]).norm()
                        error = float(error / exact[direction].norm())
                        key = f"{strategy.name} {direction} {dtype}"
                        worst[key] = max(worst.get(key, 0.0), error)
                        assert error <= strategy.rtol[dtype], (strategy.name, str(spec), budget, error)
                        ran += 1
    return {"compared": ran, "worst_relative_error": worst}


def check_error_of_products() -> dict[str, Any]:
    """Matrix products: each below eps sqrt(K) ||w|| ||x||, in the geometric mean at most twice the vendor's error."""
    logs: dict[str, list[float]] = {}
    tight = 0.0
    for case, dtype, last in cases((torch.float32,)):
        tensors = operands(case.spec("forward", dtype, "cuda:0", last))
        exact = exactly(case, *tensors)
        for direction in DIRECTIONS:
            spec = case.spec(direction, dtype, "cuda:0", last)
            first, second = pair(spec, *tensors)
            bound = EPSILON[dtype] * math.sqrt(spec.summed_length) * first.double().norm() * second.double().norm()
            errors = {}
            for strategy in (*STRATEGIES, NATIVE):
                if strategy.rejects(spec) is None:
                    difference = (strategy.run(spec, first, second, 1 << 30).cpu().double() - exact[direction]).norm()
                    errors[strategy.name] = max(float(difference / exact[direction].norm()), EPSILON[dtype] / 64)
                    if not strategy.is_approximate and strategy is not NATIVE:
                        tight = max(tight, float(difference / bound.cpu()))
                        assert difference <= bound.cpu(), (strategy.name, str(spec))
            for name, error in errors.items():
                logs.setdefault(name, []).append(math.log(error / errors["native"]))
    means = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
    gemms = {s.name for s in STRATEGIES if not s.is_approximate}
    assert all(mean <= 2 for name, mean in means.items() if name in gemms), means
    return {"geometric_mean_of_error_over_vendors": means, "largest_share_of_the_bound": tight}


def used_bytes(strategy: Any, spec: ConvSpec, first: Any, second: Any, budget: int) -> int:
    strategy.run(spec, first, second, budget)  # the BLAS library takes its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = strategy.run(spec, first, second, budget)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()


def check_workspace() -> dict[str, Any]:
    """Peak memory beyond operands and result never exceeds what `workspace_bytes` says by more than 5 % and 2 MiB."""
    rows, over = {}, {}
    default = workspace_budget(torch.device("cuda"))
    compile_ahead(
        case.spec(direction, dtype, "cuda:0", last)
        for case in (*LAYERS, *LONG)
        for dtype in ("float32", "float16")
        for last in (False, True)
        for direction in DIRECTIONS
    )
    for case in (*LAYERS, *LONG):
        for dtype in ("float32", "float16"):
            for last in (False, True):
                tensors = operands(case.spec("forward", dtype, "cuda:0", last))
                for direction in DIRECTIONS:
                    spec = case.spec(direction, dtype, "cuda:0", last)
                    first, second = pair(spec, *tensors)
                    for strategy in STRATEGIES:
                        # One group after the other takes no memory, and a long time.
                        if strategy.rejects(spec) is not None or (strategy.name == "im2col" and case.groups > 32):
                            continue
                        for budget in (default, 64 << 20):
                            used = used_bytes(strategy, spec, first, second, budget)
                            stated = strategy.workspace_bytes(spec, budget)
                            layout = "last " if last else ""
                            key = f"{case.why} {direction} {dtype} {layout}{strategy.name} {budget >> 20}"
                            rows[key] = [round(used / 2**20, 1), round(stated / 2**20, 1)]
                            if used > stated * 1.05 + (2 << 20):
                                over[key] = rows[key]
    assert not over, over
    shares = {key: used / stated for key, (used, stated) in rows.items() if stated > 32}
    closest = sorted(shares, key=lambda key: -shares[key])
    return {
        "compared": len(rows),
        "used_over_stated_mean": sum(shares.values()) / len(shares),
        "most_used_mib_at_the_default_budget": max(row[0] for key, row in rows.items() if not key.endswith(" 64")),
        "closest_rows_used_mib_stated_mib": {key: rows[key] for key in closest[:40]},
    }


def check_sizes_beyond_32_bits() -> dict[str, Any]:
    """Columns of more than 2^31 elements, and images of more than 2^31; samples against float64."""
    rows: dict[str, Any] = {}
    large = (
        Case("columns", (1, 64, 2304, 2304), (16, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
        Case("columns, stride 2", (2, 96, 3200, 3200), (32, 96, 3, 3), (2, 2), (1, 1), (1, 1)),
        Case("image", (3, 64, 3456, 3456), (8, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
        Case("image, one tap", (3, 64, 3456, 3456), (8, 64, 1, 1), (1, 1), (0, 0), (1, 1)),
        Case("image, depthwise", (3, 64, 3456, 3456), (64, 1, 3, 3), (1, 1), (1, 1), (1, 1), 64),
        Case("image, grouped", (3, 64, 3456, 3456), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 4),
        Case("samples", (2049, 1, 1024, 1024), (2, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
        Case("1-d", (1, 3, 800_000_000), (2, 3, 5), (1,), (2,), (1,)),
    )
    for case in large:
        for dtype in ("float16", "float32") if case.why.startswith("columns") else ("float16",):
            for direction in DIRECTIONS:
                spec = case.spec(direction, dtype, "cuda:0")
                shapes = {"forward": (0, 1), "grad_input": (2, 1), "grad_weight": (0, 2)}[direction]
                chosen = [(spec.image, spec.weight, spec.grad)[i] for i in shapes]
                made = [torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for shape in chosen]
                for strategy in STRATEGIES:
                    if strategy.rejects(spec) is None:
                        for budget in (None, 64 << 30):
                            limit = workspace_budget(torch.device("cuda")) if budget is None else budget
                            if strategy.workspace_bytes(spec, limit) > 90 << 30:
                                continue
                            result = strategy.run(spec, *made, limit)
                            found = judge(spec, *made, result, 2 * strategy.rtol[dtype])
                            del result
                            torch.cuda.empty_cache()
                            key = f"{case.why} {direction} {dtype} {strategy.name} {limit >> 30} GiB"
                            rows[key] = found.error
                            assert found.kind == "ok", (key, found)
                del made
                torch.cuda.empty_cache()
    return {"compared": len(rows), "errors": rows}


def main() -> int:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    return harness.run_all(globals(), harness.parser(__doc__).parse_args())


if __name__ == "__main__":
    sys.exit(main())

"""One model with the override and without, from the same weights: forward, backward, and 3 steps of SGD.

How errors are measured: for each tensor the Frobenius norm of the difference, relative to the norm of the native
float64 tensor; the worst tensor counts. Some tensors are zero but for rounding, such as the gradient of a bias whose
convolution is followed by a batch norm: those with less than `ZERO` of the norm of all tensors of the comparison
together are judged relative to that norm.

Where a float64 error is over `BOUND`, the model itself may amplify rounding. Then native is compared with native from
weights that are moved by one unit in the last place: an error of at most `MARGIN` times that is rounding.

"After 3 steps" compares all parameters and buffers, such as a batch norm's averages. The first step moves the weights
by `FIRST_STEP` of their norm, so that a gradient's error is seen in the weights that much smaller, and in biases that
start at zero as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rocm_patch
from rocm_patch.overrides.aten import ACTIVE

STEPS = 3
# The first step moves the weights by this much of their norm.
FIRST_STEP = 1e-4
ZERO = 1e-8
# Of float64 results. Over it, MARGIN times what rounding does to native, up to MOST.
BOUND, MARGIN, MOST = 1e-9, 10.0, 1e-3
PARTS = ("forward", "backward", "steps")
# The override's name for a device, and its dispatch key.
KEYS = {"cpu": ("cpu", "CPU"), "cuda": ("hip" if torch.version.hip else "cuda", "CUDA")}
Trace = dict[str, dict[str, torch.Tensor]]


class Counter(TorchDispatchMode):
    """Counts convolutions that aten is asked for: results of forwards, and gradients of inputs and weights."""

    asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("aten.convolution."):
            self.asked += 1
        elif name.startswith("aten.convolution_backward."):
            self.asked += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


def served(key: str) -> dict[str, int]:
    """Calls by strategy of the override in force."""
    found: dict[str, int] = {}
    for route in ACTIVE[key].routes.taken():
        found[route.strategy.name] = found.get(route.strategy.name, 0) + route.calls
    return found


def tensors(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors in a model's output, with names."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from tensors(item, f"{name}.{number}")


def loss_of(output: Any) -> torch.Tensor:
    """A scalar that depends on every element of the output."""
    generator = torch.Generator().manual_seed(7)
    total: Any = 0.0
    for _, out in tensors(output):
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        if out.requires_grad:
            total = total + (out * weights).sum() / math.sqrt(max(out.numel(), 1))
    return total  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    inputs: list[torch.Tensor],
    dtype: torch.dtype,
    rate: float | None,
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
) -> tuple[Trace, float]:
    """Outputs and gradients of the first step, parameters after all, of a copy in the given type; the learning rate.

    The rate is found where it is None, such that the first step moves the weights by FIRST_STEP. What `wrap` makes
    of the copy is called in its place.
    """
    trained = copy.deepcopy(model).to(dtype).train()
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    run = wrap(trained)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    trace: Trace = {part: {} for part in PARTS}
    optimizer = None
    for step in range(STEPS):
        # Dropout and stochastic depth draw the same on both sides, which holds as long as convolutions draw nothing.
        torch.manual_seed(step)
        output = run(*inputs)
        trained.zero_grad(set_to_none=True)
        loss_of(output).backward()
        if step == 0:
            trace["forward"] = {name: out.detach().double() for name, out in tensors(output)}
            grads = {name: p.grad for name, p in trained.named_parameters()}
            grads.update({f"input {number}": x.grad for number, x in enumerate(inputs)})
            trace["backward"] = {name: g.detach().double().clone() for name, g in grads.items() if g is not None}
        del output
        if rate is None:
            with torch.no_grad():
                norm = math.hypot(*[float(p.norm()) for p in parameters])
                slope = math.hypot(*[float(p.grad.norm()) for p in parameters if p.grad is not None])
            rate = FIRST_STEP * norm / slope
        if optimizer is None:
            optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
        optimizer.step()
    for name, after in [*trained.named_parameters(), *trained.named_buffers()]:
        if after.is_floating_point():
            trace["steps"][name] = after.detach().double()
    assert rate is not None
    return trace, rate


def worst_error(reference: Trace, first: Trace, second: Trace) -> dict[str, Any]:
    """For each part the largest error of first against second, and whose it is; reference gives the scales."""
    found: dict[str, Any] = {}
    for part in PARTS:
        exact = reference[part]
        assert exact.keys() == first[part].keys() == second[part].keys(), "other tensors"
        norms = {name: float(tensor.norm()) for name, tensor in exact.items()}
        total = math.hypot(*norms.values())
        worst, whose, zeros = 0.0, "", 0
        for name, norm in norms.items():
            a, b = first[part][name], second[part][name]
            assert a.shape == b.shape, f"{name}: {tuple(a.shape)} and {tuple(b.shape)}"
            is_zero = norm <= ZERO * total
            zeros += is_zero
            difference, scale = float((a - b).norm()), total if is_zero else norm
            error = difference / scale if scale else difference
            if not math.isfinite(error):
                error = math.inf
            if error > worst:
                worst, whose = error, name
        found[part] = {"error": worst, "tensor": whose, "tensors": len(norms), "zero_but_for_rounding": zeros}
    return found


def inputs_for(
    make: Callable[[], nn.Module], shapes: tuple[tuple[int, ...], ...], device: str
) -> tuple[nn.Module, list[torch.Tensor]]:
    """The model with its random weights, and its random inputs."""
    torch.manual_seed(0)
    model = make().to(device)
    generator = torch.Generator().manual_seed(1)
    return model, [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def moved_by_rounding(model: nn.Module) -> nn.Module:
    """The model in float64, each weight moved by about one unit in its last place, up or down."""
    moved = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in moved.parameters():
            signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int64).to(p.device) * 2 - 1
            p.mul_(1 + signs * 2.0**-52)
    return moved


def within_bound(row: dict[str, Any]) -> bool:
    """Whether the float64 errors of a report are those of rounding."""
    for part in PARTS:
        error = row["against_native"][part]["error"]
        rounding = row["native_moved"][part]["error"] if "native_moved" in row else 0.0
        if not error <= max(BOUND, min(MARGIN * rounding, MOST)):
            return False
    return True


def compare(
    make: Callable[[], nn.Module],
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    device: str = "cpu",
) -> dict[str, Any]:
    """The report on one model.

    Raises:
        AssertionError: a convolution was not served, or results have other shapes than native's.
    """
    backend, key = KEYS[device]
    rocm_patch.disable_all_patches()
    model, inputs = inputs_for(make, shapes, device)
    report: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    default = torch.get_default_dtype()
    reference, rate = None, None
    try:
        for dtype in dtypes:
            torch.set_default_dtype(dtype)
            rocm_patch.disable_all_patches()
            with Counter() as counter:
                native, rate = train(model, inputs, dtype, rate)
            assert rocm_patch.enable_miopen_bypass(backend=backend)
            ours, _ = train(model, inputs, dtype, rate)
            calls = served(key)
            rocm_patch.disable_all_patches()
            assert counter.asked and "native" not in calls and sum(calls.values()) == counter.asked, (
                f"of {counter.asked} convolutions the override has served {calls}"
            )
            reference = reference or native
            row = {"convolutions": counter.asked, "served_by": calls}
            row["against_native"] = worst_error(reference, ours, native)
            if dtype == torch.float64 and not within_bound(row):
                moved, _ = train(moved_by_rounding(model), inputs, dtype, rate)
                row["native_moved"] = worst_error(reference, moved, native)
                del moved
            if dtype != dtypes[0]:
                row["against_float64"] = worst_error(reference, ours, reference)
                row["native_against_float64"] = worst_error(reference, native, reference)
            report[str(dtype).replace("torch.", "")] = row
    finally:
        torch.set_default_dtype(default)
        rocm_patch.disable_all_patches()
    return report

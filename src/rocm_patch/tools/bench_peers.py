"""Who `rocm-patch bench` measures: the override, each strategy alone, and what people have without either.

Every contender makes a function of an image and a weight for a geometry, and has a setting that it runs in. Peers run
with the override off.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rocm_patch.errors import RocmPatchError, UsageError
from rocm_patch.settings import from_environ

if TYPE_CHECKING:
    import torch

    from rocm_patch.conv.cases import Case
    from rocm_patch.conv.spec import ConvSpec

    Convolve = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DTYPES = ("float32", "float16", "bfloat16", "float64")
PEERS = ("vendor", "vendor_off", "unfold_matmul", "cpu_fallback", "compile_triton")


def plain(case: Case) -> Convolve:
    """The call that programs make: torch's own convolution, whatever serves it."""
    import torch.nn.functional as F

    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(case.stride) - 1]
    # Nothing around it that would take time of its own.
    return partial(convolve, stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)


def _never(case: Case, image: torch.Tensor, weight: torch.Tensor, directions: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute a convolution.

    Attributes:
        name: `ours`, a strategy's name, or one of `PEERS`.
        kind: `ours`, `strategy` or `peer`.
        rtol: bound on the relative error against float64, per element type.
        prepare: for a geometry, what computes the result of an image and a weight, differentiable.
        setting: entered around all its calls on one layer.
        why_not: asked within the setting, with the operands and the directions that are wanted: the reason why it is
            not run, or None.
    """

    name: str
    kind: str
    rtol: dict[str, float]
    prepare: Callable[[Case], Convolve] = plain
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    why_not: Callable[[Case, torch.Tensor, torch.Tensor, Sequence[str]], str | None] = _never


def contenders(
    device: str, strategies: Sequence[str] | None = None, peers: Sequence[str] | None = None
) -> list[Contender]:
    """Those that are measured, in the order in which they are.

    Args:
        device: torch's name of it.
        strategies: names, or None for all.
        peers: names, or None for those that make sense on the device.

    Raises:
        UsageError: an unknown name.
    """
    from rocm_patch.conv import STRATEGIES

    _check("strategy", strategies, [strategy.name for strategy in STRATEGIES], "--strategies")
    _check("peer", peers, PEERS, "--peers")
    widest: dict[str, float] = {}
    for strategy in STRATEGIES:
        for dtype, bound in strategy.rtol.items():
            widest[dtype] = max(bound, widest.get(dtype, 0.0))
    found = [Contender("ours", "ours", widest, setting=partial(override, device, "bypass"))]
    for strategy in STRATEGIES:
        if strategies is None or strategy.name in strategies:
            setting = partial(override, device, strategy.name)
            rejects = partial(_rejected, strategy)
            found.append(Contender(strategy.name, "strategy", dict(strategy.rtol), plain, setting, rejects))
    if peers is None:
        named = [name for name in PEERS if device != "cpu" or name != "compile_triton"]
    else:
        named = [name for name in PEERS if name in peers]
    return found + [_peer(name, device, is_asked=peers is not None) for name in named]


def _check(what: str, names: Sequence[str] | None, legal: Sequence[str], option: str) -> None:
    for name in names or ():
        if name not in legal:
            raise UsageError(f"unknown {what} {name!r}; it can be {', '.join(legal)}", f"{option} {legal[0]}")


def backend_of(device: str) -> str:
    """The backend that a device's convolutions belong to."""
    import torch

    return "cpu" if device == "cpu" else "hip" if torch.version.hip else "cuda"


@contextmanager
def override(device: str, chosen: str) -> Iterator[None]:
    """The override as users get it, for as long as the context lasts.

    Args:
        device: whose convolutions it serves.
        chosen: a policy or a strategy's name.

    Raises:
        RocmPatchError: it cannot be switched on here.
    """
    from rocm_patch import api

    entry = api.enable_miopen_bypass(chosen, backend=backend_of(device))
    try:
        if not entry:
            raise RocmPatchError(f"the override cannot be measured: {entry.why}", "rocm-patch doctor says more")
        yield
    finally:
        api.disable_all_patches()


def served_by(device: str) -> str:
    """The strategies that serve within `override`, in the order of directions: `direct`, `taps+im2col`."""
    names = [route.strategy.name for route in _routes(device)]
    return "+".join(dict.fromkeys(names))


def is_compiling(device: str) -> bool:
    """Whether something better is to serve within `override` once its kernels are compiled."""
    return any(route.better is not None for route in _routes(device))


def _routes(device: str) -> list[Any]:
    from rocm_patch.machine.backend import DISPATCH_KEYS
    from rocm_patch.overrides.aten import ACTIVE

    dispatcher = ACTIVE.get(DISPATCH_KEYS[backend_of(device)])
    return [] if dispatcher is None else dispatcher.routes.taken()


def _specs(case: Case, image: torch.Tensor, weight: torch.Tensor, directions: Sequence[str]) -> list[ConvSpec]:
    """The call as the dispatcher sees it: the memory format depends on the operands and on aten's flags."""
    from rocm_patch.conv.call import Geometry, forward_spec

    zeros = (0,) * len(case.stride)
    geometry = Geometry(case.stride, case.padding, case.dilation, False, zeros, case.groups)
    spec = forward_spec(image, weight, None, geometry)
    return [] if spec is None else [dataclasses.replace(spec, direction=direction) for direction in directions]


def _rejected(
    strategy: Any, case: Case, image: torch.Tensor, weight: torch.Tensor, directions: Sequence[str]
) -> str | None:
    for spec in _specs(case, image, weight, directions):
        why = strategy.rejects(spec)
        if why is not None:
            return f"rejected: {why}" + (f" ({spec.direction})" if len(directions) > 1 else "")
    return None


def _peer(name: str, device: str, is_asked: bool) -> Contender:
    from rocm_patch.conv.native import NATIVE_RTOL

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "vendor": partial(_vendor, device, is_asked), "vendor_off": partial(_vendor_off, device),
        "unfold_matmul": _unfold_matmul, "cpu_fallback": partial(_cpu_fallback, device),
        "compile_triton": _compile_triton,
    }  # fmt: skip
    return Contender(name, "peer", dict(NATIVE_RTOL), **makers[name]())


def _vendor(device: str, is_asked: bool) -> dict[str, Any]:
    """The vendor's library at its best: it tries its algorithms first. On the CPU that is oneDNN."""
    import torch

    setting = partial(torch.backends.cudnn.flags, enabled=True, benchmark=True, allow_tf32=False)
    return {"setting": setting, "why_not": partial(_known_to_fail, device, is_asked)}


def _known_to_fail(
    device: str, is_asked: bool, case: Case, image: torch.Tensor, weight: torch.Tensor, directions: Sequence[str]
) -> str | None:
    """A convolution that hangs or crashes would take all that was measured with it."""
    from rocm_patch.machine import backend, build, hardware
    from rocm_patch.machine.folders import cache_folder
    from rocm_patch.overrides.guarding import machine_of
    from rocm_patch.trust.store import Store

    if backend_of(device) != "hip":
        return None
    settings = dataclasses.replace(from_environ(), conv=None)
    activation = backend.decide(hardware.read_machine(settings.sysfs_root), build.find_build(), settings, os.environ)
    if activation.policy == "bypass" and not is_asked:
        return f"not run: {activation.why}; --peers vendor runs it all the same"
    store, machine = Store(cache_folder(os.environ)), machine_of(settings)(device)
    for spec in _specs(case, image, weight, directions):
        verdict = store.get(machine, spec.to_json(), "native")
        if verdict is not None and verdict.is_bad:
            return f"not run: native {spec.direction} is known here: {verdict}"
    return None


def _vendor_off(device: str) -> dict[str, Any]:
    """What a user does first: the library switched off by torch's flag."""
    import torch

    if device == "cpu":
        return {"setting": _onednn_off}
    return {"setting": partial(torch.backends.cudnn.flags, enabled=False, allow_tf32=False)}


@contextmanager
def _onednn_off() -> Iterator[None]:
    import torch

    with warnings.catch_warnings():
        # Some builds of torch warn that a flag which is set along with it is Intel GPUs'.
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _unfold_matmul() -> dict[str, Any]:
    """What a user writes next: columns by `F.unfold`, one matrix product, gradients by autograd."""
    return {"prepare": unfold_matmul, "why_not": _two_dimensions}


def _two_dimensions(case: Case, image: torch.Tensor, weight: torch.Tensor, directions: Sequence[str]) -> str | None:
    return None if len(case.stride) == 2 else "rejected: F.unfold has two spatial dimensions"


def unfold_matmul(case: Case) -> Convolve:
    """Of image (N, C, H, W) and weight (K, C / groups, *kernel) to (N, K, *out)."""
    import torch.nn.functional as F

    out, filters, groups = case.spec("forward").out, case.weight[0], case.groups
    window = (case.weight[2:], case.dilation, case.padding, case.stride)

    def convolve(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        columns = F.unfold(image, *window)
        if groups == 1:
            return (weight.flatten(1) @ columns).reshape(-1, filters, *out)
        columns = columns.view(image.shape[0], groups, -1, math.prod(out))
        return (weight.reshape(groups, filters // groups, -1) @ columns).reshape(-1, filters, *out)

    return convolve


def _cpu_fallback(device: str) -> dict[str, Any]:
    """Operands to the CPU, the result back; autograd copies the gradients likewise."""

    def prepare(case: Case) -> Convolve:
        on_cpu = plain(case)
        return lambda image, weight: on_cpu(image.cpu(), weight.cpu()).to(device)

    def why_not(case: Case, image: torch.Tensor, weight: torch.Tensor, directions: Sequence[str]) -> str | None:
        return "not on this device: the operands are on the CPU already" if device == "cpu" else None

    return {"prepare": prepare, "why_not": why_not}


def _compile_triton() -> dict[str, Any]:
    """`torch.compile` with Triton's convolutions only. Its backward is aten's own, the vendor's library."""

    def prepare(case: Case) -> Convolve:
        import torch

        options: dict[str, Any] = {
            "max_autotune": True, "max_autotune_gemm_backends": "TRITON", "max_autotune_conv_backends": "TRITON",
        }  # fmt: skip
        torch._dynamo.reset()  # it gives up on a function after a few geometries
        aten = plain(case)

        def convolve(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return aten(image, weight)

        return torch.compile(convolve, dynamic=False, options=options)

    return {"prepare": prepare}

"""What the strategies made of Triton kernels share: plans, and when there are none.

A plan is everything that a spec decides: which kernels with which sizes, how large the pieces are. It is made once,
its kernels are compiled while other strategies serve, and from then on a call costs its launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from rocm_patch.conv.cost import Work
from rocm_patch.conv.spec import GRAD_INPUT, GRAD_WEIGHT, ConvSpec
from rocm_patch.conv.strategy import GEMM_RTOL, Strategy, memory_format
from rocm_patch.kernels.launch import INTERPRETED, Launch, fits, missing

_DTYPES = ("float32", "float16", "bfloat16")
# Offsets in the kernels are 32-bit.
_MOST_ELEMENTS = 2**31 - 1
# CUDA and HIP allow no more blocks in the second and third dimension of a grid.
MOST_BLOCKS = 65535
# Programs with ever new shapes must not grow the table for ever.
_MOST_PLANS = 4096


class Plan(NamedTuple):
    """How one spec is computed.

    Attributes:
        launches: the kernels.
        run: computes the result from two operands as `Strategy.run` takes them.
        workspace_bytes: as `Strategy.workspace_bytes`.
    """

    launches: tuple[Launch, ...]
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    workspace_bytes: int


def sizes_of(spec: ConvSpec) -> dict[str, int]:
    """The integer arguments that the kernels call sizes: N, G, C, K, D to OW, KD to KW, SD to LW."""
    missing_dims = 3 - len(spec.kernel)
    names = {"N": spec.batch, "G": spec.groups, "C": spec.weight[1], "K": spec.weight[0] // spec.groups}
    for letters, values, fill in (
        (("D", "H", "W"), spec.spatial, 1),
        (("OD", "OH", "OW"), spec.out, 1),
        (("KD", "KH", "KW"), spec.kernel, 1),
        (("SD", "SH", "SW"), spec.stride, 1),
        (("PD", "PH", "PW"), spec.padding, 0),
        (("LD", "LH", "LW"), spec.dilation, 1),
    ):
        names.update(zip(letters, (*[fill] * missing_dims, *values), strict=True))
    return names


def only(sizes: dict[str, int], *left_out: str) -> dict[str, int]:
    """Sizes without some."""
    return {name: value for name, value in sizes.items() if name not in left_out}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Channels first without gaps, aligned as the kernels want it; a copy only where it must be one."""
    found = tensor.contiguous()
    return found if fits(found) else found.clone()


def _rejects_all(spec: ConvSpec) -> str | None:
    """Why no kernel serves a spec, whichever it would be."""
    if not spec.device.startswith("cuda") and not INTERPRETED:
        return "Triton kernels run on GPUs"
    why = missing()
    if why is not None:
        return why
    if spec.dtype not in _DTYPES:
        return f"no kernels for {spec.dtype}"
    if max(map(math.prod, (spec.image, spec.grad, spec.weight))) > _MOST_ELEMENTS:
        return "a tensor has 2^31 elements or more"
    return None


class Fused:
    """A strategy out of plans.

    Args:
        name: of the strategy.
        plan_of: the plan of a spec that nothing rejects.
        rejects: why a spec cannot be computed this way, or None.
        work: as in `Strategy`.
        rtol: as in `Strategy`.
        is_approximate: as in `Strategy`.
        uses_blas: as in `Strategy`.
    """

    def __init__(
        self,
        name: str,
        plan_of: Callable[[ConvSpec], Plan],
        rejects: Callable[[ConvSpec], str | None],
        work: Callable[[ConvSpec], Work],
        rtol: dict[str, float] | None = None,
        is_approximate: bool = False,
        uses_blas: bool = True,
    ) -> None:
        self._plan_of, self._why_not = plan_of, rejects
        self._plans: dict[ConvSpec, Plan] = {}
        self._ready: dict[ConvSpec, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
        self.strategy = Strategy(
            name,
            self._run,
            self._workspace_bytes,
            {dtype: bound for dtype, bound in (rtol or GEMM_RTOL).items() if dtype in _DTYPES},
            self._rejects,
            work,
            is_approximate,
            self._is_ready,
            is_bounded=False,
            bind=self._bind,
            uses_blas=uses_blas,
            machine_code=self._machine_code,
        )

    def _plan(self, spec: ConvSpec) -> Plan:
        plan = self._plans.get(spec)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
                self._ready.clear()
            plan = self._plans[spec] = self._plan_of(spec)
        return plan

    def _rejects(self, spec: ConvSpec) -> str | None:
        why = _rejects_all(spec) or self._why_not(spec)
        if why is None and spec in self._plans:
            why = next(filter(None, (launch.failure() for launch in self._plans[spec].launches)), None)
        return why

    def _is_ready(self, spec: ConvSpec, wait: bool) -> bool:
        if spec not in self._ready:
            plan = self._plan(spec)
            # All of them are asked before one is waited for, so that they are compiled side by side.
            known = [launch.is_ready() for launch in plan.launches]
            if not all(known) and not (wait and all(launch.is_ready(wait) for launch in plan.launches)):
                return False
            run = plan.run
            if spec.device.startswith("cuda"):
                run = partial(_on_device, torch.device(spec.device).index or 0, run)
            self._ready[spec] = run
        return True

    def _bind(self, spec: ConvSpec) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        run = self._ready.get(spec)
        if run is None:
            if not self._is_ready(spec, True):
                raise RuntimeError(f"{self.strategy.name} cannot compute {spec}: {self._rejects(spec)}")
            run = self._ready[spec]
        return run

    def _machine_code(self, spec: ConvSpec) -> tuple[bytes, ...] | None:
        if spec not in self._ready:
            return None
        return tuple(launch.machine_code() for launch in self._plan(spec).launches)

    def _run(self, spec: ConvSpec, first: torch.Tensor, second: torch.Tensor, budget: int) -> torch.Tensor:
        return self._bind(spec)(first, second)

    def _workspace_bytes(self, spec: ConvSpec, budget: int) -> int:
        return self._plan(spec).workspace_bytes


def _on_device(
    device: int,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    first: torch.Tensor,
    second: torch.Tensor,
) -> torch.Tensor:
    if torch._C._cuda_getDevice() == device:
        return run(first, second)
    with torch.cuda.device(device):
        return run(first, second)


def copies_to_first(spec: ConvSpec) -> int:
    """Bytes of what `dense` copies where operands are not channels first."""
    if not spec.channels_last:
        return 0
    return (math.prod(spec.image) + math.prod(spec.grad) + math.prod(spec.weight)) * spec.itemsize


_ENTRIES = 256


def reduction(spec: ConvSpec, length: int, splits: int) -> Launch:
    """The kernel that sums float32 parts (splits, length) in order."""
    return Launch(
        "layout", "reduce", ("float32", spec.dtype), {"LENGTH": length, "SPLITS": splits}, {"ENTRIES": _ENTRIES},
        (cdiv(length, _ENTRIES),), spec.device, aligned=("LENGTH",),
    )  # fmt: skip


def too_many_blocks(*launches: Iterable[int]) -> bool:
    """Whether a grid's second or third dimension is larger than the cards take."""
    return any(size > MOST_BLOCKS for grid in launches for size in list(grid)[1:])


def result_of(spec: ConvSpec, like: torch.Tensor) -> torch.Tensor:
    """Memory for a result in channels first, or in the spec's format."""
    if spec.direction == GRAD_WEIGHT:
        return like.new_empty(spec.weight)
    shape = spec.image if spec.direction == GRAD_INPUT else spec.grad
    if spec.channels_last:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(spec))
    return like.new_empty(shape)

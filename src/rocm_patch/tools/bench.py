"""`rocm-patch bench`: what convolutions cost here, ours and other people's, and whether they are right.

One row per layer, element type, contender and mode. Correctness gates speed: a result that is wrong, or not there,
has no time, and the row says why.
"""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rocm_patch._version import __version__
from rocm_patch.tools.bench_clock import Clock, measure_rates, no_tf32, one_thread, settle
from rocm_patch.tools.bench_layers import Layer
from rocm_patch.tools.bench_means import summary
from rocm_patch.tools.bench_peers import Contender, plain, served_by

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
_DIRECTIONS = {"forward": ("forward",), "forward_backward": ("forward", "grad_input", "grad_weight")}
MODES = tuple(_DIRECTIONS)
# What a contender may raise where it cannot do a layer; what torch.compile raises is among them.
_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, OSError, ImportError)


@dataclass
class Row:
    """What one contender does with one layer.

    Attributes:
        layer, count: the layer's name, and how often the model has it.
        image, weight, stride, padding, dilation, groups, channels_last: its geometry.
        dtype, mode, contender, kind: what was measured.
        ms: median time of a call in milliseconds as users have it, the host's work included.
        device_ms: likewise with the GPU busy before, so that the host's work does not show.
        mib: peak of the memory allocated beyond what was before the call, the result included, in MiB.
        error: relative error against float64, the worst of the results.
        bound: what the error may be.
        roofline: best possible time over `ms`; Winograd's algorithms save products, and small operands stay in the
            cache, so it can exceed 1.
        strategy: what served within the override.
        calls: how many were timed.
        why: why there is no time.
    """

    layer: str
    count: int
    image: list[int]
    weight: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    channels_last: bool
    dtype: str
    mode: str
    contender: str
    kind: str
    ms: float | None = None
    device_ms: float | None = None
    mib: float | None = None
    error: float | None = None
    bound: float | None = None
    roofline: float | None = None
    strategy: str | None = None
    calls: int = 0
    why: str | None = None


@dataclass
class Bench:
    """All that is to be measured, in this order: layers, types, contenders, modes.

    Attributes:
        stopped: why nothing more could be measured, or None.
        rates: see `measure_rates`; there once measuring has begun.
    """

    device: str
    layers: Sequence[Layer]
    dtypes: Sequence[str]
    contenders: Sequence[Contender]
    channels_last: bool = False
    quick: bool = False
    stopped: str | None = None
    rates: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers) * len(self.dtypes) * len(self.contenders) * len(MODES)

    def rows(self) -> Iterator[Row]:
        """Measure; each row is given as soon as it is there. Takes back every patch that is in force first."""
        from rocm_patch import api

        api.disable_all_patches()
        with no_tf32(), one_thread(self.quick):
            clock = Clock(self.device, self.quick)
            self.rates = measure_rates(clock, self.dtypes, self.quick)
            for layer in self.layers:
                for dtype in self.dtypes:
                    operands = _operands(layer, dtype, self.device, self.channels_last)
                    exact = _exact(layer, operands)
                    for contender in self.contenders:
                        for row in self._of(layer, dtype, contender, operands, exact, clock):
                            yield row
                            if self.stopped is not None:
                                return

    def _of(
        self,
        layer: Layer,
        dtype: str,
        contender: Contender,
        operands: Sequence[torch.Tensor],
        exact: Sequence[torch.Tensor],
        clock: Clock,
    ) -> Iterator[Row]:
        """One contender in every mode."""
        import torch

        case = layer.case
        with contender.setting():
            for mode in MODES:
                row = Row(
                    layer.name, layer.count, list(case.image), list(case.weight), list(case.stride),
                    list(case.padding), list(case.dilation), case.groups, self.channels_last, dtype, mode,
                    contender.name, contender.kind,
                )  # fmt: skip
                try:
                    with torch.set_grad_enabled(mode != "forward"):
                        measure(row, layer, contender, operands, exact, clock)
                except _FAILURES as error:
                    lines = str(error).strip().splitlines() or [""]
                    row.ms, row.why = None, f"failed: {type(error).__name__}: {lines[0][:300]}"
                    self.stopped = _lost_device(error, row)
                if row.ms is not None and self.rates["gemm_tflops"][dtype] is not None:
                    row.roofline = self._best_ms(layer, row) / row.ms
                yield row
        if self.device != "cpu" and self.stopped is None:
            torch.cuda.empty_cache()

    def _best_ms(self, layer: Layer, row: Row) -> float:
        """Of all directions, each at the measured rate of products or of copies, whichever takes longer."""
        itemsize = layer.case.spec("forward", row.dtype).itemsize
        products = layer.flops() / (1e9 * self.rates["gemm_tflops"][row.dtype])
        traffic = layer.elements() * itemsize / (1e6 * self.rates["copy_gb_per_s"])
        return float(len(_DIRECTIONS[row.mode]) * max(products, traffic))

    def document(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What was measured as the JSON document of the command line."""
        import torch

        on_gpu = self.device != "cpu"
        cudnn: Any = torch.backends.cudnn
        listed = [asdict(row) for row in rows]
        return {
            "schema_version": SCHEMA_VERSION,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else _cpu_name(),
            "versions": {
                "rocm_patch": __version__, "torch": torch.__version__, "hip": torch.version.hip,
                "cuda": torch.version.cuda, "cudnn": cudnn.version() if on_gpu else None,
                "python": platform.python_version(), "system": platform.platform(terse=True),
            },
            "threads": torch.get_num_threads(),
            "command": shlex.join(["rocm-patch", *sys.argv[1:]]),
            "quick": self.quick,
            "stopped": self.stopped,
            "rates": self.rates,
            "rows": listed,
            "summary": summary(listed),
        }  # fmt: skip


def _cpu_name() -> str:
    return platform.processor() or platform.machine()


def _lost_device(error: BaseException, row: Row) -> str | None:
    """Why nothing more can be measured in this process, if that is so."""
    from rocm_patch.trust.native_errors import blame

    if not isinstance(error, RuntimeError) or blame(error) != "device":
        return None
    return f"{row.contender} on {row.layer}, {row.dtype}, {row.mode}, made the GPU unusable for this process"


def _operands(layer: Layer, dtype: str, device: str, channels_last: bool) -> list[torch.Tensor]:
    """Image, weight and the gradient of the result; the first two require grad."""
    import torch

    generator = torch.Generator(device=device).manual_seed(0)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    made = []
    for shape in (layer.case.image, layer.case.weight, layer.out):
        tensor = torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
        made.append(tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format)))
    return [made[0].requires_grad_(), made[1].requires_grad_(), made[2]]


def _exact(layer: Layer, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The result and both gradients in float64, without the vendor's library; on the CPU if memory is short."""
    import torch

    def compute(device: str | None) -> list[torch.Tensor]:
        image, weight, grad = (t.detach().to(device or t.device, torch.float64) for t in operands)
        result = plain(layer.case)(image.requires_grad_(), weight.requires_grad_())
        return [result.detach(), *torch.autograd.grad(result, (image, weight), grad)]

    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        try:
            return compute(None)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
        return compute("cpu")


def measure(
    row: Row,
    layer: Layer,
    contender: Contender,
    operands: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    clock: Clock,
) -> None:
    """Fill a row in: the error first, and times only where it is within its bound.

    Args:
        row: says which type and mode.
        layer: what is computed.
        contender: who computes it; its setting has been entered.
        operands: image, weight, gradient of the result.
        exact: the result and the gradients of image and weight in float64.
        clock: of the operands' device.
    """
    import torch

    image, weight, grad = operands
    row.why = contender.why_not(layer.case, image, weight, _DIRECTIONS[row.mode])
    if row.why is not None:
        return
    row.bound = contender.rtol[row.dtype]
    convolve = contender.prepare(layer.case)

    def call() -> tuple[torch.Tensor, ...]:
        result = convolve(image, weight)
        if row.mode == "forward":
            return (result,)
        return (result, *torch.autograd.grad(result, (image, weight), grad))

    if contender.kind != "peer":
        settle(call, clock.device)
    results = clock.warm_up(call)
    errors = [_error(found, right) for found, right in zip(results, exact, strict=False)]
    del results
    if contender.kind != "peer":
        row.strategy = served_by(clock.device)
    if not all(map(math.isfinite, errors)):
        row.why = "wrong: not finite, or of another shape"
        return
    row.error = max(errors)
    if row.error > row.bound:
        row.why = f"wrong: error {row.error:.1e} over {row.bound:.0e}"
    elif contender.kind == "strategy" and row.strategy != contender.name:
        row.why = f"failed: {row.strategy} served instead"
    else:
        for name, value in clock.times(call).items():
            setattr(row, name, value)


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    """||found - right|| / ||right||; NaN for another shape."""
    if found.shape != right.shape:
        return math.nan
    return float((found.detach().to(right.device, right.dtype) - right).norm() / right.norm())

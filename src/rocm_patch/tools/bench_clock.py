"""How `rocm-patch bench` measures: a clock for one device, and what the device can do at best."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from rocm_patch.settings import LOGGER
from rocm_patch.tools.bench_peers import is_compiling, override

_SLEEP_MS = 0.3  # queued before a call, and twice the host's time for it: so the host runs ahead of the GPU
_SLOW_CALL = 1.0  # seconds above which a call is not repeated ten times
_SHORT_CALLS_MS = 50.0  # short calls are repeated for so long, since the host's work varies more than the GPU's
_MOST_CALLS = 50
_FEWEST_WARM_UPS = 3  # of calls that are not short
_MOST_WAIT = 120.0  # seconds that kernels may take to compile in the background

_Result = TypeVar("_Result")


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """TF32 off, and as it was afterwards."""
    import torch

    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Torch works with one thread on the CPU: on small tensors, those of a busy machine wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Clock:
    """Times calls on one device.

    Args:
        device: torch's name of it.
        quick: one call after one, instead of ten or more after ten.
    """

    def __init__(self, device: str, quick: bool = False) -> None:
        import torch

        self.device, self._on_gpu = device, device != "cpu"
        self._cuda: Any = torch.cuda
        self._warm_ups, self._calls = (1, 1) if quick else (10, 10) if self._on_gpu else (1, 5)
        self._cycles_a_ms = 0.0
        if self._on_gpu:
            # What a cycle is differs from GPU to GPU.
            taken = min(self._one(lambda: self._cuda._sleep(100_000)) for _ in range(5))
            self._cycles_a_ms = 100_000 / max(taken, 1e-3)

    def finish(self) -> None:
        """Wait until the device has done what it was given."""
        if self._on_gpu:
            self._cuda.synchronize()

    def _one(self, call: Callable[[], object], sleep_ms: float = 0.0) -> float:
        self.finish()
        if not self._on_gpu:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        if sleep_ms:
            self._cuda._sleep(int(self._cycles_a_ms * sleep_ms))
        start.record()
        call()
        end.record()
        self.finish()
        return float(start.elapsed_time(end))

    def warm_up(self, call: Callable[[], _Result]) -> _Result:
        """Call until nothing is done for the first time; the last result."""
        begin = time.perf_counter()
        for done in range(1, self._warm_ups + 1):
            result = call()
            if done >= _FEWEST_WARM_UPS and 1e3 * (time.perf_counter() - begin) > _SHORT_CALLS_MS:
                break
        return result

    def times(self, call: Callable[[], object]) -> dict[str, Any]:
        """`ms`, `device_ms`, `mib` and `calls` of a `Row`, for a call that is warm."""
        first = self._one(call)
        calls = self._calls if first < 1e3 * _SLOW_CALL else min(self._calls, 3)
        if self._on_gpu and calls > 1:
            calls = max(calls, min(_MOST_CALLS, round(_SHORT_CALLS_MS / first)))
        found: dict[str, Any] = {"ms": self.median(call, calls), "calls": calls}
        if self._on_gpu:
            found["device_ms"] = self.median(call, calls, True)
            self._cuda.reset_peak_memory_stats()
            before = self._cuda.memory_allocated()
            call()
            self.finish()
            found["mib"] = (self._cuda.max_memory_allocated() - before) / 2**20
        return found

    def median(self, call: Callable[[], object], calls: int, ahead: bool = False) -> float:
        """Of the times of so many calls, in milliseconds.

        Args:
            call: what is timed.
            calls: how often.
            ahead: of the GPU alone: it is given work first, which lasts until the host has started the call.
        """
        sleep_ms = 0.0
        if ahead and self._on_gpu:
            spent = []
            for _ in range(3):
                self.finish()
                begin = time.perf_counter()
                call()
                spent.append(1e3 * (time.perf_counter() - begin))
            sleep_ms = _SLEEP_MS + 2 * max(spent)
        return statistics.median(self._one(call, sleep_ms) for _ in range(calls))


def measure_rates(clock: Clock, dtypes: Sequence[str], quick: bool) -> dict[str, Any]:
    """What this device can do at best: matrix products, copies, and the host's time for a tiny convolution.

    Returns:
        `gemm_tflops` by type (None where torch has no such product), `copy_gb_per_s` (10^9 bytes, read and written
        ones counted), and `host_us`: the microseconds of a (1, 8, 4, 4) by (8, 8, 3, 3) convolution, `ours` and
        `native`.
    """
    import torch

    device, calls = clock.device, 3 if quick else 10
    size = 512 if quick else 2048 if device == "cpu" else 8192
    gemm: dict[str, float | None] = {}
    for dtype in dtypes:
        square = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        try:
            gemm[dtype] = 2e-9 * size**3 / clock.median(partial(torch.matmul, square, square), calls, True)
        except RuntimeError as error:
            LOGGER.info("torch multiplies no %s matrices on %s: %s", dtype, device, error)
            gemm[dtype] = None
    source = torch.zeros((1 << 22) if quick else (1 << 26), device=device)
    copied = (
        2e-6
        * source.numel()
        * source.element_size()
        / clock.median(partial(torch.empty_like(source).copy_, source), calls, True)
    )
    operands = (torch.randn(1, 8, 4, 4, device=device), torch.randn(8, 8, 3, 3, device=device))
    call = partial(torch.nn.functional.conv2d, *operands, padding=1)

    def host_us() -> float:
        spent = []
        for _ in range(11):  # in pieces, so that the queue of a GPU does not fill; the first warms up
            clock.finish()
            begin = time.perf_counter()
            for _ in range(100):
                call()
            spent.append(time.perf_counter() - begin)
        return 1e6 * sum(spent[1:]) / 1000

    with torch.no_grad(), one_thread():
        native = host_us()
        with override(device, "bypass"):
            settle(call, device)
            ours = host_us()
    return {"gemm_tflops": gemm, "copy_gb_per_s": copied, "host_us": {"ours": ours, "native": native}}


def settle(call: Callable[[], object], device: str) -> None:
    """Call until what is compiled in the background is there: users wait for it once."""
    call()
    deadline = time.monotonic() + _MOST_WAIT
    while is_compiling(device) and time.monotonic() < deadline:
        time.sleep(0.02)
        call()

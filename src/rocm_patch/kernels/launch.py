"""A kernel with everything but its pointers bound: what a convolution calls.

Triton's own call inspects every argument every time (28 us for 35 of them on an H200's host); the sizes of a
convolution never change, so what depends on them is done once here, and a call costs what the driver takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from rocm_patch.kernels.compiling import COMPILER, Compilation
from rocm_patch.kernels.variant import OLDEST_TRITON, Target, Variant, triton_version

# Where Triton runs its kernels as numpy programs, to check them without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A wider load is not made than this.
_VECTOR_BYTES = 16


@cache
def missing() -> str | None:
    """Why no kernel can be had here, or None."""
    found = triton_version()
    if found is None:
        return "Triton is not installed"
    if found < OLDEST_TRITON:
        return f"Triton {found[0]}.{found[1]} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    return None


@cache
def target_of(device: int) -> Target:
    """What the kernels of a device are compiled for; an H200 where no GPU is there to be asked."""
    if not torch.cuda.is_available():
        return Target("cuda", 90, 32)
    if torch.version.hip:
        properties = torch.cuda.get_device_properties(device)
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.warp_size)
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor, 32)


@cache
def multiprocessors(device: str) -> int:
    """How many programs a device runs side by side at least (AMD: compute units); an H200's where there is no GPU."""
    where = torch.device(device)
    if where.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(where).multi_processor_count if torch.cuda.is_available() else 132


class Launch:
    """One kernel for one set of sizes on one device.

    Args:
        module: of this package, `gemm` for example.
        name: of the function.
        types: torch's names of its pointers' element types.
        integers: its integer arguments by name, in its order.
        constants: its constants by name.
        grid: programs in up to three dimensions.
        device: torch's name of the device.
        warps: of a program.
        stages: of the software pipeline.
        aligned: integer arguments whose divisibility widens loads and stores; of each the largest power of two up to
            a vector of the first pointer's type counts.
    """

    def __init__(
        self,
        module: str,
        name: str,
        types: tuple[str, ...],
        integers: Mapping[str, int],
        constants: Mapping[str, int | bool],
        grid: tuple[int, ...],
        device: str,
        warps: int = 4,
        stages: int = 2,
        aligned: tuple[str, ...] = (),
    ) -> None:
        vector = _VECTOR_BYTES // (4 if types[0] == "float32" else 2)
        divisors = tuple((name, vector) for name in aligned if integers[name] % vector == 0)
        self.variant = Variant(module, name, types, divisors, tuple(constants.items()), warps, stages)
        self.grid = (*grid, 1, 1)[:3]
        self._integers, self._constants = tuple(integers.values()), dict(constants)
        self._device = torch.device(device).index or 0
        self._compilation: Compilation | None = None
        self._run: Callable[..., Any] | None = self._interpret if INTERPRETED else None

    def failure(self) -> str | None:
        """Why it cannot be had, None where nothing speaks against it so far."""
        return None if self._compilation is None else self._compilation.failure

    def is_ready(self, wait: bool = False) -> bool:
        """Whether it can be called; has it compiled at the first question.

        Args:
            wait: come back when that is decided.
        """
        if self._run is not None:
            return True
        if self._compilation is None:
            self._compilation = COMPILER.ask(self.variant, target_of(self._device))
        if wait:
            self._compilation.over.wait()
        if not self._compilation.over.is_set() or self._compilation.failure is not None:
            return False
        if torch.cuda.is_current_stream_capturing():
            return False  # a module cannot be loaded into a CUDA graph
        self._load()
        return True

    def _load(self) -> None:
        with torch.cuda.device(self._device):
            kernel = self.variant.compiled(target_of(self._device))
            run = kernel.run
        fixed = (kernel.function, kernel.packed_metadata, None, None, None)
        tail = (*self._integers, *self._constants.values())
        x, y, z = self.grid
        device, stream_of = self._device, torch._C._cuda_getCurrentRawStream

        def launch(*tensors: torch.Tensor) -> None:
            run(x, y, z, stream_of(device), *fixed, *[tensor.data_ptr() for tensor in tensors], *tail)

        self._run = launch

    def machine_code(self) -> bytes:
        """The file that the kernel was compiled to, for AMD an ELF code object; empty in Triton's interpreter."""
        if INTERPRETED:
            return b""
        code = self.variant.compiled(target_of(self._device)).asm
        return bytes(code.get("hsaco") or code.get("cubin") or b"")

    def _interpret(self, *tensors: Any) -> None:
        self.variant.function()[self.grid](*tensors, *self._integers, **self._constants)

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Start it on the current stream of its device, which must be the current device.

        Args:
            tensors: dense, aligned to 16 bytes, in the order of its pointers; kept alive by the caller until its
                stream has passed the kernel, as torch's allocator does.

        Raises:
            RuntimeError: the driver refuses it.
        """
        assert self._run is not None, "is_ready() comes first"
        self._run(*tensors)


def fits(*tensors: torch.Tensor) -> bool:
    """Whether kernels may take these as they are: aligned as they were compiled for."""
    return all(tensor.data_ptr() % _VECTOR_BYTES == 0 for tensor in tensors)

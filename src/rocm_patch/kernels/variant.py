"""One kernel as it is compiled: source, types, constants, options. Needs Triton, no torch and no GPU."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

# What the kernels were compiled with (tests/test_kernels.py). Releases before 3.5 want ROCm's linker for AMD cards.
OLDEST_TRITON = (3, 5)
# How a pointer to an element of torch's type is called in Triton's signatures.
_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
# What `Launch` passes pointers with.
POINTER_BYTES = 16


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
        backend: `cuda` or `hip`.
        arch: 90 for example, or `gfx1010`.
        warp_size: threads in a warp.
    """

    backend: str
    arch: str | int
    warp_size: int


@dataclass(frozen=True)
class Variant:
    """A kernel, ready to be compiled.

    Attributes:
        module: `gemm` for example, a module of this package.
        name: of the function in it.
        types: torch's names of the element types of its pointers, in order; they come first.
        divisors: integer arguments that are known to be divisible, and by what.
        constants: its `constexpr` arguments, which come last.
        warps: of a program.
        stages: of the software pipeline.
    """

    module: str
    name: str
    types: tuple[str, ...]
    divisors: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, int | bool], ...]
    warps: int
    stages: int

    def function(self) -> Any:
        """Triton's function."""
        return getattr(importlib.import_module(f"rocm_patch.kernels.{self.module}"), self.name)

    def compiled(self, target: Target) -> Any:
        """Triton's `CompiledKernel`, from its cache on disk where it is there.

        Raises:
            Exception: whatever Triton raises where it cannot compile it; some releases end the process instead.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function = self.function()
        names = list(function.arg_names)
        constants = dict(self.constants)
        signature = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for index, name in enumerate(names):
            if index < len(self.types):
                signature[name] = _TYPES[self.types[index]]
                attributes[(index,)] = [["tt.divisibility", POINTER_BYTES]]
            else:
                signature[name] = "constexpr" if name in constants else "i32"
        for name, divisor in self.divisors:
            attributes[(names.index(name),)] = [["tt.divisibility", divisor]]
        source = ASTSource(
            fn=function,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=attributes,
        )
        return triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options={"num_warps": self.warps, "num_stages": self.stages},
        )

    def __str__(self) -> str:
        constants = " ".join(f"{name}={int(value)}" for name, value in self.constants)
        return f"{self.module}.{self.name} {' '.join(self.types)} {constants} warps={self.warps} stages={self.stages}"


def resources(kernel: Any) -> dict[str, int]:
    """What a compiled AMD kernel takes: vector and scalar registers, those spilled, bytes of LDS and of scratch.

    Vector registers are spilled to scratch, which is memory; scalar ones to lanes of vector registers.

    Read from the metadata of the code object that LLVM writes into the assembly ("Code Object V5 Metadata" in LLVM's
    AMDGPU user guide).
    """
    text = kernel.asm["amdgcn"]
    fields = {
        "vgprs": "vgpr_count", "vgpr_spills": "vgpr_spill_count", "sgprs": "sgpr_count",
        "sgpr_spills": "sgpr_spill_count", "lds_bytes": "group_segment_fixed_size",
        "scratch_bytes": "private_segment_fixed_size",
    }  # fmt: skip
    found = {}
    for name, field in fields.items():
        match = re.search(rf"\.{field}:\s+(\d+)", text)
        found[name] = int(match.group(1)) if match else 0
    return found


def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the installed Triton, None where there is none."""
    try:
        from importlib.metadata import PackageNotFoundError, version

        for package in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
            try:
                major, minor = version(package).split(".")[:2]
                return int(major), int(minor)
            except PackageNotFoundError:
                continue
    except ValueError:
        return None
    return None

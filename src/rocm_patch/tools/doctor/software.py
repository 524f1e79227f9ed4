"""The torch build: its kind, its device code against the cards, its versions, and what it sees of the GPU."""

from __future__ import annotations

import ctypes.util
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rocm_patch.machine import catalog, fit
from rocm_patch.machine.build import TorchBuild, version_numbers
from rocm_patch.tools.doctor.finding import Context, Finding, failure, ok, warning

_TIMEOUT_S = 60.0

# Each in a child of its own: a driver that hangs or a library that crashes must not take doctor along.
_ASK_HIP = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
count = ctypes.c_int(0)
code = library.hipGetDeviceCount(ctypes.byref(count))
library.hipGetErrorString.restype = ctypes.c_char_p
print(json.dumps({"code": code, "count": count.value, "error": library.hipGetErrorString(code).decode()}))
"""
_ASK_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(place) for place in range(count)]
print(json.dumps({"version": torch.__version__, "count": count, "names": names}))
"""


def torch_build(context: Context) -> Iterable[Finding]:
    """Whether there is a torch, and whether it is a ROCm build where it must be one."""
    build, machine = context.build, context.machine
    command = fit.torch_command(machine.gpus) if context.has_card else "python -m pip install torch torchvision"
    if build is None:
        yield warning(
            f"{context.python} has no torch",
            "the active environment's Python is looked at, else the first on PATH; activate the one that has torch, "
            "or install it",
            command,
        )
    elif build.kind == "hip" or not context.has_card or (build.kind == "cuda" and machine.has_nvidia):
        yield ok(f"torch {build.version}, a {build.kind} build")
    else:
        summary = f"torch {build.version} is a {build.kind} build on a machine with an AMD GPU"
        why = "only a ROCm build can use the card; pip takes the CUDA build where no index is given"
        only_integrated = bool(machine.gpus) and all(gpu.integrated for gpu in machine.gpus)
        yield (warning if only_integrated else failure)(summary, why, command, fit.WHEELS_SOURCE)


def device_code(context: Context) -> Iterable[Finding]:
    """Whether the build has code for each card, by itself or under an override; native wheels outrank overrides."""
    for entry in context.used:
        gpu = entry.gpu
        if entry.kind == "native":
            yield ok(f"{gpu.gfx}: {entry.why}", source=entry.source)
        elif entry.kind == "override":
            summary = f"{gpu.gfx} runs code of another chip under {fit.OVERRIDE}={entry.value}"
            if fit.has_native_wheel(gpu.gfx):
                yield warning(
                    summary,
                    "there are torch wheels with native code for it, which are better than any override",
                    fit.native_torch_command(gpu.gfx),
                    fit.WHEELS_SOURCE,
                )
            else:
                yield ok(summary, entry.why, source=entry.source)
        elif context.build is not None and (not gpu.integrated or len(context.used) == 1):
            yield failure(
                f"torch {context.build.version} has no code that {gpu.gfx} can run",
                entry.why,
                fit.native_torch_command(gpu.gfx),
                f"{fit.WHEELS_SOURCE}; {entry.source}",
            )


def versions(context: Context) -> Iterable[Finding]:
    """Whether torch, ROCm, Python and NumPy are versions that belong together."""
    build = context.build
    if build is None:
        return
    series = ".".join(map(str, version_numbers(build.version)[:2]))
    row = next((row for row in catalog.releases() if row.torch == series), None)
    if row is None:
        return
    source = "; ".join(row.sources[:2])
    rocm = _official_rocm(build)
    if rocm and not any(version_numbers(known)[:2] == rocm for known in row.rocm):
        yield warning(
            f"no wheel of torch {series} was published for ROCm {'.'.join(map(str, rocm))}",
            f"known are {', '.join(row.rocm)}; another build may work, nothing is known of it",
            f"python -m pip install 'torch=={series}.*' --index-url https://download.pytorch.org/whl/rocm{row.rocm[-1]}",
            source,
        )
    python = _python_of(build)
    if python and not version_numbers(row.python[0]) <= python <= version_numbers(row.python[1]):
        yield warning(
            f"torch {series} was published for Python {' to '.join(row.python)}, not {'.'.join(map(str, python))}",
            "a build for another Python is the user's own",
            f"python{row.python[1]} -m venv .venv",
            source,
        )
    numpy = _numpy_beside(build)
    if row.numpy == "<2" and version_numbers(numpy)[:1] >= (2,):
        yield failure(
            f"NumPy {numpy} beside torch {series}, which was built for NumPy 1",
            "torch's NumPy bridge fails: 'Numpy is not available', '_ARRAY_API not found'",
            "python -m pip install 'numpy<2'",
            source,
        )
    else:
        beside = f", NumPy {numpy}" if numpy else ""
        yield ok(f"torch {build.version}{beside}")


def _official_rocm(build: TorchBuild) -> tuple[int, ...]:
    """The ROCm version of a wheel named as pytorch.org's are; AMD's own have longer names or companions."""
    found = re.fullmatch(r"[\d.]+\+rocm(\d+\.\d+)(?:\.\d+)?", build.version)
    is_amds = any(build.folder.parent.glob("*rocm_sdk*")) or any(build.folder.parent.glob("amd_torch_device_*"))
    return version_numbers(found[1]) if found and not is_amds else ()


def _python_of(build: TorchBuild) -> tuple[int, ...]:
    found = re.search(r"/python(\d+\.\d+)/", str(build.folder))
    return version_numbers(found[1]) if found else ()


def _numpy_beside(build: TorchBuild) -> str:
    for entry in sorted(build.folder.parent.glob("numpy-*.dist-info")):
        return entry.name.removeprefix("numpy-").removesuffix(".dist-info")
    return ""


def libraries(context: Context) -> Iterable[Finding]:
    """Whether rocBLAS and MIOpen have files for the chip that the card reports."""
    found = context.libraries
    for entry in context.used:
        reported = fit.override_target(entry.value) if entry.value else entry.gpu.gfx
        if not entry.is_usable:
            continue
        if found.rocblas and reported not in found.rocblas:
            yield failure(
                f"rocBLAS in {found.rocblas_folder} has no kernels for {reported}",
                "every matrix product on the card will abort with 'Cannot read TensileLibrary.dat'",
                fit.native_torch_command(entry.gpu.gfx),
                "https://github.com/ROCm/rocBLAS/issues/1339",
            )
        if found.miopen and not any(name.startswith(reported) for name in found.miopen):
            yield ok(
                f"MIOpen has no database for {reported}: harmless, the first run of each "
                "native convolution compiles and searches",
                source="ROCm/MIOpen@2d1fd997:docs/conceptual/cache.rst",
            )
    for folder in context.environ.get("LD_LIBRARY_PATH", "").split(":"):
        own = context.build and list((context.build.folder / "lib").glob("libamdhip64.so*"))
        others = sorted(Path(folder).glob("libamdhip64.so.*")) if folder.startswith("/") else []
        if own and others and Path(folder) != own[0].parent:
            yield warning(
                f"LD_LIBRARY_PATH puts {others[0]} before the one in torch's wheel",
                "two ROCm versions in one process crash or see no GPU",
                "unset LD_LIBRARY_PATH",
                "https://github.com/ROCm/legacy-rocm-build/issues/4466",
            )


def seen_by_hip(context: Context) -> Iterable[Finding]:
    """How many GPUs the HIP runtime sees, asked of the library that torch would load."""
    library = _hip_library(context)
    if not context.machine.can_have_amd_gpu or library is None:
        return
    answer, error = _ask([context.python, "-c", _ASK_HIP, library], context)
    expected = len(context.fits) or len(context.machine.gpus)
    if answer is None:
        yield failure(
            f"{library} gives no answer: {error}",
            "a program that uses the GPU would end the same way",
            f"AMD_LOG_LEVEL=4 {context.python} -c 'import torch; torch.cuda.init()'",
        )
    elif answer["count"] < expected or not answer["count"]:
        said = f" ({answer['error']})" if answer["code"] else ""
        yield failure(
            f"HIP sees {answer['count']} GPUs{said}, the kernel {expected}",
            "permissions, a container without the device, a ROCm that is too old for the chip, or a variable",
            f"AMD_LOG_LEVEL=4 {context.python} -c 'import torch; torch.cuda.init()'",
            "https://github.com/ROCm/legacy-rocm-build/issues/2901",
        )
    else:
        yield ok(f"HIP sees {answer['count']} GPUs")


def _hip_library(context: Context) -> str | None:
    folders = []
    if context.build is not None:
        site = context.build.folder.parent
        folders = [context.build.folder / "lib", *site.glob("_rocm_sdk_core*/lib")]
    folders += [*sorted(context.root.glob("opt/rocm*/lib"))]
    for folder in folders:
        for library in sorted(folder.glob("libamdhip64.so*")):
            return str(library)
    return ctypes.util.find_library("amdhip64") if str(context.root) == "/" else None


def seen_by_torch(context: Context) -> Iterable[Finding]:
    """How many GPUs torch sees, asked in a process of its own."""
    build = context.build
    if build is None or build.kind != "hip" or not context.machine.can_have_amd_gpu:
        return
    answer, error = _ask([context.python, "-c", _ASK_TORCH], context)
    if answer is None:
        yield failure(
            f"torch {build.version} cannot be asked: {error}",
            "a program that imports torch would end the same way",
            f"{context.python} -c 'import torch; print(torch.cuda.is_available())'",
        )
    elif not answer["count"]:
        yield failure(
            f"torch {build.version} sees no GPU",
            "the checks above name what stands in the way; where all are fine, the build does not fit the driver",
            f"AMD_LOG_LEVEL=4 {context.python} -c 'import torch; torch.cuda.init()'",
        )
    else:
        yield ok(f"torch sees {answer['count']}: {', '.join(answer['names'])}")


def _ask(command: list[str], context: Context) -> tuple[dict[str, Any] | None, str]:
    """A child's JSON answer, or None and what happened to the child."""
    environ = {**context.environ, "ROCM_PATCH": "0"}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no answer in {_TIMEOUT_S:.0f} s"
    except OSError as error:
        return None, str(error)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:]
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return None, ": ".join([ended, *last])
    return answer, ""


CHECKS = (torch_build, device_code, versions, libraries, seen_by_hip, seen_by_torch)

"""Where code for GPUs lies on a machine, and which files belong to one library."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.machine.folders import home_of
from rocm_patch.machine.scan.kept import identity_of, real_path

# Beside torch in site-packages: AMD's ROCm wheels, and the device code that they keep apart.
_BESIDE_TORCH = ("_rocm_sdk_*", "rocm_sdk_*", "amd_torch_device_*", "torchvision*", "torchaudio*", "aotriton*")
# Installations of ROCm, AMD's and the distributions'.
_SYSTEM = (
    "opt/rocm", "opt/rocm-*", "usr/lib*/lib[rh][oi][cp]*.so*", "usr/lib*/libMIOpen*.so*", "usr/lib*/librccl*.so*",
    "usr/lib*/rocblas", "usr/lib*/hipblaslt", "usr/lib/x86_64-linux-gnu/lib[rh][oi][cp]*.so*",
    "usr/lib/x86_64-linux-gnu/libMIOpen*.so*", "usr/lib/x86_64-linux-gnu/librccl*.so*",
    "usr/lib/x86_64-linux-gnu/rocblas", "usr/lib/x86_64-linux-gnu/hipblaslt", "usr/share/miopen/db",
)  # fmt: skip
_IN_HOME = (".cache/miopen", ".config/miopen", ".triton/cache", ".cache/rocm-patch/triton")
_NEVER_CODE = frozenset(
    (".py", ".pyc", ".pyi", ".h", ".hpp", ".cuh", ".inl", ".md", ".rst", ".json", ".yaml", ".yml", ".cmake", ".html")
)
_CHIP = re.compile(r"gfx[0-9][0-9a-f]+(?:[:-](?:xnack|sramecc)[+-])*")
_SHARED = re.compile(r"\.so(?:\.[\d.]+)?$")
# Folders whose files make one library together, and its name. Debian has a version in some.
_TOGETHER = tuple(
    (re.compile(f"(.*/(?:{folder}))(?:/|$)"), name)
    for folder, name in (
        (r"rocblas/(?:[\d.]+/)?library", "rocBLAS kernels"), (r"hipblaslt/(?:[\d.]+/)?library", "hipBLASLt kernels"),
        (r"hipsparselt/(?:[\d.]+/)?library", "hipSPARSELt kernels"), (r"miopen/db", "MIOpen databases"),
        (r"\.cache/miopen", "MIOpen's cache of kernels"), (r"\.config/miopen", "MIOpen's own records"),
        (r"aotriton\.images", "AOTriton"), (r"\.triton/cache|rocm-patch/triton", "Triton's cache"),
        (r"torchinductor_[^/]*", "inductor's cache"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A file that may hold code.

    Attributes:
        path: the file.
        identity: changes when the file does.
        library: what it belongs to.
        folder: the file itself for a shared library, else the folder of that library.
    """

    path: Path
    identity: str
    library: str
    folder: Path


def default_places(torch: Path | None, environ: Mapping[str, str], root: str = "/") -> list[Path]:
    """Where to look if nothing is named: torch and what lies beside it, the system's ROCm, the user's caches.

    Args:
        torch: the folder of the package, None where there is none.
        environ: says where the home and the caches are.
        root: a folder that stands for `/`.
    """
    places: list[Path] = []
    if torch is not None:
        places += [torch, *(path for pattern in _BESIDE_TORCH for path in sorted(torch.parent.glob(pattern)))]
    places += [path for pattern in _SYSTEM for path in sorted(Path(root).glob(pattern))]
    home = Path(root) / home_of(environ).lstrip("/")
    places += [home / name for name in _IN_HOME]
    places += [Path(environ[name]) for name in ("TRITON_CACHE_DIR", "MIOPEN_CUSTOM_CACHE_DIR") if environ.get(name)]
    places += sorted(Path(root).glob(f"tmp/torchinductor_{environ.get('USER', '')}*")) if environ.get("USER") else []
    return [place for place in places if os.path.exists(place)]  # noqa: PTH110  (Path's may raise)


def files(places: Iterable[Path]) -> Iterator[Found]:
    """Every regular file in these files and folders that may hold code, each once whatever links lead to it."""
    seen: set[tuple[int, int]] = set()
    for place in places:
        for path in _below(real_path(place)):
            try:
                status = path.stat()
            except OSError:  # gone since, or a link to nothing
                continue
            key = (status.st_dev, status.st_ino)
            if not stat.S_ISREG(status.st_mode) or key in seen:
                continue
            seen.add(key)
            real = real_path(path) if path.is_symlink() else path
            library, folder = _library_of(real)
            identity = identity_of(real)
            if identity is not None:
                yield Found(real, identity, library, folder)


def _below(place: Path) -> Iterator[Path]:
    if not os.path.isdir(place):  # noqa: PTH112  (Path's may raise)
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1] not in _NEVER_CODE:  # noqa: PTH122  (a million names)
                yield Path(folder, name)


def _library_of(path: Path) -> tuple[str, Path]:
    for pattern, name in _TOGETHER:
        found = pattern.match(path.as_posix())
        if found and not _SHARED.search(path.name):
            return name, Path(found[1])
    # One file for each chip: rocfft_kernel_cache_gfx1030.db, torch_gfx1010.kpack.
    common = _CHIP.sub("gfx*", path.name)
    return common, path.with_name(common)

"""The installed torch build, read from its files: torch is not imported and no GPU is touched."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rocm_patch.machine import catalog
from rocm_patch.machine.device_code import cached_targets_of

if TYPE_CHECKING:
    from rocm_patch.machine.scan.kept import Harm

_ASSIGNMENT = re.compile(r"^(__version__|cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
# Where a torch wheel, AMD's ROCm wheels beside it, and a system installation keep data files.
_LIBRARY_ROOTS = ("torch", "_rocm_sdk_*", "rocm_sdk_*")
_SYSTEM_ROOTS = ("opt/rocm", "opt/rocm-*", "usr")
# Device code of libtorch_hip.so; the list that torch was built for stands in libtorch_python.so where that is
# compressed.
_DEVICE_LIBRARIES = ("libtorch_hip*.so*", "libtorch_python.so*")


@dataclass(frozen=True)
class TorchBuild:
    """One torch installation.

    Attributes:
        folder: the package's folder.
        version: `1.13.1+rocm5.2` for example.
        hip: HIP version it was built with, None if it was not.
        cuda: CUDA version it was built with, None if it was not.
    """

    folder: Path
    version: str
    hip: str | None
    cuda: str | None

    @property
    def kind(self) -> str:
        """`hip`, `cuda` or `cpu`."""
        return "hip" if self.hip else "cuda" if self.cuda else "cpu"

    @cached_property
    def targets(self) -> frozenset[str]:
        """The gfx targets that its device code is for; empty for other builds, and where nothing can be read.

        From the bundles in its libraries (see `device_code`) and AMD's separate per-device packages
        (`amd-torch-device-gfx1010`).
        """
        if self.kind != "hip":
            return frozenset()
        found = {
            part
            for entry in self.folder.parent.glob("amd_torch_device_gfx*")
            if (part := re.match(r"amd_torch_device_(gfx[0-9a-f]+)-", entry.name + "-")) is not None
        }
        targets = {part[1] for part in found}
        for pattern in _DEVICE_LIBRARIES:
            for library in sorted((self.folder / "lib").glob(pattern)):
                if library.is_file():
                    targets |= cached_targets_of(library)
        return frozenset(targets)

    def harm(self, card: str, reported: str, environ: Mapping[str, str]) -> Harm | None:
        """What `rocm-patch scan` has found in torch's own device code for a chip, run on a card; None if not known.

        Args:
            card: the chip that would run it, `gfx1010`.
            reported: the chip whose code is loaded, `gfx1030`.
            environ: says where scans are remembered.
        """
        from rocm_patch.machine.scan.kept import Kept  # here: few processes ask, and it brings SQLite

        kept = Kept(environ, card, reported)
        found = kept.harm(sorted((self.folder / "lib").glob("libtorch_hip*.so*")), reported)
        kept.close()
        return found

    def carries(self, gfx: str) -> bool | None:
        """Whether this build has native code for a chip, by itself or for its generic target; None if unknown."""
        if not self.targets:
            return None if self.kind == "hip" else False
        known = catalog.arch(gfx)
        return gfx in self.targets or bool(known and known.generic and known.generic in self.targets)


@dataclass(frozen=True)
class Libraries:
    """The data files of AMD's libraries that this torch would use.

    Attributes:
        rocblas: gfx targets that rocBLAS has kernels for.
        rocblas_folder: where these lie, empty if nowhere.
        miopen: MIOpen's databases, by file name, without those of compiled kernels.
        miopen_folder: where these lie, empty if nowhere.
    """

    rocblas: frozenset[str]
    rocblas_folder: str
    miopen: tuple[str, ...]
    miopen_folder: str


def find_libraries(build: TorchBuild | None, root: str = "/") -> Libraries:
    """The rocBLAS and MIOpen files beside a build, else those of the system below `root`."""
    bases: list[Path] = []
    if build is not None:
        site = build.folder.parent
        bases += [path for pattern in _LIBRARY_ROOTS for path in sorted(site.glob(pattern)) if path.is_dir()]
    bases += [path for pattern in _SYSTEM_ROOTS for path in sorted(Path(root).glob(pattern)) if path.is_dir()]
    rocblas_folder, rocblas = _first(bases, ("lib/rocblas/library", "lib64/rocblas/library"), "*gfx*")
    miopen_folder, miopen = _first(bases, ("share/miopen/db", "lib/miopen/db"), "*db*")
    targets = {match[0] for name in rocblas for match in [re.search(r"gfx[0-9a-f]+", name)] if match}
    return Libraries(frozenset(targets), rocblas_folder, tuple(miopen), miopen_folder)


def _first(bases: list[Path], places: tuple[str, ...], pattern: str) -> tuple[str, list[str]]:
    for base in bases:
        for place in places:
            names = sorted(path.name for path in (base / place).glob(pattern))
            if names:
                return str(base / place), names
    return "", []


def version_numbers(text: str | None) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: `5.2.21151-afdc89f8` gives (5, 2, 21151)."""
    found = re.match(r"\d+(?:\.\d+)*", text or "")
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def read_build(folder: Path) -> TorchBuild | None:
    """The build whose package lies in `folder`, None if there is none that can be read."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = dict(_ASSIGNMENT.findall(text))
    return TorchBuild(folder, found.get("__version__", "unknown"), found.get("hip"), found.get("cuda"))


def find_build() -> TorchBuild | None:
    """The build that `import torch` would load in this interpreter; does not import it."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # ValueError: torch is in sys.modules without a spec
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return read_build(Path(next(iter(spec.submodule_search_locations))))

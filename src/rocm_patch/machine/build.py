"""The installed torch build, read from its files: torch is not imported and no GPU is touched."""

from __future__ import annotations

import importlib.util
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

_ASSIGNMENT = re.compile(r"^(__version__|cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


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

    def carries(self, gfx: str) -> bool:
        """Whether the device code of this build includes native code for a chip.

        Looks for the chip in the ids of clang's offload bundles (https://clang.llvm.org/docs/ClangOffloadBundler.html)
        inside `libtorch_hip.so`, and for AMD's separate per-device package. Compressed bundles show no ids, so a
        False is "not found".
        """
        package = f"amd_torch_device_{gfx}-"
        if any(entry.name.startswith(package) for entry in self.folder.parent.glob("amd_torch_device_*")):
            return True
        pattern = re.compile(rb"amdgcn-amd-amdhsa--" + gfx.encode() + rb"\b")
        for library in (self.folder / "lib").glob("libtorch_hip*.so*"):
            if library.stat().st_size == 0:
                continue
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if pattern.search(content):
                    return True
        return False


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

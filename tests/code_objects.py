"""Machine code for AMD GPUs, compiled here without one, and the containers that it comes in."""

import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from functools import cache
from pathlib import Path

import pytest

from builds import bundle_of
from conftest import ROOT, clean_environ

HIPCC = shutil.which("hipcc")
SOURCE = ROOT / "tests" / "code" / "loops.hip"
WITH_DOT = ("gfx906", "gfx1030")
HIP_TARGETS = ("gfx900", "gfx906", "gfx1010", "gfx1030")
TRITON_TARGETS = ("gfx1010", "gfx1030", "gfx1100")
# Triton 3.7 fills fields that no operand uses, which older disassemblers take for errors.
OBJDUMP = next(filter(None, (shutil.which(f"llvm-objdump-{n}") for n in (24, 23, 22, 21))), None)
needs_hipcc = pytest.mark.skipif(HIPCC is None, reason="not on this machine: hipcc (Debian 12: apt install hipcc)")
needs_objdump = pytest.mark.skipif(
    OBJDUMP is None, reason="not on this machine: llvm-objdump of LLVM 21 or newer (Debian 12: apt install llvm-22)"
)


def hipcc(*arguments):
    done = subprocess.run(
        [HIPCC, *map(str, arguments)], env=clean_environ(HIP_PLATFORM="amd"), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@cache
def hip(target):
    """The code object that hipcc makes of tests/code/loops.hip for one target."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.hsaco")
        dot = ["-DHAS_DOT"] if target in WITH_DOT else []
        hipcc("--genco", f"--offload-arch={target}", "-O3", *dot, SOURCE, "-o", made)
        whole = made.read_bytes()
    return whole[whole.index(b"\x7fELF") :]


_COMPILE = """
import sys
from pathlib import Path
from rocm_patch.kernels.variant import Target, Variant

reduce = Variant("layout", "reduce", ("float32", "float16"), (("LENGTH", 4),), (("ENTRIES", 256),), 4, 2)
for target in sys.argv[2:]:
    code = reduce.compiled(Target("hip", target, 32)).asm["hsaco"]
    Path(sys.argv[1], target).write_bytes(code)
"""


@cache
def triton():
    """The code objects that Triton makes of one of our kernels, by target."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, folder, *TRITON_TARGETS],
            env=clean_environ(PYTHONPATH=str(ROOT / ".triton"), TRITON_CACHE_DIR=str(Path(folder, "cache"))),
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {target: Path(folder, target).read_bytes() for target in TRITON_TARGETS}


def compressed(payload, version=3, method="zlib"):
    """A bundle in clang's compressed form: magic, version, method, sizes, a hash, the packed bundle."""
    if method == "zlib":
        number, body = 0, zlib.compress(payload)
    else:
        from rocm_patch.machine.scan.compression import zstd_module

        number, body = 1, zstd_module().compress(payload)
    head = b"CCOB" + struct.pack("<HH", version, number)
    if version == 1:
        head += struct.pack("<IQ", len(payload), 0)
    elif version == 2:
        head += struct.pack("<IIQ", 24 + len(body), len(payload), 0)
    else:
        head += struct.pack("<QQQ", 32 + len(body), len(payload), 0)
    whole = head + body
    return whole.ljust(-(-len(whole) // 4096) * 4096, b"\0")


def plain(*targets):
    """A plain bundle with the code of hipcc for these targets."""
    return bundle_of({target: hip(target) for target in targets})


def disassembled(code, target):
    """Address to (bytes, text) of each instruction, as LLVM reads a code object; padding is left out by it."""
    with tempfile.NamedTemporaryFile(suffix=".co") as file:
        file.write(code)
        file.flush()
        text = subprocess.run(
            [OBJDUMP, "-d", f"--mcpu={target}", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s+(\S.*?)\s*// ([0-9A-F]{12}): ((?:[0-9A-F]{8} ?)+)", line)
        if match:
            found[int(match[2], 16)] = (4 * len(match[3].split()), match[1])
    return found

"""Feed `rocm-patch scan` with spoilt files, guided by the code that they reach (atheris, libFuzzer's engine).

    python benchmarks/fuzz_scan.py SECONDS [OUT.json]

Starts from files of every kind that is read: code compiled here where hipcc is, containers of the tests. Whatever is
read must be counted, or end in a ValueError or an OSError, within 20 seconds and 1 GiB. Needs `pip install atheris`.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS, LIMIT_MIB = 20, 1024


def corpus(folder):
    """Files to start from."""
    sys.path.insert(0, str(ROOT / "tests"))
    import bz2

    import test_scan_files as made
    from builds import bundle, bundle_of
    from code_objects import HIPCC, compressed, hip, triton

    code = hip("gfx1030") if HIPCC else triton()["gfx1030"]
    other = triton()["gfx1010"]
    pair = bundle_of({"gfx1030": code, "gfx1010": other})
    from test_build import elf as elf_with

    seeds = {
        "object": code,
        "bundle": pair,
        "empty": bundle("gfx1030"),
        "zlib": compressed(pair),
        "old": compressed(pair, 1),
        "zstd": compressed(pair, 3, "zstd"),
        "aotriton": made.aotriton(code),
        "kpack": made.kpack({"gfx1030": code}, "none"),
        "kpack_zstd": made.kpack({"gfx1030": other}, "zstd-per-kernel"),
        "library": elf_with({".hip_fatbin": pair, ".rodata": other}, flags=2),
    }
    for name, content in seeds.items():
        (folder / name).write_bytes(content)
    made.kern_db(folder / "database", bz2.compress(other), other)


def one_input(path):
    from rocm_patch.machine.scan import files, inventory

    def run(content):
        path.write_bytes(content)
        try:
            parts = files.parts(path)
        except ValueError:
            return
        inventory.read(path, parts, "gfx1010", ("gfx1030", "gfx1010"))

    return run


def fuzz(folder, seconds):
    import atheris

    with atheris.instrument_imports(include=["rocm_patch.machine.scan"]):
        from rocm_patch.machine.scan import files, inventory  # noqa: F401

    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else folder) / f"fuzz_scan_{os.getpid()}.kdb"
    options = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={LIMIT_MIB}",
        f"-timeout={LIMIT_SECONDS}",
        "-max_len=65536",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], one_input(path))
    atheris.Fuzz()


def main():
    seconds = int(sys.argv[1])
    if len(sys.argv) > 3:  # the child
        fuzz(Path(sys.argv[3]), seconds)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus(folder)
        started = time.time()
        done = subprocess.run(
            [sys.executable, __file__, str(seconds), "-", name], capture_output=True, text=True, check=False
        )
        said = [line for line in done.stderr.splitlines() if line.startswith(("Done", "stat", "#", "==", "SUMMARY"))]
        document = {
            "seconds": round(time.time() - started), "exit_code": done.returncode, "said": said[-3:],
            "inputs_kept": len(list(folder.iterdir())), "python": platform.python_version(),
            "processor": platform.machine(), "limits": {"seconds": LIMIT_SECONDS, "MiB": LIMIT_MIB},
        }  # fmt: skip
    text = json.dumps(document, indent=1) + "\n"
    print(text)
    if done.returncode:
        print(done.stderr[-4000:])
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()

"""Whole models with the override and without, and compiled: are the results the same, and was all of it served?

    python benchmarks/models.py OUT.json [NAME ...] [--device cpu|cuda]     every model, or those named
    python benchmarks/models.py --table OUT.json > docs/MODELS.md           the page made of it

Needs torchvision, timm, ultralytics and diffusers; downloads nothing. Each model runs in a process of its own;
OUT.json is written after each, and with names it is added to. Exits 1 if a model failed, or if its float64
results are not native's (model_compare.py says when they are).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import sys
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from model_compare import PARTS, compare, within_bound
from model_compile import COMPILED, compare_compiled
from model_table import page
from model_zoo import ZOO, install_missing_operators

# Seconds for one model; compiling one on a busy core takes many minutes.
LIMIT = 1800


def child(name: str, device: str, pipe: Connection) -> None:
    """One model's report, or its traceback, through the pipe."""
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        if name in COMPILED:
            row = compare_compiled(COMPILED[name], device)
        else:
            row = compare(ZOO[name].make, ZOO[name].shapes, device=device)
        if not within_bound(row["float64"]):
            row["failed"] = "differs from native by more than rounding"
    except BaseException as error:
        row = {"failed": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-4000:]}
    pipe.send(row)


def run(name: str, device: str) -> dict[str, Any]:
    """A model's row of the report, whatever becomes of its process."""
    start = time.monotonic()
    # Forked, because importing the packages anew takes longer than most models.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, device, sender))
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(LIMIT) else {"failed": f"not done in {LIMIT} s"}
    except EOFError:
        process.join()
        row = {"failed": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    family = "torch.compile" if name in COMPILED else ZOO[name].family
    return {"family": family, **row, "seconds": round(time.monotonic() - start, 1)}


def versions(device: str) -> dict[str, str]:
    # torch's own word, which names the build.
    found = {"torch": torch.__version__}
    for name in ("torchvision", "timm", "ultralytics", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):  # its models fail, each in its row
            found[name] = version(name)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found.update(Python=platform.python_version(), CPU=models[0] if models else platform.processor())
    found.update(device=device, threads=str(torch.get_num_threads()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("names", nargs="*", help="models; all if none is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true", help="print the page made of the JSON file")
    options = parser.parse_args()
    if options.table:
        print(page(json.loads(options.out.read_text())), end="")
        return 0
    known = [*ZOO, *COMPILED]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no models {', '.join(unknown)}; there are {', '.join(known)}")
    report: dict[str, Any] = {"versions": {}, "models": {}}
    if options.names and options.out.exists():
        report = json.loads(options.out.read_text())
    install_missing_operators()
    with contextlib.suppress(ImportError):
        import timm  # noqa: F401  # imported here once for all children

    report["versions"] = versions(options.device)
    failed = []
    for name in options.names or known:
        row = report["models"][name] = run(name, options.device)
        if "failed" in row:
            failed.append(name)
        errors = [f"{row['float64']['against_native'][part]['error']:.1e}" for part in PARTS if "float64" in row]
        print(f"{row['seconds']:7.1f} s  {name:40} {' '.join(errors)}  {row.get('failed', '')}", flush=True)
        beside = options.out.with_suffix(".part")
        beside.write_text(json.dumps(report, indent=1) + "\n")
        beside.replace(options.out)
    print(f"{len(options.names or known) - len(failed)} of {len(options.names or known)} models hold {failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

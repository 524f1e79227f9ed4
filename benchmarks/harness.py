"""Runs the checks of a script one after the other and writes what they found; the same for every script here."""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import rocm_patch

Check = Callable[[], Mapping[str, Any]]


class NotRunError(Exception):
    """This machine cannot show it: the reason."""


def about(script: str, device: str = "cuda", *options: str) -> dict[str, Any]:
    """What a file of results begins with: device, versions, and the command that repeats it, with its options."""
    on_gpu = device == "cuda"
    return {
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", "OUT.json", *options]),
        "device": torch.cuda.get_device_name(0) if on_gpu else platform.processor() or "cpu",
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "versions": {
            "torch": torch.__version__,
            "hip": torch.version.hip,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": platform.python_version(),
            "rocm_patch": rocm_patch.__version__,
        },
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every script takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, help="the JSON file to write")
    made.add_argument("--only", action="append", default=[], metavar="CHECK", help="part of a check's name")
    return made


def run_all(
    names: Mapping[str, Any],
    chosen: argparse.Namespace,
    device: str = "cuda",
    after_each: Callable[[], object] = rocm_patch.disable_all_patches,
) -> int:
    """Run what is called `check_` or `measure_` in a module, in its order.

    Args:
        names: the module's globals.
        chosen: what `parser` has read.
        device: `cuda` or `cpu`.
        after_each: undoes what a check may have left switched on.

    Returns:
        1 if a check failed, the exit status.
    """
    results = {**about(names["__file__"], device), "checks": {}}
    failed = []
    for name, check in list(names.items()):
        if not name.startswith(("check_", "measure_")) or not any(part in name for part in chosen.only or [""]):
            continue
        start = time.perf_counter()
        row: dict[str, Any]
        try:
            row = {"verdict": "ok", **check()}
        except NotRunError as reason:
            row = {"verdict": f"not run: {reason}"}
        except Exception:
            row = {"verdict": "FAILED", "traceback": traceback.format_exc()}
            failed.append(name)
        after_each()
        row["seconds"] = round(time.perf_counter() - start, 1)
        results["checks"][name] = row
        print(f"{name}: {row['verdict']} ({row['seconds']} s)\n{row.get('traceback', '')}", end="", flush=True)
        text = json.dumps(results, indent=1, default=str).replace("NaN", "null")
        chosen.out.write_text(text + "\n", encoding="utf-8")
    print(f"{len(failed)} failed")
    return 1 if failed else 0

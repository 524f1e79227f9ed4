"""Train natively and under `rocm-patch run`, with several seeds, and say whether the detectors are equally good.

    python compare.py --small --device cpu
    python compare.py --epochs 8 --json comparison.json

Both start from the same weights and see the same images in the same order. Sums in another order round differently,
and a training enlarges that: after some hundred steps two runs have parted as if their seeds had been different. So
the question is whether the patched mAP50 differs by more than seeds do. It is answered as by Student's t test for two
samples: with k seeds, of which native has the standard deviation s and patched r, the difference of the two means is
noise if it is no larger than

    t * sqrt((s^2 + r^2) / k)

where t is the quantile of Student's distribution that 95 % of such differences stay below if there is nothing but
noise, for 2 (k - 1) degrees of freedom: 2.78 for three seeds. The bound is printed as well, since it says what could
have been noticed: a real difference below it is not excluded. What rounding has not yet enlarged is compared more
sharply: the loss of the first batch, in which nothing has been learnt yet, must agree within 0.5 %.

Exits 1 if a run fails, if the patched runs did not in fact bypass convolutions, or if the difference is not noise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("train.py")
# Student's t, 97.5 %, by degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
STUDENT = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 12: 2.179, 14: 2.145, 16: 2.120, 18: 2.101}
SAME_FIRST_LOSS = 0.005  # relative; NVIDIA's TF32, which cuDNN multiplies with unless told not to, has 10 bits
PACKAGES = ("torch", "torchvision", "ultralytics", "opencv-python-headless", "numpy", "rocm-patch")
SETTINGS = ("epochs", "frames", "size", "batch", "workers", "device")  # the same in all runs
HANDED_ON = ("epochs", "frames", "size", "batch", "workers")  # options that are train.py's


def train(command: list[str], out: Path) -> None:
    """A training in a process of its own; `out` gets its results and log.txt."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    # As in an activated environment: the program's Python is the one that runs this file.
    environ = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    with open(out / "log.txt", "w") as log:
        done = subprocess.run(command, env=environ, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with exit code {done.returncode}\nhint: tail -n 40 {out / 'log.txt'}")


def read(out: Path) -> dict[str, Any]:
    """What a training ended with, and how many convolutions went another way than native."""
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    routes = re.findall(r"-> (\w+)", (out / "log.txt").read_text(errors="replace"))
    results["bypassed"] = sum(route != "native" for route in routes)
    return results


def judge(native: list[float], patched: list[float]) -> dict[str, Any]:
    """Means, standard deviations, and whether the difference is noise; see the top of this file."""
    count = len(native)
    spread = [statistics.stdev(values) for values in (native, patched)]
    means = [statistics.mean(values) for values in (native, patched)]
    bound = STUDENT[2 * (count - 1)] * ((spread[0] ** 2 + spread[1] ** 2) / count) ** 0.5
    difference = means[1] - means[0]
    return {
        "mean": dict(zip(("native", "patched"), means, strict=True)),
        "standard_deviation": dict(zip(("native", "patched"), spread, strict=True)),
        "difference": difference,
        "paired_differences": [b - a for a, b in zip(native, patched, strict=True)],
        "bound": bound,
        "within_noise": abs(difference) <= bound,
    }


def machine() -> dict[str, Any]:
    """What this was run on."""
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__
    return {
        "processor": named[1] if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **versions},
    }


def usual_backend(device: str) -> str | None:
    """None where rocm-patch decides by the card."""
    if device == "cpu":
        return "cpu"
    return None if torch.version.hip else "cuda"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="what a CPU can train in minutes")
    parser.add_argument(
        "--device", default="0" if torch.cuda.is_available() else "cpu", help="cpu, or a GPU's number"
    )
    parser.add_argument("--backend", help="whose convolutions are served; by default the device's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name in HANDED_ON:
        parser.add_argument(f"--{name}", type=int, help="as for train.py")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of the runs")
    parser.add_argument("--resume", action="store_true", help="do not repeat runs whose results are in that folder")
    parser.add_argument("--json", type=Path, help="where the comparison is written, beside the table")
    arguments = parser.parse_args()
    if not 2 <= len(set(arguments.seeds)) == len(arguments.seeds) <= 10:
        parser.error(
            "the spread over seeds was asked for, which takes two to ten different ones\nhint: --seeds 0 1 2"
        )
    return arguments


def main() -> None:
    arguments = parse_arguments()
    options = ["--device", arguments.device, *(["--small"] if arguments.small else [])]
    for name in HANDED_ON:
        if getattr(arguments, name) is not None:
            options += [f"--{name}", str(getattr(arguments, name))]
    backend = arguments.backend or usual_backend(arguments.device)
    under = [sys.executable, "-m", "rocm_patch", "run", "--log", "info", *(["--backend", backend] if backend else [])]
    runs: dict[str, list[dict[str, Any]]] = {"native": [], "patched": []}
    print("seed  mAP50 native  patched   first loss native   patched   seconds native  patched")
    for seed in arguments.seeds:
        for name, start in (("native", [sys.executable]), ("patched", under)):
            out = arguments.out / f"{name}-{seed}"
            command = [*start, str(SCRIPT), *options, "--seed", str(seed), "--out", str(out)]
            if not (arguments.resume and (out / "results.json").is_file()):
                train(command, out)
            runs[name].append(read(out))
        a, b = (runs[name][-1] for name in runs)
        print(
            f"{seed:4}  {a['mAP50']:12.4f}  {b['mAP50']:7.4f}   {a['first_loss']:17.5f}  {b['first_loss']:8.5f}   "
            f"{a['seconds']['all']:14.0f}  {b['seconds']['all']:7.0f}",
            flush=True,
        )
    settings = {tuple(row[key] for key in SETTINGS) for rows in runs.values() for row in rows}
    if len(settings) > 1:
        sys.exit(f"asked to compare runs that were made with other settings\nhint: rm -r {arguments.out}")
    found = judge(*([row["mAP50"] for row in rows] for rows in runs.values()))
    for key, title in (("mean", "mean"), ("standard_deviation", "s.d.")):
        print(f"{title}  {found[key]['native']:12.4f}  {found[key]['patched']:7.4f}")
    first = max(
        abs(b["first_loss"] - a["first_loss"]) / a["first_loss"]
        for a, b in zip(runs["native"], runs["patched"], strict=True)
    )
    record = {
        "schema_version": 1,
        "device": runs["native"][0]["device"],
        **machine(),
        "backend": backend or "auto",
        "options": options,
        "mAP50": found,
        "mAP50-95": judge(*([row["mAP50-95"] for row in rows] for rows in runs.values())),
        "first_loss_relative_difference": first,
        "runs": runs,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"patched - native: {found['difference']:+.4f}; differences up to {found['bound']:.4f} are noise; "
        f"first losses agree within {first:.1e}"
    )
    if any(row["bypassed"] for row in runs["native"]) or not all(row["bypassed"] for row in runs["patched"]):
        sys.exit("failed: the patched runs did not bypass the native convolutions, or the native ones did")
    if first > SAME_FIRST_LOSS:
        sys.exit("failed: the losses of the first batch differ by more than rounding")
    if not found["within_noise"]:
        sys.exit("failed: the difference is larger than noise")
    print("the patched detectors are as good as the native ones, within noise")


if __name__ == "__main__":
    main()

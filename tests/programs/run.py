"""Programs as other people write them, natively and under `rocm-patch run`: do both print the same?

    python tests/programs/run.py                             every program, on the CPU
    python tests/programs/run.py vocoder --no-install        one, with what is installed
    python tests/programs/run.py ~/train.py --no-install     a file of your own, with such a head
    python tests/programs/run.py --device cuda --out summary.json
    python tests/programs/run.py --table summary.json        the table in docs/PROGRAMS.md

A program is a file beside this one that knows nothing of rocm-patch. Its head says what it needs (PEP 723; a notebook
says it in its metadata), and under `[tool.programs]`:

    about     what it is
    rtol      how far its numbers may be from native's, relative to the larger of the two
    atol      beside zero: a difference of `atol` counts as `rtol`
    routes    how many convolutions, of different shapes or directions, rocm-patch has to serve at least
    command   what starts it, if not Python: `{program}` stands for its file
    devices   what it can run on, if not only a CPU; without a command of its own it then takes `--device`

Each is run three times, in a working folder of its own: natively, under `rocm-patch run --conv bypass`, and natively
again with other native kernels (another number of threads, and oneDNN kept to SSE4.1). Of the first two the exit code
and the text on stdout have to be the same, the numbers in it within the tolerance, and the log has to show that the
convolutions were served, none by aten's own kernels. The third shows what rounding alone does to the numbers; on a
GPU, where these two settings change nothing, it shows what differs from run to run.

Exits 1 if a program failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
OPERATORS = HERE.parents[1] / "benchmarks" / "torchvision_operators.py"
HEAD = re.compile(r"(?m)^# /// script\n((?:#(?:| .*)\n)+?)# ///$")
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+_-]+)")
# A number that is not part of a word: `layer3` is text, `loss=3` is not.
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf)(?![\w.])")
# What `--log info` says of a convolution that has not been seen before.
ROUTE = re.compile(r"rocm-patch: (?:forward|grad_input|grad_weight) .* -> (\w+) \(")
FAILED_OVER = re.compile(r"is served by \w+ from here on")
# Packages whose versions a summary names where they are installed.
NAMED = ("torch", "torchvision", "timm", "lightning", "accelerate", "ultralytics", "segmentation-models-pytorch",
         "diffusers", "safetensors", "nbclient", "ipykernel", "rocm-patch")  # fmt: skip
TAIL_LINES = 25


class ProgramError(Exception):
    """A program that cannot be run as asked; the message has a hint."""


@dataclass(frozen=True)
class Program:
    """One program and what its head says; see the top of this file."""

    path: Path
    requirements: tuple[str, ...]
    about: str
    rtol: float
    atol: float
    routes: int
    command: tuple[str, ...] | None
    devices: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    def argv(self, device: str, file: str, patched: bool) -> list[str]:
        """The command line of a run, with or without us."""
        # As `rocm-patch`, whether it is installed or only on PYTHONPATH.
        ours = [sys.executable, "-m", "rocm_patch", "run"]
        ours += ["--backend", device, "--conv", "bypass", "--log", "info"]
        if self.command is not None:
            own = [word.replace("{program}", file) for word in self.command]
            return [*ours, "--", *own] if patched else own
        arguments = [file, *(["--device", device] if len(self.devices) > 1 else [])]
        return [*ours, *arguments] if patched else ["python", *arguments]


def read(path: Path) -> Program:
    """A program from its file.

    Raises:
        ProgramError: its head is missing, or lacks something.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        head = json.loads(text)["metadata"].get("programs", {})
    else:
        found = HEAD.search(text)
        lines = found.group(1).splitlines() if found else []
        head = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    try:
        ours = head["tool"]["programs"]
        command = ours.get("command")
        return Program(
            path=path,
            requirements=tuple(head["dependencies"]),
            about=ours["about"],
            rtol=float(ours["rtol"]),
            atol=float(ours.get("atol", 0)),
            routes=int(ours["routes"]),
            command=tuple(command) if command else None,
            devices=tuple(ours.get("devices", ["cpu"])),
        )
    except KeyError as error:
        raise ProgramError(f"{path.name}: its head has no {error}\nhint: see the top of {__file__}") from None


def programs() -> dict[str, Program]:
    """All there are, by name."""
    files = sorted([*HERE.glob("*.py"), *HERE.glob("*.ipynb")])
    return {path.stem: read(path) for path in files if path.name != Path(__file__).name}


def install(chosen: list[Program]) -> None:
    """What they require, into this environment, without what that requires in turn: torch stays what it is.

    Raises:
        ProgramError: pip failed, or torch is another one afterwards.
    """
    import torch

    before = torch.__version__
    every = {entry for program in chosen for entry in program.requirements}
    wanted = sorted(entry for entry in every if not entry.startswith("torch=="))
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *wanted], check=False)
    if done.returncode:
        raise ProgramError("the requirements could not be installed\nhint: run it with --no-install")
    after = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if after != before:
        raise ProgramError(f"torch was {before} and is {after} now\nhint: make a new environment: make test-programs")
    # A torchvision for CUDA beside a torch for CPUs cannot be imported, by any program. See the file.
    site = Path(torch.__file__).parents[1]
    shutil.copy(OPERATORS, site)
    (site / f"{OPERATORS.stem}.pth").write_text(f"import {OPERATORS.stem}; {OPERATORS.stem}.on_import()\n")


@dataclass
class Outcome:
    """What one run left behind."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    routes: Counter[str] = field(default_factory=Counter)
    failed_over: int = 0


def environment(folder: Path, device: str, threads: int, other_kernels: bool) -> dict[str, str]:
    """Ours without any setting of rocm-patch, and with homes and caches below the folder."""
    kept = {name: value for name, value in os.environ.items() if "ROCM_PATCH" not in name}
    bin_folder = str(Path(sys.executable).parent)
    own = {
        "PATH": os.pathsep.join([bin_folder, kept.get("PATH", "")]),
        "VIRTUAL_ENV": sys.prefix,
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "ROCM_PATCH_CACHE_DIR": str(folder / "rocm-patch"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "OMP_NUM_THREADS": str(threads),
        # On a machine with other work, threads that wait by spinning take the processor from those they wait for.
        "OMP_WAIT_POLICY": "PASSIVE",
        # torch lets cuDNN round the operands of float32 convolutions to 10 bits, unless told otherwise.
        "NVIDIA_TF32_OVERRIDE": "0",
        # Nothing is looked up: everything is made by the program.
        "HF_HUB_OFFLINE": "1",
        "YOLO_OFFLINE": "true",
    }
    if other_kernels:
        own["OMP_NUM_THREADS"] = "1" if threads > 1 else "2"
        own["ONEDNN_MAX_CPU_ISA"] = "SSE41"
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""  # for programs that take a GPU where there is one
    for name in ("HOME", "TMPDIR"):
        Path(own[name]).mkdir()
    return {**kept, **own}


def execute(
    program: Program, options: argparse.Namespace, patched: bool = False, other_kernels: bool = False
) -> Outcome:
    """One run, in a working folder that is removed afterwards."""
    device, limit = options.device, options.limit
    with tempfile.TemporaryDirectory(prefix=f"{program.name}-") as name:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        # A notebook's outputs are written beside it.
        file = shutil.copy(program.path, work) if program.path.suffix == ".ipynb" else program.path
        environ = environment(folder, device, options.threads, other_kernels)
        start = time.monotonic()
        process = subprocess.Popen(
            program.argv(device, str(file), patched), cwd=work, env=environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            stdout, stderr = process.communicate()
            stderr += f"\nnot done in {limit:.0f} s"
        # The folder has another name each time.
        stdout = stdout.replace(name, "FOLDER")
        outcome = Outcome(process.returncode, stdout, stderr, time.monotonic() - start)
        if program.path.suffix == ".ipynb":
            _add_cells(outcome, Path(file))
    outcome.routes.update(ROUTE.findall(outcome.stderr))
    outcome.failed_over = len(FAILED_OVER.findall(outcome.stderr))
    return outcome


def _add_cells(outcome: Outcome, notebook: Path) -> None:
    """What an executed notebook's cells have written."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                text = "".join(output["text"])
                if output["name"] == "stdout":
                    outcome.stdout += text
                else:
                    outcome.stderr += text


def compare(first: str, second: str, rtol: float, atol: float) -> tuple[float, str | None]:
    """The largest relative difference of two outputs' numbers, and what else is different, or None.

    Whole numbers have to be equal: they count or name something.
    """
    worst = 0.0
    ours, theirs = first.splitlines(), second.splitlines()
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        differs = f"line {number}: {a!r} and {b!r}"
        if NUMBER.sub("#", a) != NUMBER.sub("#", b):
            return worst, differs
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True):
            if x == y and "nan" not in x:
                continue
            if x.lstrip("+-").isdigit() and y.lstrip("+-").isdigit():
                return worst, differs
            difference = abs(float(x) - float(y)) / (max(abs(float(x)), abs(float(y))) + atol / rtol)
            if not math.isfinite(difference):
                return worst, differs
            worst = max(worst, difference)
    if len(ours) != len(theirs):
        return worst, f"{len(ours)} lines and {len(theirs)}"
    return worst, None


def judge(program: Program, native: Outcome, patched: Outcome) -> tuple[float | None, str | None]:
    """The largest relative difference, and why the program failed, or None."""
    if native.code:
        return None, f"natively it exits with {native.code}"
    if patched.code != native.code:
        return None, f"patched it exits with {patched.code}, natively with {native.code}"
    if not NUMBER.search(native.stdout):
        return None, "it prints no number that could be compared"
    difference, other = compare(native.stdout, patched.stdout, program.rtol, program.atol)
    if other:
        return difference, f"natively and patched it prints something else: {other}"
    if not difference <= program.rtol:
        return difference, f"its numbers differ by {difference:.1e}, more than {program.rtol:.0e}"
    served = sum(patched.routes.values())
    if served < program.routes:
        return difference, f"{served} convolutions served, at least {program.routes} expected"
    if patched.routes["native"]:
        return difference, f"{patched.routes['native']} convolutions served by aten's own kernels"
    if patched.failed_over:
        return difference, f"{patched.failed_over} convolutions failed, and were served by another strategy"
    return difference, None


def examine(program: Program, options: argparse.Namespace) -> dict[str, Any]:
    """A program's entry in the summary."""
    native = execute(program, options)
    patched = execute(program, options, patched=True) if native.code == 0 else native
    difference, failed = judge(program, native, patched)
    row: dict[str, Any] = {
        "about": program.about,
        "seconds_native": round(native.seconds, 1),
        "seconds_patched": round(patched.seconds, 1),
        "rtol": program.rtol,
        "atol": program.atol,
        "difference": difference,
        "numbers": len(NUMBER.findall(native.stdout)),
        "routes": dict(sorted(patched.routes.items())),
    }
    if native.code == 0:
        again = execute(program, options, other_kernels=True)
        noise, other = compare(native.stdout, again.stdout, program.rtol, program.atol)
        row["noise"] = noise
        if other:
            row["noise_note"] = f"natively it prints something else the second time: {other}"
    if failed:
        row["failed"] = failed
        row["tail"] = [*patched.stdout.splitlines()[-TAIL_LINES:], *patched.stderr.splitlines()[-TAIL_LINES:]]
    return row


def versions(device: str, threads: int) -> dict[str, str]:
    """What a summary's figures were measured with."""
    found = {"Python": platform.python_version()}
    for name in NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    import torch

    found["torch"] = torch.__version__  # its own word, which names the build
    found["CPU"] = f"{os.cpu_count()} cores, {platform.machine()}, {models[0] if models else platform.processor()}"
    if device == "cuda":
        found["GPU"] = torch.cuda.get_device_name()
    found["threads"] = str(threads)
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary as a table in Markdown."""
    lines = [
        "| program | convolutions served | difference from native | native's own | allowed | native, patched (s) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(summary["programs"].items()):
        served = ", ".join(f"{strategy} {count}" for strategy, count in row["routes"].items())
        noise = "another text" if "noise_note" in row else _short(row.get("noise"))
        difference = row.get("failed") or _short(row["difference"])
        lines.append(
            f"| {name} | {sum(row['routes'].values())}: {served} | {difference} | {noise} "
            f"| {row['rtol']:.0e} | {row['seconds_native']:.0f}, {row['seconds_patched']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _short(difference: float | None) -> str:
    """A difference in a few characters; 0 where all digits are the same."""
    return "-" if difference is None else f"{difference:.1e}" if difference else "0"


def _line(name: str, row: dict[str, Any]) -> str:
    difference, noise = _short(row["difference"]), _short(row.get("noise"))
    return (
        f"{'failed' if 'failed' in row else 'ok':6}  {name:22} difference {difference:8} native's own {noise:8} "
        f"{sum(row['routes'].values()):4} routes  "
        f"{row['seconds_native']:6.1f} s native {row['seconds_patched']:6.1f} s patched"
    )


def _write(path: Path, summary: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(summary, indent=1) + "\n")
    beside.replace(path)


def _chosen(options: argparse.Namespace) -> list[Program]:
    known = programs()
    files = {name: Path(name) for name in options.names if name not in known}
    unknown = [name for name, path in files.items() if not path.is_file()]
    if unknown:
        raise ProgramError(f"no program {', '.join(unknown)}\nhint: {shlex.join(['python', sys.argv[0], '--list'])}")
    known.update((name, read(path.resolve())) for name, path in files.items())
    chosen = [known[name] for name in options.names or known]
    unfit = [program.name for program in chosen if options.device not in program.devices]
    if options.names and unfit:
        raise ProgramError(f"{', '.join(unfit)} cannot run on {options.device}\nhint: leave --device out")
    return [program for program in chosen if program.name not in unfit]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "names",
        nargs="*",
        help="programs, or files of your own; all of ours if none is given",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-install", action="store_true", help="use what is installed")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the summary there, as JSON; with names it is added to"
    )
    parser.add_argument("--list", action="store_true", help="name the programs and leave")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="programs at once")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a program; 1 if not given")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for one run; 900 if not given")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a summary's table and leave")
    options = parser.parse_args(arguments)
    if options.list:
        for program in programs().values():
            print(f"{program.name:22} {'/'.join(program.devices):9} {program.about}")
        return 0
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return 0
    try:
        chosen = _chosen(options)
        if not options.no_install:
            install(chosen)
    except ProgramError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    return run(chosen, options)


def run(chosen: list[Program], options: argparse.Namespace) -> int:
    """Examine the chosen ones, tell, and write the summary after each; 1 if one failed."""
    summary: dict[str, Any] = {
        "versions": versions(options.device, options.threads), "device": options.device, "programs": {},
    }  # fmt: skip
    if options.names and options.out and options.out.exists():
        earlier = json.loads(options.out.read_text())
        if earlier["versions"] == summary["versions"] and earlier["device"] == summary["device"]:
            summary = earlier

    def one(program: Program) -> dict[str, Any]:
        return examine(program, options)

    with ThreadPoolExecutor(options.jobs) as pool:
        for program, row in zip(chosen, pool.map(one, chosen), strict=True):
            summary["programs"][program.name] = row
            print(_line(program.name, row), flush=True)
            for note in (row.get("failed"), row.get("noise_note")):
                if note:
                    print(f"        {note}")
            if "tail" in row:
                print("\n".join(f"        | {line}" for line in row["tail"]), flush=True)
            if options.out:
                _write(options.out, summary)
    failed = [program.name for program in chosen if "failed" in summary["programs"][program.name]]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} programs do as they do natively {failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

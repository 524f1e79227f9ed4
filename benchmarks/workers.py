"""How long data-loader workers take to start, and what they deliver; writes one JSON file.

    python benchmarks/workers.py OUT.json [--quick] [--gpu] [--workers 0,1,2,4,8] [--rounds 3] [--photos FOLDER]

Three ways: `fork` and `spawn` as torch has them, `ours` by `patch_dataloader(start_method="auto")`. Three datasets:
`tiny` (a few numbers), `images` (JPEG files, decoded, cropped, turned to tensors) and `memory` (1 GiB, half
of it one numpy array, half one torch tensor). Every measurement is a fresh process; the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import rocm_patch

WAYS = ("fork", "spawn", "ours")
LOADERS = {"fork": 4, "ours": 4, "spawn": 2}  # of one process, one after the other


class Images(Dataset[torch.Tensor]):
    """JPEG files, decoded."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(map(str, Path(folder).glob("*.jpg")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            pixels = numpy.asarray(image.convert("RGB"))
        top, left = random.randrange(pixels.shape[0] - 223), random.randrange(pixels.shape[1] - 223)
        return torch.from_numpy(pixels[top : top + 224, left : left + 224].copy()).permute(2, 0, 1).float() / 255


class Memory(Dataset[torch.Tensor]):
    """Two large buffers, read here and there."""

    def __init__(self, mebibytes: int) -> None:
        self.bytes = numpy.ones((mebibytes << 9, 1 << 10), numpy.uint8)
        self.floats = torch.ones(mebibytes << 9, 1 << 8)

    def __len__(self) -> int:
        return len(self.bytes) // 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.bytes[8 * index]).sum() + self.floats[8 * index].sum()


def used_mebibytes() -> float:
    """Memory of all processes and shared memory, each page counted once."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("AnonPages", "Shmem")) / 1024


def measure(way: str, dataset: str, workers: int, folder: str, mebibytes: int, gpu: bool) -> dict[str, Any]:
    """One process's loaders; seconds and MiB."""
    made: Dataset[Any]
    before = used_mebibytes()
    if dataset == "tiny":
        made = TensorDataset(torch.arange(256.0))
    else:
        made = Images(folder) if dataset == "images" else Memory(mebibytes)
    options: dict[str, Any] = {"batch_size": 16, "num_workers": workers, "pin_memory": gpu, "shuffle": True}
    if way == "ours":
        rocm_patch.patch_dataloader(start_method="auto")
    elif workers:
        options["multiprocessing_context"] = way
    if gpu:
        torch.ones(1, device="cuda")
    firsts, epochs, most = [], [], 0.0
    for _ in range(LOADERS[way]):
        start = time.perf_counter()
        iterator = iter(DataLoader(made, **options))
        next(iterator)
        firsts.append(time.perf_counter() - start)
        start, count, aside = time.perf_counter(), 0, 0.0
        for count, _ in enumerate(iterator, 1):
            if count == len(made) // 32 and dataset == "memory":  # type: ignore[arg-type]
                paused = time.perf_counter()
                most = max(most, used_mebibytes() - before)
                aside = time.perf_counter() - paused
        epochs.append((count * 16) / (time.perf_counter() - start - aside))
        del iterator
    return {"first_s": firsts[0], "later_s": firsts[1:], "samples_per_s": epochs, "memory_mib": most}


def write_images(folder: Path, count: int, photos: Path | None) -> None:
    """JPEG files of 320 to 640 pixels, cut from photographs."""
    from PIL import Image

    if photos is None:
        from sklearn import datasets

        photos = Path(datasets.__file__).parent / "images"
    sources = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))]
    rng = random.Random(0)
    for number in range(count):
        source = sources[number % len(sources)]
        width, height = rng.randrange(320, 600), rng.randrange(320, 420)
        left, top = rng.randrange(source.width - width + 1), rng.randrange(source.height - height + 1)
        source.crop((left, top, left + width, top + height)).save(folder / f"{number:04}.jpg", quality=90)


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(arguments)],
        stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(chosen: argparse.Namespace, folder: str, mebibytes: int) -> Iterator[dict[str, Any]]:
    """A row for each dataset, number of workers and way."""
    for dataset, workers in product(("tiny", "images", "memory"), chosen.workers):
        ways = WAYS if workers else ("fork",)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(chosen.rounds):
            for way in ways:
                runs[way].append(in_a_process(way, dataset, workers, folder, mebibytes, chosen.gpu))
        for way, found in runs.items():
            row = {
                "dataset": dataset,
                "way": way if workers else "none",
                "workers": workers,
                "first_s": statistics.median(run["first_s"] for run in found),
                "later_s": statistics.median(later for run in found for later in run["later_s"]),
                "samples_per_s": statistics.median(rate for run in found for rate in run["samples_per_s"]),
                "memory_mib": statistics.median(run["memory_mib"] for run in found),
                "raw": found,
            }
            print(
                f"{dataset:7} {row['way']:6} {workers} workers  first {row['first_s']:6.3f} s  "
                f"later {row['later_s']:6.3f} s  {row['samples_per_s']:9.0f} /s  {row['memory_mib']:6.0f} MiB",
                flush=True,
            )
            yield row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows say of ours, for each dataset and number of workers."""
    found = {(row["dataset"], row["workers"], row["way"]): row for row in rows}
    told = {}
    for dataset, workers in sorted({key[:2] for key in found if key[2] == WAYS[-1]}):
        fork, spawn, ours = (found[dataset, workers, way] for way in WAYS)
        told[f"{dataset}, {workers} workers"] = {
            "later: spawn / ours": spawn["later_s"] / ours["later_s"],
            "later: ours - 1.5 fork, s": ours["later_s"] - 1.5 * fork["later_s"],
            "first: ours / spawn": ours["first_s"] / spawn["first_s"],
            "first: ours - fork, s": ours["first_s"] - fork["first_s"],
            "throughput: ours / fork": ours["samples_per_s"] / fork["samples_per_s"],
            "memory: ours / fork": ours["memory_mib"] / fork["memory_mib"] if dataset == "memory" else None,
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--gpu", action="store_true", help="with a GPU context in the program, and pinned batches")
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs; scikit-learn's by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*json.loads(chosen.one))))
        return
    if chosen.out is None:
        parser.error("the JSON file to write is missing")
    from harness import about

    options = [word for word in sys.argv[1:] if word != str(chosen.out)]
    result = {
        **about(__file__, "cuda" if chosen.gpu else "cpu", *options),
        "cores": len(os.sched_getaffinity(0)),
        "summary": {},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 64 if chosen.quick else 512, chosen.photos)
        for row in measured(chosen, folder, 64 if chosen.quick else 1024):
            result["rows"].append(row)
            result["summary"] = summary(result["rows"])
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()

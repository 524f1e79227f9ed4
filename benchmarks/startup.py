"""What rocm-patch costs at start, in milliseconds: medians of whole processes, the two sides of a pair in turn.

python benchmarks/startup.py [OUT.json]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 21
PROCESSES = {
    "bare python": ["-c", "pass"],
    "import rocm_patch, patches": ["-c", "import rocm_patch, patches"],
    "rocm-patch --help": ["-m", "rocm_patch", "--help"],
    "rocm-patch run -c pass": ["-m", "rocm_patch", "run", "-q", "--backend", "cpu", "-c", "pass"],
    "import torch": ["-c", "import torch"],
    "rocm-patch run -c 'import torch', bypass on": [
        "-m", "rocm_patch", "run", "-q", "--backend", "cpu", "-c", "import torch",
    ],
}  # fmt: skip


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for turn in range(RUNS + 1):  # the first turn warms the file cache
        for name, arguments in PROCESSES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    import_cost = medians["import rocm_patch, patches"] - medians["bare python"]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "runs": RUNS,
        "median_ms": medians,
        "import_beyond_bare_python_ms": round(import_cost, 1),
        "command": "python benchmarks/startup.py OUT.json",
    }
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    if import_cost > 60 or medians["rocm-patch --help"] > 500:
        sys.exit("startup: over the limits of 60 ms for the import and 500 ms for --help")


if __name__ == "__main__":
    main()

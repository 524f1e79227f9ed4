"""torch's OpInfo samples of the convolutions under the override, all of them; writes one JSON file.

    python benchmarks/opinfo.py OUT.json --device cuda

Runs tests/test_opinfo.py and writes how many samples passed, for each check, convolution and type. Needs pytest and
expecttest, which torch's own test modules import. On an NVIDIA GPU, cuDNN stands in for MIOpen. Exits 1 if a sample
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class Record:
    """A pytest plugin that keeps what each test passed."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, int]] = {}
        self.excused: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::test_")[2]
        if report.failed:
            self.failures[name] = str(report.longrepr)[-2000:]
        elif report.when == "call":
            check, _, rest = name.removesuffix("]").partition("[")
            if check == "samples":
                check, _, rest = rest.partition("-")
            properties = dict(report.user_properties)
            self.samples.setdefault(check, {})[rest] = properties["samples"]
            if properties.get("excused"):
                self.excused[name] = properties["excused"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", default=1, type=int, help="more than one needs pytest-xdist")
    options = parser.parse_args()
    os.environ["OPINFO_DEVICE"] = options.device
    record, began = Record(), time.monotonic()
    arguments = [str(ROOT / "tests" / "test_opinfo.py"), "-q", "-p", "no:cacheprovider"]
    if options.processes > 1:
        arguments += ["-n", str(options.processes)]
    ended = pytest.main(arguments, plugins=[record])
    document = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "passed_samples": {check: sum(rows.values()) for check, rows in record.samples.items()},
        "samples": record.samples,
        "native_fails_them_too": record.excused,
        "failures": record.failures,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(ended)


if __name__ == "__main__":
    sys.exit(main())

"""torch's OpInfo samples of the convolutions under the override, all of them; writes one JSON file.

    python benchmarks/opinfo.py OUT.json --device cuda [--wait]

Runs tests/test_opinfo.py and writes how many samples passed, for each check, convolution and type, and which
algorithms served them. Kernels are compiled while others serve, so most of these few calls would be over before
theirs is there: `--wait` has every call wait for it. Needs pytest and expecttest, which torch's own test modules
import. On an NVIDIA GPU, cuDNN stands in for MIOpen. Exits 1 if a sample fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rocm_patch.route import Route
from rocm_patch.trust.choose import Chooser

ROOT = Path(__file__).resolve().parents[1]


class Record:
    """A pytest plugin that keeps what each test passed."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, int]] = {}
        self.excused: dict[str, int] = {}
        self.served: dict[str, Counter[str]] = {}
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
            self.served.setdefault(check, Counter()).update(properties["served"])
            self.samples.setdefault(check, {})[rest] = properties["samples"]
            if properties.get("excused"):
                self.excused[name] = properties["excused"]


# The rest is for the processes that the samples run in, each of which loads this file as a plugin of pytest.
SERVED: Counter[str] = Counter()


def pytest_configure() -> None:
    """Count the calls of each algorithm by type; with --wait, choose when the best one has been compiled."""
    run, ranked = Route.run, Chooser.ranked

    def counted(route: Route, *operands: Any) -> torch.Tensor:
        SERVED[f"{route.strategy.name} {route.spec.dtype}"] += 1
        return run(route, *operands)

    def waited_for(chooser: Chooser, spec: Any) -> Any:
        found = ranked(chooser, spec)
        any(strategy.is_ready(spec, True) for strategy in found)
        return found

    Route.run = counted  # type: ignore[method-assign]
    if os.environ.get("OPINFO_WAIT"):
        Chooser.ranked = waited_for  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    SERVED.clear()
    try:
        yield
    finally:
        item.user_properties.append(("served", dict(SERVED)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", default=1, type=int, help="more than one needs pytest-xdist")
    parser.add_argument("--wait", action="store_true", help="for the kernel of every call")
    options = parser.parse_args()
    os.environ["OPINFO_DEVICE"] = options.device
    os.environ["OPINFO_WAIT"] = "1" if options.wait else ""
    record, began = Record(), time.monotonic()
    arguments = [str(ROOT / "tests" / "test_opinfo.py"), "-q", "-p", "no:cacheprovider", "-p", "opinfo"]
    if options.processes > 1:
        arguments += ["-n", str(options.processes)]
    ended = pytest.main(arguments, plugins=[record])
    document = {
        "command": " ".join(["python", "benchmarks/opinfo.py", "OUT.json", *sys.argv[2:]]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "passed_samples": {check: sum(rows.values()) for check, rows in record.samples.items()},
        "samples": record.samples,
        "waited_for_kernels": options.wait,
        "served_calls": {check: dict(sorted(calls.items())) for check, calls in record.served.items()},
        "native_fails_them_too": record.excused,
        "failures": record.failures,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(ended)


if __name__ == "__main__":
    sys.exit(main())

"""The programs in tests/programs, and the runner that compares them; they are run by `make test-programs`."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

from conftest import ROOT, clean_environ

RUNNER = ROOT / "tests" / "programs" / "run.py"
_spec = importlib.util.spec_from_file_location("programs_run", RUNNER)
runner = importlib.util.module_from_spec(_spec)
sys.modules["programs_run"] = runner
_spec.loader.exec_module(runner)
PROGRAMS = runner.programs()
PAGE = ROOT / "docs" / "PROGRAMS.md"


def source(program):
    """A program's Python."""
    text = program.path.read_text(encoding="utf-8")
    if program.path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_a_users_own(name):
    program = PROGRAMS[name]
    compile(source(program), name, "exec")
    assert not re.search(r"rocm.?patch", program.path.read_text(encoding="utf-8"), re.IGNORECASE)
    assert "torch==2.13.0" in program.requirements
    assert [entry for entry in program.requirements if not runner.PINNED.fullmatch(entry)] == []
    assert 0 < program.rtol <= 0.02 and 0 <= program.atol <= program.rtol and program.routes > 0
    assert {"cpu"} <= set(program.devices) <= {"cpu", "cuda"}
    assert program.command is None or "{program}" in program.command


def test_all_programs_fit_into_one_environment():
    versions = {}
    for program in PROGRAMS.values():
        for entry in program.requirements:
            name, number = entry.split("==")
            assert versions.setdefault(name, number) == number, f"{program.name}: {entry}"


SAME = [
    ("loss 1.0000\n", "loss 1.0005\n"),
    ("loss=1e-3 nan_count 0", "loss=1.0004e-3 nan_count 0"),
    ("[-0.5, 2.]", "[-0.5001, 2.]"),
    ("inf", "inf"),
    ("bias 1e-9", "bias -1e-9"),
    ("7 of 9\n", "7 of 9"),
]
DIFFERENT = [
    ("loss 1.0", "loss 1.01"),
    ("loss 1.0", "Loss 1.0"),
    ("7 of 9", "8 of 9"),
    ("1000001", "1000002"),
    ("loss nan", "loss nan"),
    ("loss 1.0", "loss nan"),
    ("loss 1.0", "loss inf"),
    ("loss 1.0", "loss -1.0"),
    ("one\ntwo", "one"),
    ("layer3", "layer4"),
]


@pytest.mark.parametrize(("ours", "theirs"), SAME)
def test_outputs_that_are_the_same(ours, theirs):
    difference, other = runner.compare(ours, theirs, 1e-3, 1e-5)
    assert difference <= 1e-3 and other is None


@pytest.mark.parametrize(("ours", "theirs"), DIFFERENT)
def test_outputs_that_differ(ours, theirs):
    difference, other = runner.compare(ours, theirs, 1e-3, 1e-5)
    assert difference > 1e-3 or other


JUDGED = [
    ("loss 1.0", "loss 1.0", {"im2col": 999}, 0, None),
    ("loss 1.0", "loss 1.0", {"im2col": 999, "native": 1}, 0, "1 convolutions served by aten's own kernels"),
    ("loss 1.0", "loss 1.0", {"im2col": 999}, 1, "1 convolutions failed, and were served by another strategy"),
    ("loss 1.0", "loss 1.0", {}, 0, "0 convolutions served, at least "),
    ("loss 1.0", "lost 1.0", {"im2col": 999}, 0, "line 1: 'loss 1.0' and 'lost 1.0'"),
    ("done", "done", {"im2col": 999}, 0, "it prints no number that could be compared"),
]


@pytest.mark.parametrize(("plain", "ours", "routes", "failed_over", "why"), JUDGED)
def test_what_fails_a_program(plain, ours, routes, failed_over, why):
    native = runner.Outcome(0, plain, "", 1.0)
    patched = runner.Outcome(0, ours, "", 1.0, Counter(routes), failed_over)
    failed = runner.judge(next(iter(PROGRAMS.values())), native, patched)[1]
    assert failed is None if why is None else why in failed


PATCHED = "import os\npatched = 'ROCM_PATCH_BACKEND' in os.environ\n"
TINY = {
    "equal": (
        """
        import torch
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(2, 3, 3)
        out = layer(torch.randn(2, 2, 8, 8))
        out.square().mean().backward()
        print("loss", out.square().mean().item(), *layer.weight.grad[0, 0, 0].tolist())
        """,
        None,
    ),
    "other_numbers": ("print('loss', 1.5 if patched else 1.25)", "its numbers differ by 1.7e-01, more than 1e-03"),
    "other_exit_code": (
        "import sys\nprint(1.0)\nsys.exit(3 if patched else 0)",
        "patched it exits with 3, natively with 0",
    ),
    "unserved": ("print(1.0)", "0 convolutions served, at least 2 expected"),
    "broken": ("print('so far')\nraise SystemExit('no images')", "natively it exits with 1"),
}


def test_the_runner_tells_programs_that_do_as_natively_from_those_that_do_not(tmp_path):
    for name, (text, _) in TINY.items():
        head = '# /// script\n# dependencies = ["torch==2.13.0"]\n# [tool.programs]\n# about = "Tiny"\n'
        head += "# rtol = 1e-3\n# atol = 1e-6\n# routes = 2\n# ///\n"
        body = textwrap.dedent(text)
        (tmp_path / f"{name}.py").write_text(head + ("" if name == "equal" else PATCHED) + body + "\n")
    paths = [str(tmp_path / f"{name}.py") for name in TINY]
    done = subprocess.run(
        [sys.executable, str(RUNNER), *paths, "--no-install", "--jobs", "2", "--out", str(tmp_path / "out.json")],
        cwd=tmp_path, env=clean_environ(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    rows = json.loads((tmp_path / "out.json").read_text())["programs"]
    assert done.returncode == 1 and rows.keys() == TINY.keys(), done.stdout + done.stderr
    for name, (_, why) in TINY.items():
        failed = rows[name].get("failed")
        assert failed is None if why is None else why in failed, f"{name}: {failed}"
    # The input has no gradient.
    assert sum(rows["equal"]["routes"].values()) == 2 and rows["equal"]["noise"] <= 1e-3
    assert "ok      equal" in done.stdout and "1 of 5 programs do as they do natively" in done.stdout
    assert "        | so far\n        | no images\n" in done.stdout
    assert list(tmp_path.glob("*.ipynb")) == [] and not (tmp_path / "work").exists()


def test_a_program_that_is_not_there_or_has_no_head_is_named(tmp_path):
    (tmp_path / "bare.py").write_text("print(1.0)\n")
    for name, message in (("no_such", "no program no_such"), (str(tmp_path / "bare.py"), "its head has no 'tool'")):
        done = subprocess.run(
            [sys.executable, str(RUNNER), name, "--no-install"],
            env=clean_environ(), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and message in done.stderr and "hint: " in done.stderr, done.stderr


def test_the_page_names_every_program_and_has_the_table_of_the_summary():
    page = PAGE.read_text()
    summary = json.loads((ROOT / "benchmarks" / "results" / "programs_cpu.json").read_text())
    assert summary["programs"].keys() == PROGRAMS.keys()
    assert runner.table(summary) in page

"""The Triton kernels: right in Triton's interpreter, without spills on AMD cards, and a compiler that may die."""

import json
import subprocess
import sys
import textwrap

import pytest

from conftest import ROOT, clean_environ
from kernels_compiled import ARCHS, BEGIN, END

pytestmark = pytest.mark.torch_free
TRITON = ROOT / ".triton"
# The directions that a strategy (and what its script is told) has to have computed in the interpreter, and how often.
FEWEST = {
    "direct": {"forward": 20, "grad_input": 15, "grad_weight": 20},
    "implicit_gemm_32": {"forward": 8, "grad_input": 6, "grad_weight": 8},
    "implicit_gemm_16": {"forward": 20, "grad_input": 15, "grad_weight": 20},
    "columns": {"forward": 20, "grad_input": 20, "grad_weight": 20},
    "columns 4000": {"forward": 20, "grad_input": 20, "grad_weight": 18},  # in several pieces
    "fused_winograd": {"forward": 3, "grad_input": 3, "grad_weight": 3},
}


@pytest.fixture
def with_triton(tmp_path):
    """Runs a program with a Triton that is not in the tests' own environment."""
    if not (TRITON / "triton").is_dir():
        pytest.fail("these tests need Triton in .triton\nhint: make .triton/ready")

    def run(*arguments, **environ):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False,
            env=clean_environ(PYTHONPATH=str(TRITON), TRITON_CACHE_DIR=str(tmp_path / "triton"), **environ),
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FEWEST)
def test_kernels_compute_what_float64_says(with_triton, name):
    rows = json.loads(with_triton(ROOT / "tests" / "kernels_interpreted.py", *name.split(), TRITON_INTERPRET="1"))
    wrong = [row for row in rows if not row["right"]]
    assert not wrong
    ran = {direction: sum(row["direction"] == direction for row in rows) for direction in FEWEST[name]}
    assert all(ran[direction] >= fewest for direction, fewest in FEWEST[name].items()), ran


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration_compiles_for_amd_without_spills(with_triton, arch):
    rows = json.loads(with_triton(ROOT / "tests" / "kernels_compiled.py", arch))["rows"]
    assert [row for row in rows if row["failure"]] == []
    assert [row for row in rows if row["vgpr_spills"] or row["scratch_bytes"]] == []
    assert all(row["vgprs"] > 0 for row in rows) and len(rows) > 80
    kernels = {row["kernel"] for row in rows}
    assert {"gemm.forward", "gemm.grad_input", "gemm.grad_weight", "direct.forward", "winograd.image"} <= kernels
    # Compiled for the card a kernel works around the card's own bugs; compiled for gfx1030 it does not.
    harmful = [row for row in rows if row["hazards_on_gfx1010"]]
    assert len(harmful) == (len(rows) if arch == "gfx1030" else 0)


def test_the_page_of_kernels_has_every_card_and_no_spill():
    text = (ROOT / "docs" / "KERNELS.md").read_text(encoding="utf-8")
    tables = text.split(BEGIN)[1].split(END)[0]
    for arch in ARCHS:
        rows = [
            line for line in tables.split(f"### {arch}\n")[1].split("###")[0].splitlines() if line.startswith("| ")
        ]
        assert len(rows) > 20
        assert all(cell.strip() == "0" for row in rows[2:] for cell in row.split("|")[-3:-1])


ACCIDENTS = """
    import dataclasses, json, os, signal, time
    import psutil
    from rocm_patch.kernels.compiling import COMPILER
    from rocm_patch.kernels.variant import Target, Variant

    sums = Variant("layout", "reduce", ("float32", "float32"), (("LENGTH", 4),), (("ENTRIES", 256),), 4, 2)

    def failure(target=Target("hip", "gfx1100", 32), **changes):
        asked = COMPILER.ask(dataclasses.replace(sums, **changes), target, is_to_run=False)
        assert asked.over.wait(120)
        return asked.failure

    found = {"good": failure(), "refused": failure(constants=(("ENTRIES", 257),))}
    found["unknown card"] = failure(Target("hip", "gfx9999", 32))
    found["good after that"] = failure(warps=2)
    # A compiler that dies: this one is killed while it works on a kernel that takes long.
    slow = dataclasses.replace(sums, constants=(("ENTRIES", 1 << 18),), warps=1)
    asked = COMPILER.ask(slow, Target("hip", "gfx1100", 32), is_to_run=False)
    deadline = time.monotonic() + 20
    while not (children := psutil.Process().children()) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert asked.over.wait(60)
    found["killed"] = asked.failure
    found["good after all"] = failure(warps=8)
    print(json.dumps(found))
"""


def test_a_compiler_that_refuses_or_dies_costs_one_kernel(with_triton):
    found = json.loads(with_triton("-c", textwrap.dedent(ACCIDENTS)))
    assert found["good"] is found["good after that"] is found["good after all"] is None
    assert "CompilationError" in found["refused"]
    assert "PassManager" in found["unknown card"]
    assert found["killed"].startswith("the compiler ended by SIGKILL")


REFUSED = """
    from rocm_patch.conv import DIRECT, direct, fused, implicit_gemm
    from rocm_patch.conv.cases import CASES
    from rocm_patch.kernels import launch
    from rocm_patch.kernels.variant import Target
    for module in (launch, implicit_gemm, direct):
        module.target_of = lambda device: Target("hip", "gfx9999", 32)
    spec = CASES[3].spec("forward", device="cuda:0")
    assert DIRECT.rejects(spec) is None
    assert not DIRECT.is_ready(spec, True)
    print(DIRECT.rejects(spec))
"""


def test_a_refused_card_is_a_reason_to_reject(with_triton):
    assert "PassManager" in with_triton("-c", textwrap.dedent(REFUSED))


BUDGET = """
    from rocm_patch.conv.cases import CASES
    from rocm_patch.trust.choose import Chooser
    spec = CASES[3].spec("forward")
    for workspace in (100, 1 << 30):
        print(*sorted(s.name for s in Chooser(workspace=workspace).ranked(spec) if not s.is_bounded))
"""


def test_a_kernel_that_takes_more_memory_than_is_allowed_is_not_chosen(with_triton):
    little, much = with_triton("-c", textwrap.dedent(BUDGET), TRITON_INTERPRET="1").splitlines()
    assert little == "direct"  # takes none
    assert "columns" in much and "implicit_gemm_16" in much


REASON = """
    from rocm_patch.conv import COLUMNS, DIRECT, IMPLICIT_GEMMS, likeliest
    from rocm_patch.conv.cases import CASES
    spec = CASES[3].spec("forward", device="cuda:0")
    print({strategy.rejects(spec) for strategy in (COLUMNS, DIRECT, *IMPLICIT_GEMMS)}, likeliest(spec)[0].name)
"""


@pytest.mark.parametrize("version", [None, "3.0.0"])
def test_no_triton_and_one_that_is_too_old_are_reasons_to_reject(tmp_path, version):
    reason = "Triton is not installed"
    if version is not None:
        folder = tmp_path / f"triton-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {version}\n")
        reason = "Triton 3.0 is older than 3.5"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REASON)], capture_output=True, text=True, check=True, timeout=120,
        env=clean_environ(PYTHONPATH=str(tmp_path)),
    )  # fmt: skip
    reasons, served = done.stdout.strip().rsplit(" ", 1)
    assert reasons == str({reason})
    assert served in ("im2col", "taps", "winograd_f23", "winograd_f43")

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MACHINES = ROOT / "tests" / "machines"
PATCHED_VARIABLES = (
    "MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "HSA_OVERRIDE_GFX_VERSION", "HSA_USE_SVM", "HSA_XNACK",
)  # fmt: skip
# A shell's background jobs start with SIGINT ignored, and what nohup starts with SIGHUP; and so would the programs
# that are interrupted here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# oneDNN 2.6, which Debian's torch 1.13 multiplies with, ends the process by an illegal instruction in a bfloat16
# product of (396, 63) and (63, 5) where the processor has AMX: torch's own mm, nothing of ours.
if importlib.metadata.version("torch").startswith("1."):
    os.environ.setdefault("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16")
_outcomes: dict[str, str] = {}
_SESSION_CACHE = tempfile.TemporaryDirectory(prefix="rocm-patch-tests-")


def clean_environ(**extra):
    """The environment without anything of ours, and what the test adds."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if "ROCM_PATCH" not in name and name not in (*PATCHED_VARIABLES, "PYTHONPATH", "VIRTUAL_ENV")
    }
    kept["VIRTUAL_ENV"] = sys.prefix
    kept["OMP_NUM_THREADS"] = "1"
    # Never the user's own record of what fails on this machine.
    kept["ROCM_PATCH_CACHE_DIR"] = os.environ.get("ROCM_PATCH_CACHE_DIR", _SESSION_CACHE.name)
    return {**kept, **extra}


def python(*arguments, cwd=None, input=None, check=True, **environ):
    """A fresh Python process; its output on failure."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, input=input, env=clean_environ(**environ),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def rocm_patch(*arguments, **options):
    """The command line, as a user's shell starts it."""
    return python("-m", "rocm_patch", *arguments, **options)


@pytest.fixture(autouse=True)
def _nothing_stays_patched(monkeypatch, tmp_path_factory):
    for name in list(os.environ):
        if "ROCM_PATCH" in name or name in PATCHED_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("ROCM_PATCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    if "rocm_patch.api" in sys.modules:
        sys.modules["rocm_patch.api"].disable_all_patches()


@pytest.fixture
def one_thread():
    """On small tensors the threads of a busy machine wait for each other most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_environ(tmp_path):
    """An environment with a cache and a home of its own."""
    return {"ROCM_PATCH_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}


@pytest.fixture
def old_torch(tmp_path):
    """A torch of the original's release, with real code for gfx1030 and none for gfx1010."""
    from builds import bundle_of, torch_folder
    from code_objects import triton

    folder = torch_folder(tmp_path / "env", "1.13.1+rocm5.2", "5.2.21151", targets=("gfx1030",))
    code = triton()
    (folder / "lib/libtorch_hip.so").write_bytes(bundle_of({"gfx900": b"BC", "gfx1030": code["gfx1030"]}))
    library = folder / "lib/rocblas/library"
    library.mkdir(parents=True)
    for target in ("gfx1010", "gfx1030"):
        (library / f"Kernels.so-000-{target}.hsaco").write_bytes(code[target])
    (library / "TensileLibrary_gfx1030.dat").write_bytes(b"\x81 no code")
    database = folder / "share/miopen/db"
    database.mkdir(parents=True)
    (database / "gfx1030_36.HIP.fdb.txt").write_text("1-1=ConvX:1,2,3\n")
    return folder


def pytest_collection_modifyitems(items):
    """What knows nothing of torch runs on one generation of it."""
    import torch

    if torch.__version__.startswith("1."):
        for item in items:
            if item.get_closest_marker("torch_free"):
                item.add_marker(pytest.mark.skip(reason="has nothing to do with torch: one generation is enough"))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome == "skipped":
        is_absent = report.outcome == "skipped" and "not on this machine:" in str(report.longrepr)
        _outcomes[report.nodeid] = "absent" if is_absent else report.outcome


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist; the session that reports is another
        return
    import torch

    folder = ROOT / ".outcomes"
    folder.mkdir(exist_ok=True)
    (folder / f"torch-{torch.__version__}-{os.getpid()}.json").write_text(json.dumps(_outcomes))

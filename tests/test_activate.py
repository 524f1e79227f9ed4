"""`rocm-patch activate`: a virtual environment whose every program is patched, until it is not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, clean_environ, python, rocm_patch
from rocm_patch.launch import activate

SERVED = (
    "import torch, sys; torch.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))\n"
    "api = sys.modules.get('rocm_patch.overrides.aten')\n"
    "print([r.strategy.name for d in (api.ACTIVE.values() if api else ()) for r in d.routes.taken()])\n"
)


@pytest.fixture
def venv(tmp_path):
    """A virtual environment that sees this one's packages."""
    folder = tmp_path / "venv with 'quotes'"
    python("-m", "venv", "--without-pip", str(folder))
    site = next(folder.glob("lib/python3.*/site-packages"))
    import torch

    rows = [
        *(p for p in sys.path if p.endswith("-packages")),
        str(Path(torch.__file__).parents[1]),
        str(ROOT / "src"),
    ]
    (site / "packages.pth").write_text("\n".join(dict.fromkeys(rows)))
    return folder


def run_in(venv, *arguments, **environ):
    done = subprocess.run(
        [str(venv / "bin/python"), *arguments],
        env=clean_environ(**environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_program_of_the_environment_is_patched(venv):
    on = {"ROCM_PATCH_BACKEND": "cpu"}
    assert run_in(venv, "-c", SERVED, **on).stdout == "[]\n"
    for _ in range(2):
        done = rocm_patch("activate", "--venv", str(venv))
        assert "is activated by" in done.stderr and "hint: rocm-patch deactivate" in done.stderr
    assert run_in(venv, "-c", SERVED, **on).stdout == "['depthwise']\n"
    assert run_in(venv, "-I", "-c", SERVED).stdout == "[]\n"  # nothing asked for: a CPU build stays native
    assert run_in(venv, "-c", SERVED, ROCM_PATCH="0", **on).stdout == "[]\n"
    assert run_in(venv, "-c", SERVED).stderr == ""

    assert "is deactivated" in rocm_patch("deactivate", "--venv", str(venv)).stderr
    assert "was not activated" in rocm_patch("deactivate", "--venv", str(venv)).stderr
    assert run_in(venv, "-c", SERVED, **on).stdout == "[]\n"


def test_the_environment_is_planned_before_torch_is_imported(venv):
    activate.activate(venv)
    code = "import os; a = os.environ.get('HSA_XNACK'); import torch; print(a, os.environ.get('HSA_XNACK'))"
    assert run_in(venv, "-c", code).stdout == "None 0\n"
    assert run_in(venv, "-c", code, HSA_XNACK="1").stdout == "1 1\n"


def test_under_run_an_activated_environment_is_patched_once(venv):
    activate.activate(venv)
    code = "import sys, torch; print(sum(type(f).__name__ == '_TorchFinder' for f in sys.meta_path))"
    done = rocm_patch("run", "-q", "--backend", "cpu", "-c", code, VIRTUAL_ENV=str(venv))
    assert done.stdout == "1\n"


def test_an_environment_whose_rocm_patch_is_gone_starts_as_ever(venv, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "src", copy)
    python("-m", "rocm_patch", "activate", "--venv", str(venv), PYTHONPATH=str(copy))
    shutil.rmtree(copy)
    done = run_in(venv, "-c", "print('fine')")
    assert done.stdout == "fine\n" and done.stderr == ""


def test_doctor_shows_it(venv):
    assert "is not activated" in run_in(venv, "-m", "rocm_patch", "doctor", VIRTUAL_ENV=str(venv)).stdout
    activate.activate(venv)
    assert "is activated: every program" in run_in(venv, "-m", "rocm_patch", "doctor", VIRTUAL_ENV=str(venv)).stdout


def test_errors(tmp_path):
    for arguments in (("activate", "--venv", str(tmp_path)), ("deactivate", "--venv", str(tmp_path / "none"))):
        done = rocm_patch(*arguments, check=False)
        assert done.returncode == 2 and "is not a virtual environment" in done.stderr and "hint:" in done.stderr

"""The command line: what it prints, where, and its exit codes."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from conftest import MACHINES, PATCHED_VARIABLES, clean_environ, rocm_patch
from rocm_patch._version import __version__
from rocm_patch.cli.arguments import VALUE_OPTIONS, split_run
from rocm_patch.launch.run import Target


def test_version_and_help():
    assert rocm_patch("--version").stdout == f"rocm-patch {__version__}\n"
    shown = rocm_patch("--help").stdout
    for command in ("run", "env", "activate", "deactivate", "doctor"):
        assert command in shown
    assert "--start-method" in rocm_patch("run", "--help").stdout
    assert rocm_patch("nonsense", check=False).returncode == 2


def test_help_does_not_import_torch():
    code = "import sys; from rocm_patch.cli import main; main.main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], env=clean_environ(), capture_output=True, text=True
    )
    assert "rocm_patch.cli.main" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


@pytest.mark.parametrize(
    ("line", "ours", "target"),
    [
        ("x.py -q", "", Target("script", ("x.py", "-q"))),
        ("-q --backend cpu x.py --backend y", "-q --backend cpu", Target("script", ("x.py", "--backend", "y"))),
        ("--conv=im2col -m mod -m x", "--conv=im2col", Target("module", ("mod", "-m", "x"))),
        ("-- sh -c ls", "", Target("command", ("sh", "-c", "ls"))),
        ("-q - a", "-q", Target("script", ("-", "a"))),
        ("--unset A --unset B x.py", "--unset A --unset B", Target("script", ("x.py",))),
        ("--help", "--help", None),
        ("--backend", "--backend", None),
    ],
)
def test_where_our_options_end(line, ours, target):
    assert split_run(line.split()) == (ours.split(), target)


def test_the_options_with_values_are_the_commands():
    """cli/arguments.py cuts the line before the option parser sees it, so it must know them."""
    import inspect

    from rocm_patch.cli.main import run

    parameters = set(inspect.signature(run).parameters) - {"context", "quiet", "restart", "exact"}
    assert {"--" + name.replace("_", "-") for name in parameters} == set(VALUE_OPTIONS)


def test_env_for_sh_sets_what_it_says():
    script = f'eval "$({sys.executable} -m rocm_patch env)"; echo $HSA_OVERRIDE_GFX_VERSION'
    done = subprocess.run(["sh", "-c", script], env=clean_environ(), capture_output=True, text=True, check=True)
    assert done.stdout == "10.3.0\n"


def test_env_for_fish():
    lines = rocm_patch("env", "--shell", "fish").stdout.splitlines()
    assert lines[1] == "set -gx HSA_OVERRIDE_GFX_VERSION 10.3.0"
    if shutil.which("fish"):
        script = f"{sys.executable} -m rocm_patch env --shell fish | source; echo $HSA_XNACK"
        done = subprocess.run(["fish", "-c", script], env=clean_environ(), capture_output=True, text=True, check=True)
        assert done.stdout == "0\n"


def test_env_as_json_with_a_value_of_the_users():
    document = json.loads(rocm_patch("env", "--json", HSA_XNACK="1").stdout)
    assert document["schema_version"] == 1
    assert [row["name"] for row in document["variables"]] == list(PATCHED_VARIABLES)
    assert document["variables"][3]["found"] == "1"
    done = rocm_patch("env", HSA_XNACK="1")
    assert "HSA_XNACK" not in done.stdout and "HSA_XNACK=1 kept" in done.stderr


def test_env_explains_with_sources():
    shown = rocm_patch("env", "--explain").stdout
    assert shown.count("source:") == 4 and "MIOpen's default" in shown


def test_env_errors():
    done = rocm_patch("env", "--shell", "csh", check=False)
    assert done.returncode == 2 and "unknown shell 'csh'" in done.stderr and "hint:" in done.stderr
    assert rocm_patch("env", "--profile", "gaming", check=False).returncode == 2


def test_run_on_an_rdna1_machine_names_the_native_wheel():
    done = rocm_patch("run", "-c", "pass", ROCM_PATCH_SYSFS_ROOT=str(MACHINES / "rx_5600_xt"))
    assert "cannot use gfx1010" in done.stderr and "torch[device-gfx1010]" in done.stderr
    assert "3 variables set" in done.stderr


def test_doctor_on_a_machine_without_a_gpu():
    document = json.loads(rocm_patch("doctor", "--json").stdout)
    assert document["schema_version"] == 1
    fields = {"check", "level", "summary", "why", "fix", "source"}
    assert all(set(finding) == fields for finding in document["findings"])
    assert "failure" not in {finding["level"] for finding in document["findings"]}
    assert {"gpus", "torch_build", "convolutions", "environment", "activation"} <= {
        f["check"] for f in document["findings"]
    }


def test_doctor_fails_for_a_cpu_build_on_an_amd_machine():
    done = rocm_patch("doctor", check=False, ROCM_PATCH_SYSFS_ROOT=str(MACHINES / "rx_5600_xt"))
    assert done.returncode == 1
    assert "node 1: gfx1010, " in done.stdout and "36 compute units, 6.0 GiB, PCI 0000:03:00.0" in done.stdout
    assert (
        " build on a machine with an AMD GPU" in done.stdout
        and "fix: python -m pip uninstall -y torch" in done.stdout
    )


def test_doctor_names_a_driver_that_lists_no_gpu():
    done = rocm_patch("doctor", check=False, ROCM_PATCH_SYSFS_ROOT=str(MACHINES / "cpu_node_only"))
    assert done.returncode == 1 and "lists no AMD GPU" in done.stdout


def test_everything_answers_fast():
    """No promise about time, but an import of torch by mistake would take seconds."""
    start = time.perf_counter()
    for arguments in (("--help",), ("env",), ("doctor",)):
        rocm_patch(*arguments)
    assert time.perf_counter() - start < 6

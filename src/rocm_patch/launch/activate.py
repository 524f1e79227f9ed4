"""`rocm-patch activate`: the import hook in a virtual environment, for programs with a launcher of their own.

A `.pth` file in site-packages is executed by every Python of that environment at start, `-I` and `-E` included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rocm_patch.errors import UsageError

PTH_NAME = "rocm_patch_activate.pth"

# A venv whose rocm_patch is gone must start as if we had never been there.
_PROGRAM = """
import sys
if sys.version_info >= (3, 10):
    from importlib import util
    spec = util.spec_from_file_location("_rocm_patch_hook", {hook!r})
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        pass
    else:
        module.install({source!r})
"""


def environment_of(venv: str | None, environ: Mapping[str, str] | None = None) -> Path:
    """The virtual environment that is meant: the one given, else the active one, else the one we run in.

    Raises:
        UsageError: there is none, or the path is none.
    """
    given = venv or (os.environ if environ is None else environ).get("VIRTUAL_ENV")
    if given is None and sys.prefix != sys.base_prefix:
        given = sys.prefix
    if given is None:
        raise UsageError("no virtual environment is active", "give one: rocm-patch activate --venv PATH")
    if not (Path(given) / "bin").is_dir():
        raise UsageError(f"{given} is not a virtual environment: it has no bin folder", "python3 -m venv " + given)
    return Path(given).resolve()


def site_packages(environment: Path) -> Path:
    """The environment's folder for installed packages.

    Raises:
        UsageError: it has none that can be found.
    """
    found = sorted(environment.glob("lib/python3.*/site-packages"))
    if not found:
        raise UsageError(f"{environment} has no lib/python3.*/site-packages", "give the folder that holds bin/python")
    return found[-1]


def activate(environment: Path) -> Path:
    """Put the hook into the environment; returns the file. Doing it twice changes nothing.

    Raises:
        UsageError: the folder cannot be written.
    """
    folder = site_packages(environment)
    package = Path(__file__).resolve().parents[1]
    path = folder / PTH_NAME
    program = _PROGRAM.format(hook=str(package / "launch" / "hook.py"), source=str(package.parent))
    line = f"import sys; exec({program!r}, {{}})\n"  # site executes a line that starts with import
    try:
        beside = path.with_suffix(".tmp")
        beside.write_text(line, encoding="utf-8")
        beside.replace(path)
        _list_in_record(folder, present=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", f"check who owns {folder}") from error
    return path


def deactivate(environment: Path) -> bool:
    """Take the hook out again; False if it was not there.

    Raises:
        UsageError: the file cannot be removed.
    """
    folder = site_packages(environment)
    path = folder / PTH_NAME
    if not path.exists():
        return False
    try:
        path.unlink()
        _list_in_record(folder, present=False)
    except OSError as error:
        raise UsageError(f"cannot remove {path}: {error.strerror}", f"check who owns {folder}") from error
    return True


def is_active(environment: Path) -> bool:
    """Whether the hook lies in the environment."""
    try:
        return (site_packages(environment) / PTH_NAME).exists()
    except UsageError:
        return False


def _list_in_record(folder: Path, *, present: bool) -> None:
    """Name the file in rocm-patch's list of installed files, so that `pip uninstall` removes it too.

    https://packaging.python.org/en/latest/specifications/recording-installed-packages/
    """
    entry = f"{PTH_NAME},,\n"
    for record in folder.glob("rocm_patch-*.dist-info/RECORD"):
        lines = [line for line in record.read_text(encoding="utf-8").splitlines(keepends=True) if line != entry]
        beside = record.with_suffix(".tmp")
        beside.write_text("".join([*lines, entry] if present else lines), encoding="utf-8")
        beside.replace(record)

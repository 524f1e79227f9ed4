"""Rides in every Python process below `rocm-patch run`: its folder stands first on PYTHONPATH.

Installs the import hook, then runs the sitecustomize that this one hides, if there is one, exactly as Python
would have. Standard library only, and quick: it runs in every child.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _install_hook(here: str) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (a child may be any Python)
        return  # rocm_patch does not run there; the child starts unchanged
    # By path: the package itself need not be importable by this interpreter.
    path = os.path.join(os.path.dirname(here), "hook.py")  # noqa: PTH118, PTH120  (pathlib costs 5 ms)
    spec = importlib.util.spec_from_file_location("_rocm_patch_hook", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["_rocm_patch_hook"] = module
    spec.loader.exec_module(module)
    module.install()


def _run_hidden_sitecustomize(here: str) -> None:
    """Errors go on to Python's own handling of a broken sitecustomize, as without us, after a word of ours."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        # What Python meets where there is none: it passes over the import, and nothing is left in sys.modules.
        raise ModuleNotFoundError("No module named 'sitecustomize'", name="sitecustomize")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    try:
        spec.loader.exec_module(module)
    except Exception:
        sys.stderr.write(
            f"rocm-patch: {spec.origin} fails; the program starts all the same, patched\n"
            "hint: PYTHONVERBOSE=1 shows where, ROCM_PATCH=0 whether it is ours\n"
        )
        raise


_here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
# The program's own sys.path, without this folder; PYTHONPATH keeps it for the program's children.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _here]  # noqa: PTH100
_install_hook(_here)
_run_hidden_sitecustomize(_here)

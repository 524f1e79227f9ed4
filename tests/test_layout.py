"""The house rules that a reader relies on, held by reading the source."""

import ast
from pathlib import Path

import pytest

from conftest import ROOT, python

PACKAGE = ROOT / "src" / "rocm_patch"
# Imports point only to rooms further up in this list.
ROOMS = (
    "_version", "errors", "settings", "fallback", "machine", "child", "kernels", "conv", "trust", "route", "tuning",
    "routes", "dispatch", "workers", "overrides", "launch", "api", "miopen_bypass", "tools", "cli", "__main__",
)  # fmt: skip
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "launch/site" not in str(path))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rocm_patch":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("rocm_patch.")]


def test_every_module_is_in_a_known_room():
    assert {room_of(path) for path in SOURCES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_only_to_rooms_above(path):
    here = room_of(path)
    if here == "__init__":  # re-exports lazily
        return
    allowed = set(ROOMS[: ROOMS.index(here) + 1])
    if here == "miopen_bypass":  # re-exports of the package itself
        return
    assert set(imported_rooms(ast.parse(path.read_text()))) <= allowed


def test_conv_knows_tensors_and_nothing_of_amd_or_storage():
    for path in (PACKAGE / "conv").glob("*.py"):
        imported = set(imported_rooms(ast.parse(path.read_text())))
        assert imported <= {"conv", "kernels"}, path


@pytest.mark.parametrize("name", ["machine", "launch", "cli", "tools", "settings.py", "fallback.py", "api.py"])
def test_rooms_that_start_without_torch_do_not_import_it_at_the_top(name):
    target = PACKAGE / name
    for path in [target] if target.is_file() else target.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "torch" for alias in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "torch", path


def test_the_hook_uses_the_standard_library_only():
    for path in (PACKAGE / "launch" / "hook.py", PACKAGE / "launch" / "site" / "sitecustomize.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert names <= {"__future__", "os", "sys", "typing", "importlib.util", "importlib.machinery"}, path


def test_importing_does_nothing():
    code = (
        "import os, sys, multiprocessing; before = dict(os.environ)\n"
        "import rocm_patch, patches, patches.miopen_bypass.conv2d_fallback\n"
        "assert 'torch' not in sys.modules\n"
        "assert dict(os.environ) == before\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None\n"
        "assert rocm_patch.__version__ == patches.__version__ != ''\n"
    )
    done = python("-c", code)
    assert done.stdout == done.stderr == ""


def test_the_api_needs_no_torch_until_it_is_used():
    code = (
        "import sys; from rocm_patch import enable_all_patches, FallbackStrategy; assert 'torch' not in sys.modules"
    )
    python("-c", code)


def test_public_names_are_the_same_objects_under_every_name():
    import patches
    import patches.miopen_bypass.conv2d_fallback as original
    import rocm_patch
    import rocm_patch.miopen_bypass.conv2d_fallback as renamed

    for name in rocm_patch.__all__:
        assert getattr(patches, name) is getattr(rocm_patch, name)
    for name in original.__all__:
        assert getattr(original, name) is getattr(renamed, name) is getattr(rocm_patch, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = patches.nonsense

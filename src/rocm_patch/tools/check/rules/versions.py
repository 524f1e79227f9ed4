"""Code for rocm-patch 1.0, which had no help for loaders."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check import late
from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.scopes import last_part

_HOMES = ("patches", "rocm_patch")
_LAYERS = ("miopen_bypass", "SafeConv2d", "patch_model")
_NEWER = ("setup_multiprocessing", "patch_dataloader", "enable_all_patches")
_VARIABLE = "MIOPEN_DEBUG_CONV_IMPLICIT_GEMM"


def v1_api(script: Script) -> Iterator[Finding]:
    """Layers of 1.0 beside loaders with workers, and nothing that looks after the workers."""
    if not script.loaders.with_workers or _looks_after_workers(script):
        return
    imported = [node for node in ast.walk(script.names.tree) if _imports_layers(node)]
    by_hand = [
        place
        for node in script.names.table.of
        for place, name in late.assignments(node, script.names)
        if name == _VARIABLE
    ]
    if imported:
        beside = f" and {_VARIABLE} by hand" if by_hand else ""
        yield script.found(
            imported[0],
            "v1-api",
            f"the layers of rocm-patch 1.0{beside}, with loaders that have workers",
            "1.0 changes convolutions alone: workers are started as without it, and fail on the GPU"
            + ("; the variable has no effect" if by_hand else ""),
            "call enable_all_patches() under the guard before torch is imported, or take all of it out and start the "
            f"script by rocm-patch run {script.program}",
        )


def _imports_layers(node: ast.AST) -> bool:
    full: list[str] = []
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        full = [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return any(
        parts[0] in _HOMES and any(part in _LAYERS for part in parts[1:])
        for parts in (name.split(".") for name in full)
    )


def _looks_after_workers(script: Script) -> bool:
    for call in script.calls:
        if last_part(call.func) in _NEWER:
            return True
        if last_part(call.func) == "set_start_method":
            given = [text for part in call.args for text in script.names.texts(part)]
            if "spawn" in given or "forkserver" in given:
                return True
    return all(script.loaders.given(call, "multiprocessing_context") for call in script.loaders.with_workers)

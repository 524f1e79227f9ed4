"""Settings that a Python script makes too late: ROCm reads its variables once, when torch starts it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.machine import catalog
from rocm_patch.tools.doctor.finding import Finding

_STARTS_ROCM = ("torch", "torchvision", "torchaudio", "lightning", "pytorch_lightning", "transformers", "diffusers")


def late_settings(text: str, name: str) -> list[Finding]:
    """Variables of ROCm, MIOpen or torch that a script sets after it imports torch.

    Args:
        text: the script.
        name: its path, for the findings.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        return [
            Finding(
                "late_settings",
                "failure",
                f"{name} is not a Python script: {error}",
                fix=f"python -m py_compile {name}",
            )
        ]
    imported = min(_torch_imports(tree), default=None)
    found = []
    for line, variable in _assignments(tree):
        known = catalog.variable(variable)
        if known is not None and not known.read_late and imported is not None and line > imported:
            found.append(
                Finding(
                    "late_settings",
                    "warning",
                    f"{name}, line {line}: {variable} is set after torch is imported (line {imported})",
                    f"{known.component} reads it once, so it has no effect there; set it before "
                    "the import, or start the script by rocm-patch run",
                    f"rocm-patch run {name}",
                    "; ".join(known.sources[:2]),
                )
            )
    return found or [Finding("late_settings", "ok", f"{name} sets no variable too late")]


def _torch_imports(tree: ast.AST) -> Iterator[int]:
    # What is imported inside a function comes whenever that is called, which cannot be told from here.
    for node in _outside_functions(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in _STARTS_ROCM for name in names):
            yield node.lineno  # type: ignore[attr-defined]


def _assignments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what is put into `os.environ`: by item, setdefault, update, `|=`, or `os.putenv`."""
    for node in _outside_functions(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign) and _is_environ(node.target):
            yield from _keys(node.value)
        for target in targets:
            if isinstance(target, ast.Subscript) and _is_environ(target.value):
                yield from _constant(target.slice)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            by_environ = node.func.attr == "setdefault" and _is_environ(node.func.value)
            if by_environ or node.func.attr == "putenv":
                yield from _constant(node.args[0])
            if node.func.attr == "update" and _is_environ(node.func.value):
                yield from _keys(node.args[0])


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _outside_functions(node)


def _keys(node: ast.expr) -> Iterator[tuple[int, str]]:
    for key in node.keys if isinstance(node, ast.Dict) else []:
        if key is not None:
            yield from _constant(key)


def _is_environ(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def _constant(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value

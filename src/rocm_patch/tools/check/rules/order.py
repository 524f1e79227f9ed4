"""torch is imported too early."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check import late
from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.flow import Step
from rocm_patch.tools.check.scopes import last_part

_RULE = "torch-before-environment"
_SETUP = ("setup_multiprocessing", "setup_environment", "enable_all_patches")
_HOMES = ("patches", "rocm_patch")


def torch_before_environment(script: Script) -> Iterator[Finding]:
    """Variables that are set, and start methods that are chosen, after torch is imported."""
    where = "in the first cell" if script.is_notebook else f"or start it by rocm-patch run {script.path}"
    for entry in late.variables(script.steps, script.names):
        reader = entry.known.component if entry.known else "the GPU library that knows it"
        yield script.found(
            entry.node,
            _RULE,
            f"{entry.name} is set after torch is imported (line {entry.imported})",
            f"{reader} reads it once, when torch is imported or first uses the GPU, so it may have no effect here",
            f"set it before line {entry.imported}, {where}",
        )
    for step, imported in late.after_torch(script.steps, script.names):
        what = _chosen(script, step)
        if what:
            late_for = (
                "what torch and other packages made in between keeps another start method"
                if what in ("set_start_method", "setup_multiprocessing")
                else "variables that are read when torch starts the GPU may have no effect any more"
            )
            yield script.found(
                step.node,
                _RULE,
                f"{what}() is called after torch is imported (line {imported})",
                late_for,
                f"call it before line {imported}, {where}",
            )


def _chosen(script: Script, step: Step) -> str:
    """The function that is called too late; empty for none.

    `set_start_method` under the guard is how the manuals of Python and torch say it, and torch.multiprocessing's
    cannot be called before torch is imported: both work.
    """
    if not isinstance(step.node, ast.Call):
        return ""
    full = script.names.dotted(step.node.func)
    name = last_part(step.node.func)
    if name in _SETUP and (full.split(".")[0] in _HOMES or full == name):
        return name
    if full in ("multiprocessing.set_start_method", "multiprocessing.context.set_start_method"):
        return "" if step.is_guarded or not step.is_direct else "set_start_method"
    return ""

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
    for entry in late.variables(script.steps, script.names):
        imported = script.at(entry.imported)
        by_shell = (
            "" if script.is_notebook else f", or in the shell: {entry.name}=... rocm-patch run {script.program}"
        )
        yield script.found(
            entry.node,
            _RULE,
            f"{entry.name} is set after torch is imported ({imported})",
            f"{late.readers(entry)} when torch is imported or first uses the GPU, so it may have no effect here",
            f"set it before {imported}{by_shell}",
        )
    for step, line in late.after_torch(script.steps, script.names):
        what, imported = _chosen(script, step), script.at(line)
        if what == "set_start_method":
            yield script.found(
                step.node,
                _RULE,
                f"set_start_method() is called after torch is imported ({imported}), and not under the guard",
                "what torch and other packages made in between keeps another start method, and a worker that imports "
                "the file sets it once more: `context has already been set`",
                'call it under `if __name__ == "__main__":`, or leave it out: under rocm-patch run loaders need none',
            )
        elif what:
            by_run = "" if script.is_notebook else f", or take it out and start it by rocm-patch run {script.program}"
            late_for = (
                "what torch and other packages made in between keeps another start method"
                if what == "setup_multiprocessing"
                else "variables that are read when torch starts the GPU may have no effect any more"
            )
            yield script.found(
                step.node,
                _RULE,
                f"{what}() is called after torch is imported ({imported})",
                late_for,
                f"call it before {imported}{by_run}",
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

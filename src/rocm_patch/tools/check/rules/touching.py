"""The GPU is used where a script only should define things."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.late import IMPORT_TORCH
from rocm_patch.tools.check.loaders import DATASETS, is_torch_loader
from rocm_patch.tools.check.names import argument
from rocm_patch.tools.check.scopes import last_part

_RULE = "gpu-at-import"
# Of torch.cuda what starts the GPU; is_available and device_count are left out, and what waits for the start.
_STARTS = frozenset((
    "init", "synchronize", "current_device", "get_device_properties", "get_device_name", "get_device_capability",
    "set_device", "mem_get_info", "Stream", "Event", "ExternalStream", "current_stream", "default_stream", "stream",
    "set_stream", "device", "device_of", "is_bf16_supported", "get_rng_state", "get_rng_state_all", "CUDAGraph",
    "graph", "current_blas_handle", "can_device_access_peer", "set_per_process_memory_fraction", "memory_snapshot",
    "FloatTensor", "HalfTensor", "DoubleTensor", "LongTensor", "IntTensor", "ByteTensor", "BoolTensor", "ipc_collect",
))  # fmt: skip
_GPU_KEYWORDS = ("device", "map_location")
_NO_TENSORS = ("torch.device", "torch.autocast", "torch.set_default_device")


def gpu_at_import(script: Script) -> Iterator[Finding]:
    """What starts the GPU at the top level of a file that workers import, or whose workers are forked."""
    if script.is_notebook or not _concerns_workers(script):
        return
    lines: set[int] = set()
    for step in script.steps:
        if isinstance(step.node, ast.Call) and step.is_direct and not step.is_guarded:
            what = _touches(script, step.node)
            if what and step.node.lineno not in lines:
                lines.add(step.node.lineno)
                yield script.found(
                    _place(step.node),
                    _RULE,
                    f"{what} uses the GPU when this file is imported",
                    "a worker that imports the file starts the GPU too, which takes time and memory in each of them; "
                    "one that comes by fork finds it started, and cannot use it",
                    'move it into a function, or under `if __name__ == "__main__":`',
                )


def gpu_in_worker(script: Script) -> Iterator[Finding]:
    """What uses the GPU in the code that workers run: a dataset's items, collate_fn, worker_init_fn."""
    by_run = "" if script.is_notebook else f"; rocm-patch run {script.program} gives loaders workers that may use it"
    for where, function in _worker_code(script):
        for node in ast.walk(function):
            what = _touches(script, node) if isinstance(node, ast.Call) else ""
            if what:
                yield script.found(
                    node,
                    "gpu-in-worker",
                    f"{what} in {where} uses the GPU in the workers of a DataLoader",
                    "a forked worker cannot use the GPU once the program has: `Cannot re-initialize CUDA in forked "
                    "subprocess`; others can, and take some hundred MiB of its memory each",
                    f"make CPU tensors there, and move the batch in the training loop{by_run}",
                )


def _worker_code(script: Script) -> Iterator[tuple[str, ast.AST]]:
    names = script.names
    if not script.loaders.with_workers and script.loaders.calls:
        return
    datasets = [node for node in names.table.of if isinstance(node, ast.ClassDef) and _is_dataset(script, node)]
    for call in script.loaders.with_workers:
        for part in script.loaders.given(call, "dataset"):
            for value in names.values(part):
                own = names.definition(value.func) if isinstance(value, ast.Call) else None
                if isinstance(own, ast.ClassDef) and own not in datasets:
                    datasets.append(own)
        for name in ("collate_fn", "worker_init_fn"):
            for part in script.loaders.given(call, name):
                for value in names.values(part):
                    if isinstance(value, (ast.FunctionDef, ast.Lambda)):
                        yield name, value
    for owner in datasets:
        for method in owner.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__getitem__", "__getitems__", "__iter__"):
                yield f"{owner.name}.{method.name}", method


def _place(call: ast.Call) -> ast.AST:
    """Of a call over several lines where its name ends."""
    if isinstance(call.func, ast.Attribute) and call.func.end_lineno != call.lineno:
        return ast.Pass(lineno=call.func.end_lineno or call.lineno, col_offset=0)
    return call


def _concerns_workers(script: Script) -> bool:
    if script.loaders.has_processes():
        return True
    # A module with a dataset and without loaders is there for another file to import.
    return not script.loaders.calls and any(
        _is_dataset(script, node) for node in script.names.tree.body if isinstance(node, ast.ClassDef)
    )


def _is_dataset(script: Script, node: ast.ClassDef) -> bool:
    for base in script.names.bases(node):
        if isinstance(base, str):
            home, last = base.split(".")[0], base.rpartition(".")[2]
            if is_torch_loader(base) or (last in DATASETS and (home in IMPORT_TORCH or home == last)):
                return True
    return False


def _touches(script: Script, call: ast.Call) -> str:
    """How a call starts the GPU; empty if it does not, as far as can be seen."""
    names, name = script.names, last_part(call.func)
    full = names.dotted(call.func)
    if full.startswith("torch.cuda."):
        return f"{full}()" if full.split(".")[2] in _STARTS and full.count(".") == 2 else ""
    if isinstance(call.func, ast.Attribute) and full.split(".")[0] != "torch":
        if name == "cuda":
            return ".cuda()"
        if name == "to" and any(_is_gpu(script, part) for part in (*call.args, *names.keyword(call, "device"))):
            return ".to() a GPU"
    is_torch = full.split(".")[0] in IMPORT_TORCH and full not in _NO_TENSORS and "amp." not in full
    for keyword in _GPU_KEYWORDS if is_torch else ():
        if any(_is_gpu(script, part) for part in names.keyword(call, keyword)):
            return f"{full}(..., {keyword}=) on a GPU"
    return ""


def _is_gpu(script: Script, node: ast.AST) -> bool:
    for value in script.names.values(node):
        if isinstance(value, ast.Constant):
            if isinstance(value.value, str) and value.value.split(":")[0] in ("cuda", "hip"):
                return True
            if type(value.value) is int:  # the number of a GPU
                return True
        elif isinstance(value, ast.Call) and script.names.dotted(value.func) in ("torch.device", "device"):
            if value is not node or value.args:
                return any(_is_gpu(script, part) for part in argument(value, 0, "device"))
        elif isinstance(value, ast.JoinedStr) and value.values:  # f"cuda:{number}"
            first = value.values[0]
            if isinstance(first, ast.Constant) and str(first.value).startswith("cuda"):
                return True
    return False

"""What a script does after it has imported torch, and should have done before; `doctor` asks this too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rocm_patch.machine import catalog
from rocm_patch.machine.catalog import Variable
from rocm_patch.tools.check.flow import Step
from rocm_patch.tools.check.names import Names
from rocm_patch.tools.check.scopes import last_part

# Packages that import torch when they are imported.
IMPORT_TORCH = frozenset((
    "torch", "torchvision", "torchaudio", "torchtext", "torchdata", "torchmetrics", "torch_geometric",
    "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "diffusers", "accelerate", "timm",
    "ultralytics", "kornia", "monai", "fastai", "peft", "trl", "sentence_transformers", "safetensors.torch",
    "segmentation_models_pytorch", "open_clip", "clip", "mmcv", "mmengine", "detectron2", "ignite", "skorch",
    "einops.layers.torch", "bitsandbytes", "xformers", "deepspeed", "torchinfo", "torchsummary", "torch_ema",
    "pytorch_metric_learning", "catalyst",
))  # fmt: skip
_OURS = ("patches", "rocm_patch")
# Of our own names those that are made with torch.
_OURS_WITH_TORCH = ("Safe", "patch_model", "unpatch_model", "model_report", "patch_torch_nn", "restore_torch_nn")
# Variables of the GPU libraries that the catalog has no row for begin so.
_PREFIXES = ("HSA_", "MIOPEN_", "HIP_", "ROCR_", "ROC_", "HSAKMT_", "AMD_", "GPU_MAX_", "ROCBLAS_", "HIPBLASLT_",
             "RCCL_", "PYTORCH_HIP_", "PYTORCH_CUDA_", "PYTORCH_ALLOC_", "PYTORCH_ROCM_", "PYTORCH_TUNABLEOP_",
             "TORCH_ROCM_")  # fmt: skip


@dataclass(frozen=True)
class Late:
    """Something that comes after the import of torch.

    Attributes:
        node: where it is done.
        name: the variable, or the function that is called.
        imported: the line of the import.
        known: the variable's row in the catalog, None if there is none or it is a call.
    """

    node: ast.AST
    name: str
    imported: int
    known: Variable | None = None


def readers(entry: Late) -> str:
    """Who reads a variable, and how often, as the beginning of a sentence."""
    if entry.known is None:
        return "the GPU library that knows it reads it once,"
    several = "," in entry.known.component or " and " in entry.known.component
    return f"{entry.known.component} {'read' if several else 'reads'} it once,"


def variables(steps: Sequence[Step], names: Names) -> Iterator[Late]:
    """Variables of ROCm, MIOpen or torch that a script sets after it imports torch."""
    for step, imported in after_torch(steps, names):
        for node, name in assignments(step.node, names):
            known = catalog.variable(name)
            if known is not None and not known.read_late:
                yield Late(node, name, imported, known)
            elif known is None and name.startswith(_PREFIXES):
                yield Late(node, name, imported)


def after_torch(steps: Sequence[Step], names: Names) -> Iterator[tuple[Step, int]]:
    """The steps that come after torch is imported, each with the import's line."""
    imported = None
    for step in steps:
        if imported is not None:
            yield step, imported
        elif imports_torch(step.node, names):
            imported = getattr(step.node, "lineno", 0)


def imports_torch(node: ast.AST, names: Names) -> bool:
    """Whether evaluating a node alone imports torch."""
    if isinstance(node, ast.Import):
        return any(_brings_torch(alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        home = node.module or ""
        if node.level == 0 and home.split(".")[0] in _OURS:
            return any(alias.name.startswith(_OURS_WITH_TORCH) for alias in node.names)
        return node.level == 0 and (_brings_torch(home) or any(_brings_torch(f"{home}.{a.name}") for a in node.names))
    return isinstance(node, ast.Call) and last_part(node.func) in ("import_module", "__import__") and _brings_torch(
        names.dotted(node)
    )  # fmt: skip


def _brings_torch(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in IMPORT_TORCH for count in range(1, len(parts) + 1))


def assignments(node: ast.AST, names: Names) -> Iterator[tuple[ast.AST, str]]:
    """What a node puts into `os.environ`: by item, setdefault, update, `|=`, or `os.putenv`."""
    if isinstance(node, ast.AugAssign) and _is_environ(node.target, names):
        yield from _keys(node.value, node, names)
    for target in node.targets if isinstance(node, ast.Assign) else []:
        if isinstance(target, ast.Subscript) and _is_environ(target.value, names):
            yield from ((node, name) for name in names.texts(target.slice))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        is_environ = _is_environ(node.func.value, names)
        if (node.func.attr == "setdefault" and is_environ) or names.dotted(node.func) == "os.putenv":
            yield from ((node, name) for part in node.args[:1] for name in names.texts(part))
        if node.func.attr == "update" and is_environ:
            for part in node.args:
                yield from _keys(part, node, names)
            yield from ((keyword.value, keyword.arg) for keyword in node.keywords if keyword.arg)


def _keys(options: ast.expr, node: ast.AST, names: Names) -> Iterator[tuple[ast.AST, str]]:
    """The names in a dict, where they stand if they stand in the call itself."""
    for value in names.values(options):
        for key in value.keys if isinstance(value, ast.Dict) else []:
            for name in names.texts(key) if key is not None else []:
                yield (key if value is options and key is not None else node), name
        if isinstance(value, ast.Call) and last_part(value.func) == "dict":
            yield from ((node, keyword.arg) for keyword in value.keywords if keyword.arg)


def _is_environ(node: ast.AST, names: Names) -> bool:
    return names.dotted(node) in ("os.environ", "environ")

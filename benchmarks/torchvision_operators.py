"""torchvision's `nms` and `roi_align` in torch's own operations, for where its C++ part does not fit this torch.

The torchvision of PyPI is built for a CUDA torch. Beside a CPU build its C++ part cannot be loaded, and then
`import torchvision` itself fails, because it describes operators that nobody has defined.

`on_import()` makes up for it, before torchvision is imported. It imports nothing but the standard library, so that it
may be called when Python starts: `tests/programs/run.py` copies this file into its environment, with a `.pth` file
that calls it. Where the C++ part fits, it changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def on_import() -> None:
    """Define the operators that torchvision lacks as soon as it is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Lets a module be found as ever, and calls a function on it when it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        after = _AFTER.get(name)
        spec = PathFinder.find_spec(name, path, target) if after else None
        if after is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _define(extension: ModuleType) -> None:
    """After torchvision.extension, which tries to load the C++ part; before whatever needs it."""
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEPT.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CompositeExplicitAutograd")
    extension._assert_has_ops = lambda: None  # type: ignore[attr-defined]


def _replace_roi_align(module: ModuleType) -> None:
    """torchvision's own stand-in compiles itself, and gathers gigabytes."""
    if not module._has_ops():
        module._roi_align = roi_align  # type: ignore[attr-defined]


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "torchvision.extension": _define,
    "torchvision.ops.roi_align": _replace_roi_align,
}
_KEPT: list[Any] = []


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of boxes (N, 4) kept, by falling score: each drops the later ones that overlap it by more."""
    import torch

    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    sizes = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(
        boxes[:, None, :2], boxes[None, :, :2]
    )
    shared = sizes.clamp(min=0).prod(2)
    overlaps = shared > threshold * (areas[:, None] + areas[None] - shared)
    dropped = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    for number in range(len(order)):
        if not dropped[number]:
            dropped[number + 1 :] |= overlaps[number, number + 1 :]
    return order[~dropped]


def roi_align(
    image: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int, aligned: bool
) -> Tensor:
    """Boxes (K, 5: batch number, x, y, x, y) of image (N, C, H, W), resampled to (K, C, height, width).

    A bin is the mean of `samples` times `samples` bilinear samples (with -1, about one per pixel of the image), so it
    is a product with one matrix per axis.
    """
    import torch

    def axis(low: Tensor, high: Tensor, bins: int, size: int) -> Tensor:
        low, high = (scale * edge - 0.5 * aligned for edge in (low, high))
        extent = high - low if aligned else (high - low).clamp(min=1)
        counts = torch.full_like(extent, samples) if samples > 0 else (extent / bins).ceil().clamp(min=1)
        numbers = torch.arange(int(counts.max()) if len(rois) else 1, device=image.device).to(image)
        starts = torch.arange(bins, device=image.device)[:, None]
        places = starts + (numbers + 0.5) / counts[:, None, None]  # (K, bins, samples), in bins
        at = low[:, None, None] + places * (extent / bins)[:, None, None]
        counted = (at >= -1) & (at <= size) & (numbers < counts[:, None, None])
        distance = at.clamp(0, size - 1)[..., None] - torch.arange(size, device=image.device)
        weights = (1 - distance.abs()).clamp(min=0) * counted[..., None]
        return weights.sum(2) / counts[:, None, None]

    rows = axis(rois[:, 2], rois[:, 4], height, image.shape[2])
    columns = axis(rois[:, 1], rois[:, 3], width, image.shape[3])
    return rows[:, None] @ image[rois[:, 0].long()] @ columns[:, None].transpose(2, 3)

"""The layers that `rocm-patch bench` measures: the suite's, tiny ones like them, or those of a model."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocm_patch.errors import RocmPatchError, UsageError

if TYPE_CHECKING:
    import torch

    from rocm_patch.conv.cases import Case

_MODEL_HINT = "--model torchvision:resnet50, timm:convnext_tiny, nets.py:make_net or net.pt"


@dataclass(frozen=True)
class Layer:
    """A convolution to measure; a model may have several that are alike (`count`)."""

    name: str
    case: Case
    count: int = 1

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.case.spec("forward").grad

    def flops(self) -> float:
        """Of one direction: two for each product that is summed, the same in all three."""
        return 2.0 * math.prod(self.out) * math.prod(self.case.weight[1:])

    def elements(self) -> int:
        """Of the three tensors, each of which every direction reads or writes at least once."""
        return sum(map(math.prod, (self.case.image, self.case.weight, self.out)))


def standard_layers(parts: Sequence[str] = (), batch: int = 0, quick: bool = False) -> list[Layer]:
    """The layers that speed is judged by.

    Args:
        parts: of names; without any, all layers.
        batch: instead of the layers' own, unless 0.
        quick: tiny ones of the same kind.

    Raises:
        UsageError: no layer has such a part in its name.
    """
    from rocm_patch.conv.cases import LAYERS

    found = [Layer(case.why, _tiny(case) if quick else case) for case in LAYERS]
    if batch:
        cases = [dataclasses.replace(layer.case, image=(batch, *layer.case.image[1:])) for layer in found]
        found = [Layer(case.why, case) for case in cases]
    return chosen_layers(found, parts)


def chosen_layers(layers: Sequence[Layer], parts: Sequence[str]) -> list[Layer]:
    """Those that have one of the parts in their name; raises `UsageError` for a part that none has."""
    for part in parts:
        if not any(part in layer.name for layer in layers):
            names = ", ".join(layer.name for layer in layers)
            raise UsageError(f"no layer is called {part!r}; there are {names}", f"--layer {layers[0].name!r}")
    return [layer for layer in layers if not parts or any(part in layer.name for part in parts)]


def _tiny(case: Case) -> Case:
    divisor = math.ceil(max(case.image[2:]) / 16)
    spatial = (max(size // divisor, 1) for size in case.image[2:])
    filters, channels = min(case.weight[0] // case.groups, 32), min(case.weight[1], 32)
    groups = min(case.groups, 32 // max(filters, channels))
    weight = (groups * filters, channels, *case.weight[2:])
    return dataclasses.replace(case, image=(1, groups * channels, *spatial), weight=weight, groups=groups)


def model_layers(model: torch.nn.Module, shapes: Sequence[tuple[int, ...]], channels_last: bool) -> list[Layer]:
    """The convolutions of a model's forward, each once, with how often it has it.

    A transposed convolution is measured as the plain one that it is the gradient of.

    Args:
        model: left as it is; nothing of it is computed.
        shapes: of its inputs, in order.
        channels_last: whether inputs and weights are in that memory format.

    Raises:
        UsageError: it does not take these inputs, or has no convolution.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from rocm_patch.conv.cases import Case
    from rocm_patch.conv.of_model import specs_of_model

    calls: Counter[Any] = Counter()

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.convolution.default:
                stride, padding, dilation, transposed = map(_tuple, args[3:7])
                shapes = (tuple(args[0].shape), tuple(args[1].shape))
                calls[shapes + (stride, padding, dilation, transposed, args[8])] += 1
            return function(*args, **(kwargs or {}))

    try:
        with Counting():  # type: ignore[no-untyped-call, unused-ignore]
            specs = specs_of_model(model, shapes, "float32", "cpu", channels_last)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        given = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise UsageError(
            f"the model does not take inputs of {given}: {error}", "--input-shape 3x224x224, one option per input"
        ) from error
    layers = []
    for spec in specs:
        if spec.direction == "forward":
            rest = (spec.weight, spec.stride, spec.padding, spec.dilation)
            keys = ((spec.image, *rest, False, spec.groups), (spec.grad, *rest, True, spec.groups))
            name = str(spec).removeprefix("forward ").replace(" float32 cpu", "").removesuffix(" channels_last")
            case = Case(name, spec.image, *rest, spec.groups)
            layers.append(Layer(name, case, max(1, sum(calls[key] for key in keys))))
    if not layers:
        raise UsageError("the model has no convolution that rocm-patch serves", "name a model that has one")
    return layers


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def load_model(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, list[tuple[int, ...]]]:
    """A model, untrained where a package makes it, and the shapes of its inputs without the batch.

    Args:
        name: `torchvision:NAME`, `timm:NAME`, `file.py:callable`, or a file that `torch.save` wrote a module to,
            which runs code that the file names.
        shapes: of the inputs without the batch; of a package's model they need not be given.

    Raises:
        RocmPatchError: the package is not installed.
        UsageError: no such model, or its inputs are not known.
    """
    import torch

    source, _, rest = name.partition(":")
    given = list(shapes)
    try:
        if source == "torchvision":
            maker = getattr(_package(source).models, rest)
            wanted = inspect.signature(maker).parameters
            # Without a word the backbones of some models are downloaded.
            model = maker(**{key: None for key in ("weights", "weights_backbone") if key in wanted})
            given = given or [(3, 224, 224)]
        elif source == "timm":
            model = _package(source).create_model(rest, pretrained=False)
            given = given or [tuple(model.default_cfg["input_size"])]
        elif source.endswith(".py"):
            model = _from_script(Path(source), rest)
        elif Path(name).exists():
            model = torch.load(name, map_location="cpu", weights_only=False)
        else:
            raise UsageError(f"there is no model {name!r}", _MODEL_HINT)
    except (AttributeError, TypeError, RuntimeError, OSError, ValueError, ImportError, SyntaxError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot make the model {name!r}: {error}", _MODEL_HINT) from error
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{name!r} is a {type(model).__name__}, not a torch.nn.Module", _MODEL_HINT)
    if not given:
        raise UsageError(f"the inputs of {name} are not known", f"--model {name} --input-shape 3x224x224")
    return model, given


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RocmPatchError(
            f"{name} cannot be imported: {error}", f"pip install {name} (one that fits this torch)"
        ) from error


def _from_script(path: Path, attribute: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file", _MODEL_HINT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, attribute)
    return made() if callable(made) and not hasattr(made, "named_modules") else made

"""`rocm-patch tune`: time the convolutions of a model before its programs run, so that they start with the winners.

The convolutions come from a run of the model that computes nothing, shapes only. What is timed already is not timed
again, so a tuning that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rocm_patch.errors import UsageError
from rocm_patch.settings import LOGGER, Settings
from rocm_patch.tools.bench_layers import load_model

if TYPE_CHECKING:
    import torch

    from rocm_patch.conv.spec import ConvSpec
    from rocm_patch.trust.choose import Chooser
    from rocm_patch.tuning import Tuner

SCHEMA_VERSION = 1
_INPUT_HINT = "rocm-patch tune MODEL --input 3x224x224, without the batch, one option per input"


@dataclass(frozen=True)
class Row:
    """One convolution in one direction.

    Attributes:
        spec: the convolution.
        seconds: what strategies took for it, by name; of one like it where that is what is known.
        without_tuning: the strategy that the cost model names; empty where all are known to fail.
        is_new: False for what was known before.
        why: the reason why nothing could be timed, empty where something was.
    """

    spec: ConvSpec
    seconds: Mapping[str, float]
    without_tuning: str
    is_new: bool
    why: str = ""

    @property
    def fastest(self) -> str | None:
        """The strategy that took the least time, None where none could be timed."""
        return min(self.seconds, key=lambda name: self.seconds[name]) if self.seconds else None

    @property
    def gain(self) -> float | None:
        """How many times longer the cost model's strategy takes than the fastest, None where it was not timed."""
        if self.fastest is None or self.without_tuning not in self.seconds:
            return None
        return self.seconds[self.without_tuning] / max(self.seconds[self.fastest], 1e-12)


def of_model(
    device: str,
    name: str,
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    dtypes: Sequence[str],
    channels_last: bool,
) -> list[ConvSpec]:
    """The convolutions of a model's forward, in all three directions.

    Args:
        device: where they would run.
        name: the model, see `load_model`.
        shapes: of its inputs, without the batch; of a package's model they need not be given.
        batch: samples.
        dtypes: the types of parameters and inputs to tune for.
        channels_last: whether inputs and weights are in that memory format.

    Raises:
        RocmPatchError: the model's package is not installed.
        UsageError: no such model, it does not take these inputs, or it has no convolution.
    """
    from rocm_patch.conv.of_model import specs_of_model

    try:
        model, known_shapes = load_model(name, shapes)
    except UsageError as error:
        hint = _INPUT_HINT.replace("MODEL", name) if "inputs of" in error.message else error.hint
        raise UsageError(error.message, hint.replace("--model ", "rocm-patch tune ")) from error
    inputs = [(batch, *shape) for shape in known_shapes]
    try:
        found = [spec for dtype in dtypes for spec in specs_of_model(model, inputs, dtype, device, channels_last)]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        given = ", ".join("x".join(map(str, shape)) for shape in inputs)
        raise UsageError(f"{name} does not take inputs of {given}: {error}", _INPUT_HINT) from error
    if not found:
        raise UsageError(f"{name} has no convolution that rocm-patch serves", "name a model that has one")
    return found


def rows(specs: Iterable[ConvSpec], settings: Settings, again: bool = False) -> Iterator[Row]:
    """Time each convolution on random operands; each row's times are kept before it is given.

    Ends early, with a row that says so, where the GPU is lost.

    Args:
        specs: the convolutions.
        settings: of these, `exact`, `workspace`, the limits and where hardware is read.
        again: time what is known already too.
    """
    import torch

    from rocm_patch.overrides import guarding
    from rocm_patch.trust.choose import Chooser
    from rocm_patch.trust.native_errors import blame
    from rocm_patch.tuning import Tuner

    # It ranks by estimate, since it is given no timings.
    chooser = Chooser("bypass", exact=settings.exact, workspace=settings.workspace)
    guard = guarding.guard_for(chooser, settings)
    chooser.verdict = guard.verdicts.of
    timings = guarding.timings_for(guard, settings)
    for spec in specs:
        usable = _usable(chooser, spec)
        known = {} if again else {name: taken for name, taken in timings.of(spec).items() if name in usable}
        if known:
            yield Row(spec, known, usable[0], is_new=False)
            continue
        seconds, why, is_lost = {}, "no strategy computed it rightly; ROCM_PATCH_LOG=info says what each did", False
        try:
            # A tuner stops after so many convolutions that a program came upon; these were asked for, so each has
            # a tuner of its own.
            seconds = _timed(spec, Tuner(chooser, guard, timings), settings.workspace)
        except RuntimeError as error:
            why, is_lost = (str(error).strip().splitlines() or [type(error).__name__])[0], blame(error) == "device"
            LOGGER.info("%s was not timed: %s", spec, error)
        # What failed meanwhile would not have served without tuning either.
        usable = _usable(chooser, spec)
        yield Row(spec, seconds, usable[0] if usable else "", is_new=True, why="" if seconds else why)
        if is_lost:
            return
        if spec.device != "cpu":
            torch.cuda.empty_cache()


def _usable(chooser: Chooser, spec: ConvSpec) -> list[str]:
    """Strategies that are not known to fail, the cost model's favourite first."""
    verdicts = {strategy.name: chooser.verdict(spec, strategy.name) for strategy in chooser.ranked(spec)}
    return [name for name, verdict in verdicts.items() if verdict is None or not verdict.is_bad]


def _timed(spec: ConvSpec, tuner: Tuner, workspace: int | None) -> dict[str, float]:
    """Seconds by strategy; raises RuntimeError where there is no memory for the operands or the GPU is lost."""
    import torch

    from rocm_patch.conv import Strategy
    from rocm_patch.conv.strategy import memory_format, workspace_budget
    from rocm_patch.route import Route

    first, second = _operands(spec)
    layout = memory_format(spec)
    budget = workspace_budget(torch.device(spec.device)) if workspace is None else workspace

    def run(strategy: Strategy) -> torch.Tensor:
        return Route(spec, strategy, "", layout, budget).run(first, second)

    with torch.no_grad():
        return tuner.tune(spec, run, first, second)


def _operands(spec: ConvSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Strategy.run` takes them, in the memory format of the result."""
    import torch

    from rocm_patch.conv.spec import FORWARD, GRAD_WEIGHT
    from rocm_patch.conv.strategy import memory_format

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        # torch 1.13 draws no half types on the CPU.
        values = torch.randn(shape, device=spec.device).to(getattr(torch, spec.dtype))
        return values.contiguous(memory_format=memory_format(spec))

    first = spec.image if spec.direction in (FORWARD, GRAD_WEIGHT) else spec.grad
    second = spec.grad if spec.direction == GRAD_WEIGHT else spec.weight
    return random(first), random(second)


def document(found: Sequence[Row], device: str) -> dict[str, Any]:
    """The rows as the JSON document of the command line; what is not known is null."""
    listed = [
        {
            "spec": json.loads(row.spec.to_json()),
            "label": str(row.spec),
            "fastest": row.fastest,
            "seconds": None if row.fastest is None else row.seconds[row.fastest],
            "without_tuning": row.without_tuning or None,
            "is_new": row.is_new,
            "why": row.why or None,
        }
        for row in found
    ]
    return {"schema_version": SCHEMA_VERSION, "device": device, "rows": listed}

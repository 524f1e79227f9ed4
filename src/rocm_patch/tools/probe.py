"""`rocm-patch probe`: prove convolutions ahead of time, in the sandbox, and keep the verdicts.

What is to be proven comes from a model (run on the meta device: shapes only, no kernel), from a script (run for a
while on the bypass), or from the built-in suite. Verdicts that are there already are not made again, so a probe that
was interrupted goes on where it was.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import TorchMissingError, UsageError
from rocm_patch.launch.run import Target, prepare
from rocm_patch.settings import Settings
from rocm_patch.trust.store import Store, Verdict

SCHEMA_VERSION = 1
_ENDING = 10.0  # seconds that a script has to end when its time is up


@dataclass(frozen=True)
class Row:
    """One convolution, in one direction, on one strategy.

    Attributes:
        label: the convolution, for people.
        direction: `forward`, `grad_input` or `grad_weight`.
        strategy: its name.
        kind: the verdict, `ok`, `error`, `crash`, `hang` or `wrong`; `unknown` where nothing can be said.
        seconds: what one call takes; 0 if unknown.
        error: relative error against float64.
        evidence: what was seen.
        is_new: False for a verdict that was there already.
    """

    label: str
    direction: str
    strategy: str
    kind: str
    seconds: float
    error: float
    evidence: str
    is_new: bool

    @property
    def is_bad(self) -> bool:
        """Whether it failed."""
        return self.kind not in ("ok", "unknown")


@dataclass(frozen=True)
class Plan:
    """What is to be proven: pairs of spec (JSON) and strategy, on one device."""

    device: str
    pairs: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.pairs)


def device_of(settings: Settings) -> str:
    """The device that convolutions are proven on.

    Raises:
        TorchMissingError: torch cannot be imported.
        UsageError: the backend that is asked for has no device here.
    """
    torch = _torch()
    if settings.backend == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda:0"
    if settings.backend == "auto":
        return "cpu"
    raise UsageError(
        f"cannot probe on {settings.backend}: torch {torch.__version__} sees no GPU",
        "rocm-patch doctor says why; ROCM_PATCH_BACKEND=cpu probes the CPU's convolutions",
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise TorchMissingError(
            f"cannot probe: torch cannot be imported by {sys.executable} ({error})",
            "install rocm-patch into the environment that has torch, and call it from there",
        ) from error
    return torch


def of_suite(device: str, dtypes: Sequence[str]) -> Plan:
    """The shapes that tests and benchmarks share, in every direction and both memory formats."""
    from rocm_patch.conv.cases import CASES
    from rocm_patch.conv.spec import DIRECTIONS

    specs = [
        case.spec(direction, dtype, device, last)
        for dtype in dtypes
        for case in CASES
        for last in ((False, True) if len(case.image) > 3 else (False,))
        for direction in DIRECTIONS
    ]
    return _plan(device, specs)


def of_model(device: str, name: str, inputs: Sequence[str], dtypes: Sequence[str], channels_last: bool) -> Plan:
    """The convolutions of a model.

    Args:
        device: where they would run.
        name: `module:callable`, which makes the model without arguments, `torchvision.models:resnet18` for example.
        inputs: the shapes of its inputs, `8x3x224x224`.
        dtypes: the types to prove it in.
        channels_last: whether the inputs are in that memory format.

    Raises:
        UsageError: no such model, or it does not take these inputs.
    """
    from rocm_patch.conv.of_model import specs_of_model

    model = _made(name)
    shapes = [_shape(text) for text in inputs]
    try:
        found = [spec for dtype in dtypes for spec in specs_of_model(model, shapes, dtype, device, channels_last)]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"{name} does not take inputs of {', '.join(inputs)}: {error}",
            "give one --input per input of its forward, 8x3x224x224 for example",
        ) from error
    if not found:
        raise UsageError(f"{name} has no convolution that rocm-patch serves", "name a model that has one")
    return _plan(device, found)


def _made(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), attribute)
        return made() if callable(made) and not hasattr(made, "named_modules") else made
    except (ImportError, AttributeError, TypeError) as error:
        raise UsageError(
            f"cannot make the model {name!r}: {error}", "name it as module:callable, torchvision.models:resnet18"
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"{text!r} is not the shape of an input", "--input 8x3x224x224")
    return shape


def of_script(
    device: str, words: Sequence[str], settings: Settings, environ: Mapping[str, str], seconds: float
) -> Plan:
    """The convolutions that a script makes in its first seconds, served by the bypass meanwhile.

    Raises:
        UsageError: the script cannot be run, or makes none.
    """
    launch = prepare(
        Target("script", tuple(words)), settings.replaced(conv="bypass", backend=_backend(device)), environ
    )
    with tempfile.TemporaryDirectory(prefix="rocm-patch-probe-") as folder:
        record = Path(folder, "specs")
        child = {**launch.environ, "_ROCM_PATCH_RECORD": str(record)}
        process = subprocess.Popen(launch.argv, env=child, stdout=sys.stderr, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    if not lines:
        raise UsageError(
            f"{words[0]} made no convolution in {seconds:g} s (exit code {process.returncode})",
            "give it longer with --seconds, or name its model instead: rocm-patch probe module:callable",
        )
    from rocm_patch.conv.spec import ConvSpec

    return _plan(device, [ConvSpec.from_json(line, device) for line in lines])


def _backend(device: str) -> str:
    torch = _torch()
    return "cpu" if device == "cpu" else "hip" if torch.version.hip else "cuda"


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_ENDING)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


# Of ours so many are proven for a convolution, if their estimates are no further than this from the best.
_LIKELIEST, _NEAR = 3, 2.0


def _worth_proving(spec: Any) -> list[Any]:
    from rocm_patch.conv import likeliest

    ours = likeliest(spec)
    return [strategy for strategy in ours[:_LIKELIEST] if strategy.seconds(spec) <= _NEAR * ours[0].seconds(spec)]


def _plan(device: str, specs: Iterable[Any]) -> Plan:
    from rocm_patch.conv import NATIVE

    pairs = {
        (spec.to_json(), strategy.name): None
        for spec in specs
        # Those that are slow for it serve only when the others have failed: they are proven then.
        for strategy in (NATIVE, *_worth_proving(spec))
    }
    return Plan(device, tuple(pairs))


def run(
    plan: Plan,
    settings: Settings,
    store: Store,
    again: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Prove what is planned; every verdict is kept as soon as it is there.

    Args:
        plan: the pairs.
        settings: of these, the limits.
        store: where verdicts are kept.
        again: prove what is known already too; a bad verdict stays what it is unless the store is cleared.
        on_row: called with each row when it is there.
    """
    rows = []
    for row in _rows(plan, settings, store, again):
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _rows(plan: Plan, settings: Settings, store: Store, again: bool) -> Iterator[Row]:
    from rocm_patch.conv.spec import ConvSpec
    from rocm_patch.overrides.guarding import machine_of
    from rocm_patch.trust.guard import THOROUGH
    from rocm_patch.trust.progress import Limits
    from rocm_patch.trust.sandbox import Sandbox

    machine = machine_of(settings)(plan.device)
    with Sandbox(plan.device, Limits(settings.hang_limit, settings.busy_limit)) as sandbox:
        for text, strategy in plan.pairs:
            spec = ConvSpec.from_json(text, plan.device)
            known = store.get(machine, text, strategy)
            is_thorough = known is not None and (known.is_bad or known.calls >= THOROUGH)
            is_suspected = store.suspicion(machine, text, strategy) is not None
            if known is not None and is_thorough and not is_suspected and not again:
                yield _row(spec, strategy, known, is_new=False)
                continue
            trial = sandbox.prove(text, strategy, THOROUGH, 1.0)
            calls = THOROUGH if trial.kind == "ok" else trial.calls
            verdict = Verdict(trial.kind, trial.seconds, trial.error, calls, evidence=trial.evidence)
            if trial.kind != "unknown":
                store.put(machine, text, str(spec), strategy, verdict)
            yield _row(spec, strategy, verdict, is_new=True)


def _row(spec: Any, strategy: str, verdict: Verdict, *, is_new: bool) -> Row:
    return Row(
        str(spec), spec.direction, strategy, verdict.kind, verdict.seconds, verdict.error, verdict.evidence, is_new
    )


def document(rows: Sequence[Row], device: str) -> dict[str, Any]:
    """The rows as the JSON document of the command line; an error that is not known is null."""
    listed = [{**asdict(row), "error": row.error if row.error == row.error else None} for row in rows]
    return {"schema_version": SCHEMA_VERSION, "device": device, "rows": listed}

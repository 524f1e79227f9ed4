"""The ways in which a loader's workers can start, and one of them tried."""

from __future__ import annotations

import multiprocessing
import random
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rocm_patch.overrides.ledger import LEDGER
from rocm_patch.workers import culprit, death
from rocm_patch.workers.buffers import Snapshots
from rocm_patch.workers.context import Context
from rocm_patch.workers.main_script import why_not_importable_again
from rocm_patch.workers.popen import CannotStartError, RefusedError

# Where DataLoader keeps its context: set for the time that its workers start, so that a copy of the loader (Lightning
# and accelerate make such) does not carry ours along as if the caller had asked for it.
CONTEXT = "_DataLoader__multiprocessing_context"


class CannotTravelError(Exception):
    """What a worker needs cannot be sent to it, or not be loaded there."""


@dataclass(frozen=True)
class Attempt:
    """One way to start a loader's workers: the method, and whether main's definitions travel by value."""

    method: str
    main_by_value: bool = False

    def __str__(self) -> str:
        how = {"forkserver": "come from the fork server", "spawn": "are spawned", "fork": "are forked"}[self.method]
        return f"{how}, and what the main script defines travels by value" if self.main_by_value else how


def attempts(asked: Any, start_method: str, *, is_ours: bool) -> Iterator[Attempt]:
    """The ways to try for one loader, none to leave it as it is.

    Args:
        asked: its multiprocessing context.
        start_method: what the patch was installed with.
        is_ours: whether the context was supplied by the patch.
    """
    why = why_not_importable_again()
    ways = [Attempt("", True)] if why else [Attempt("", False), Attempt("", True)]
    if asked is None and start_method == "auto" and not _is_chosen_by_program():
        yield from (Attempt("forkserver", way.main_by_value) for way in ways)
        yield Attempt("fork")
        return
    method = asked.get_start_method() if asked is not None else multiprocessing.get_start_method(allow_none=True)
    if method not in ("spawn", "forkserver"):
        return
    # The program's own choice is served by Python, unless Python would run an unguarded script in every worker.
    if is_ours or why:
        yield from (Attempt(method, way.main_by_value) for way in ways)


def _is_chosen_by_program() -> bool:
    """Whether the program itself set a start method other than the one that Python has anyway."""
    method = multiprocessing.get_start_method(allow_none=True)
    default = multiprocessing.get_all_start_methods()[0]
    return method is not None and method != default and LEDGER.applied("multiprocessing") is None


def started(loader: Any, original: Any, attempt: Attempt) -> Any:
    """The loader's iterator with its workers ready.

    Raises:
        CannotTravelError: its workers cannot start in this way.
    """
    shared = [obj for obj in (loader.dataset, loader.collate_fn, loader.worker_init_fn) if obj is not None]
    context = Context(
        attempt.method, main_by_value=attempt.main_by_value, shared=shared, workers=loader.num_workers,
        snapshots=_snapshots_of(loader),
    )  # fmt: skip
    try:
        context.prepare()
    except Exception as error:
        context.finished()
        found = culprit.find(loader.dataset, "dataset", context.pickles)
        found = found or culprit.find(loader.collate_fn, "collate_fn", context.pickles)
        found = found or culprit.find(loader.worker_init_fn, "worker_init_fn", context.pickles)
        raise CannotTravelError(str(found or f"{type(error).__name__}: {error}")) from error
    before = vars(loader)[CONTEXT]
    vars(loader)[CONTEXT] = context
    drawn = _random_states(loader)
    try:
        try:
            iterator = original(loader)
        except RefusedError:
            context.abandon()
            _restore(drawn)
            iterator = original(loader)
    except CannotStartError as error:
        context.abandon()
        _restore(drawn)
        raise CannotTravelError(str(error)) from error
    finally:
        vars(loader)[CONTEXT] = before
        context.finished()
    iterator._rocm_patch_oom_kills = death.oom_kills()
    return iterator


def _random_states(loader: Any) -> list[tuple[Any, Any]]:
    """What a loader's iterator draws from when it is made, each as the function that puts its state back."""
    generators = [torch.default_generator, *([loader.generator] if loader.generator is not None else [])]
    states: list[tuple[Any, Any]] = [(generator.set_state, generator.get_state()) for generator in generators]
    states.append((random.setstate, random.getstate()))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states


def _restore(states: list[tuple[Any, Any]]) -> None:
    for put_back, state in states:
        put_back(state)


# The exchanged buffers of datasets, by id while they live.
_SNAPSHOTS: dict[int, Snapshots] = {}


def _snapshots_of(loader: Any) -> Snapshots:
    """Those of the loader's dataset: a second loader finds the buffers of the first."""
    owner = loader.dataset
    try:
        weakref.ref(owner)
    except TypeError:  # a list
        owner = loader
    key = id(owner)
    if key not in _SNAPSHOTS:
        _SNAPSHOTS[key] = Snapshots()
        weakref.finalize(owner, _SNAPSHOTS.pop, key, None)
    return _SNAPSHOTS[key]

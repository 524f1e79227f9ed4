"""A library of functions, typed, with decorators and a match statement: clean."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


@dataclasses.dataclass
class Options:
    workers: int = 4
    device: str = "cuda"
    transform: Any = dataclasses.field(default=None)


@contextlib.contextmanager
def timed() -> Iterator[None]:
    yield


def batches(data: Dataset[Any], options: Options) -> Iterator[torch.Tensor]:
    loader: DataLoader[Any] = DataLoader(data, num_workers=options.workers)
    with timed():
        yield from (batch.to(options.device) for batch in loader)


async def serve(data: Dataset[Any]) -> int:
    async with contextlib.AsyncExitStack():
        return sum(1 for _ in batches(data, Options()))

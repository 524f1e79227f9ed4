"""How one convolution is served: the strategy, the reason for it, and the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rocm_patch.conv import Strategy
from rocm_patch.conv.spec import ConvSpec

# Parsed by name: torch 1.13 has no attributes for them.
_AUTOCAST_KEYS = {
    "cpu": torch._C._dispatch_key_parse("AutocastCPU"),
    "cuda": torch._C._dispatch_key_parse("AutocastCUDA"),
}
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded


@dataclass
class Route:
    """How one spec is served, and how often it was.

    Attributes:
        spec: the convolution.
        strategy: what serves it.
        why: the reason for the strategy.
        memory_format: that of the result.
        budget: bytes of workspace.
        calls: how many calls took this route.
        proven: whether the strategy runs without the guard's ado.
        number: what the guard calls it, for the record of what was started last.
        better: what is to serve once its kernels are compiled.
        is_timed: whether its strategies have been timed against each other, here or before.
    """

    spec: ConvSpec
    strategy: Strategy
    why: str
    memory_format: torch.memory_format
    budget: int
    calls: int = 0
    proven: bool = True
    number: int = 0
    better: Strategy | None = None
    is_timed: bool = False
    _strides: tuple[int, ...] = field(init=False, repr=False)
    # The strategy that was bound, and what came of it.
    _bound: tuple[Strategy, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = field(
        init=False, repr=False, default=None
    )

    def __post_init__(self) -> None:
        # Those of dimensions of size 1 too: compiled graphs assert them.
        self._strides = torch.empty(self.spec.result, device="meta", memory_format=self.memory_format).stride()

    def run(self, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The strategy's result in aten's memory format; operands as `Strategy.run` takes them, bias (K,)."""
        bound, strategy = self._bound, self.strategy
        if bound is None or bound[0] is not strategy:
            bound = self._bound = (strategy, strategy.bound(self.spec, self.budget))
        key = _AUTOCAST_KEYS[first.device.type]
        if _is_excluded(key):
            result = bound[1](first, second)
        else:
            # Autocast must not reach the products in here. It is excluded where it is off, and in a forward by its
            # own kernel, but not in a backward() under autocast: float32 products would run in half precision.
            _exclude(key, True)
            try:
                result = bound[1](first, second)
            finally:
                _exclude(key, False)
        if result.stride() != self._strides:
            result = result.contiguous(memory_format=self.memory_format)
            result = result.as_strided(result.shape, self._strides)
        if bias is not None:
            result.add_(bias.view(-1, *[1] * (first.dim() - 2)))
        return result

"""The original's names for how convolutions are served: `FallbackStrategy` and `Conv2dBypassConfig`.

Standard library only, so that a program can name a strategy before torch is imported.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rocm_patch.errors import UsageError
from rocm_patch.settings import POLICIES, STRATEGY_NAMES, show_log


class FallbackStrategy(enum.Enum):
    """The original's names for how a convolution is served.

    AUTO: what is best here, never MIOpen. GPU_UNFOLD (also PURE_PYTORCH and CPU_FALLBACK, as in the original;
    nothing goes to the CPU): im2col. IMPLICIT_GEMM: native MIOpen, a bypass when it fails. SELECTIVE: native up
    to `Conv2dBypassConfig.size_threshold` pixels a side, a bypass above.
    """

    IMPLICIT_GEMM = "implicit_gemm"
    GPU_UNFOLD = "gpu_unfold"
    PURE_PYTORCH = "pure_pytorch"
    SELECTIVE = "selective"
    AUTO = "auto"
    CPU_FALLBACK = "gpu_unfold"


# Each strategy as a policy and a preferred algorithm.
_MEANING = {
    FallbackStrategy.AUTO: (None, None),
    FallbackStrategy.GPU_UNFOLD: ("bypass", "im2col"),
    FallbackStrategy.PURE_PYTORCH: ("bypass", "im2col"),
    FallbackStrategy.IMPLICIT_GEMM: ("guarded", None),
    FallbackStrategy.SELECTIVE: ("bypass", None),
}


def meaning(strategy: FallbackStrategy | str | None) -> tuple[str | None, str | None, bool]:
    """(policy, preferred algorithm, selective) of a strategy; a None leaves the choice open.

    Takes the members and values of `FallbackStrategy`, the policies and the names of the algorithms.

    Raises:
        UsageError: nothing of that name.
    """
    if strategy is None:
        return None, None, False
    if isinstance(strategy, str):
        if strategy in POLICIES:
            return strategy, None, False
        if strategy in STRATEGY_NAMES:
            return "bypass", strategy, False
        known = {member.value: member for member in FallbackStrategy}
        if strategy not in known:
            names = ", ".join([*known, *POLICIES, *STRATEGY_NAMES])
            raise UsageError(f"unknown strategy {strategy!r}", f"give one of {names}")
        strategy = known[strategy]
    if not isinstance(strategy, FallbackStrategy):
        raise UsageError(f"unknown strategy {strategy!r}", "give a FallbackStrategy or its value, 'auto' for one")
    policy, preferred = _MEANING[strategy]
    return policy, preferred, strategy is FallbackStrategy.SELECTIVE


@dataclass
class Conv2dBypassConfig:
    """How `SafeConv2d` layers are served.

    Attributes:
        strategy: a `FallbackStrategy`, its value, a policy or an algorithm's name.
        size_threshold: for SELECTIVE, the longest side in pixels that native convolutions are trusted with. The
            default is the original's observation on an RX 5600 XT with ROCm 5.2.
        enable_implicit_gemm: kept for the original's signature; MIOpen's default, so it changes nothing.
        gpu_unfold_fallback: whether a bypass serves a call that native MIOpen failed; False raises its error.
        exact: leave out Winograd's algorithms, which round more than a matrix product.
        verbose: say once per convolution which route served it, on stderr.
        cache_decisions: kept for the original's signature; decisions are always kept, per exact convolution.
    """

    strategy: FallbackStrategy | str = FallbackStrategy.AUTO
    size_threshold: int = 42
    enable_implicit_gemm: bool = True
    gpu_unfold_fallback: bool = True
    verbose: bool = False
    cache_decisions: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        meaning(self.strategy)
        if self.verbose:
            show_log("info")

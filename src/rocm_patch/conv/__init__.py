"""The mathematics: convolutions computed without the vendor's convolution library.

This room knows tensors; nothing of AMD, environment variables or stored verdicts. An algorithm is one file
that ends in a `Strategy`, and one line here.
"""

from rocm_patch.conv.columns import COLUMNS
from rocm_patch.conv.depthwise import DEPTHWISE
from rocm_patch.conv.direct import DIRECT
from rocm_patch.conv.fused_winograd import FUSED_WINOGRAD
from rocm_patch.conv.grouped import GROUPED
from rocm_patch.conv.im2col import IM2COL
from rocm_patch.conv.implicit_gemm import IMPLICIT_GEMMS
from rocm_patch.conv.native import NATIVE
from rocm_patch.conv.pointwise import POINTWISE
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.conv.strategy import Strategy
from rocm_patch.conv.taps import TAPS
from rocm_patch.conv.winograd import WINOGRAD_F23, WINOGRAD_F43

# In the order of equals: the one that serves a spec is that with the least time, timed or estimated. The last one
# rejects nothing.
STRATEGIES: tuple[Strategy, ...] = (
    POINTWISE, FUSED_WINOGRAD, DIRECT, *IMPLICIT_GEMMS, COLUMNS, WINOGRAD_F43, WINOGRAD_F23, DEPTHWISE, GROUPED, TAPS,
    IM2COL,
)  # fmt: skip


def likeliest(spec: ConvSpec) -> list[Strategy]:
    """The strategies that accept a spec, the one that is likely to be fastest first."""
    accepting = [strategy for strategy in STRATEGIES if strategy.rejects(spec) is None]
    return sorted(accepting, key=lambda strategy: strategy.seconds(spec))


__all__ = [
    "COLUMNS", "DEPTHWISE", "DIRECT", "FUSED_WINOGRAD", "GROUPED", "IM2COL", "IMPLICIT_GEMMS", "NATIVE", "POINTWISE",
    "STRATEGIES", "TAPS", "WINOGRAD_F23", "WINOGRAD_F43", "Strategy", "likeliest",
]  # fmt: skip

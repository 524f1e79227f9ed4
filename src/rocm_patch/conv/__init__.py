"""The mathematics: convolutions computed without the vendor's convolution library.

This room knows tensors; nothing of AMD, environment variables or stored verdicts. An algorithm is one file
that ends in a `Strategy`, and one line here.
"""

from rocm_patch.conv.depthwise import DEPTHWISE
from rocm_patch.conv.grouped import GROUPED
from rocm_patch.conv.im2col import IM2COL
from rocm_patch.conv.native import NATIVE
from rocm_patch.conv.pointwise import POINTWISE
from rocm_patch.conv.strategy import Strategy
from rocm_patch.conv.taps import TAPS
from rocm_patch.conv.winograd import WINOGRAD_F23, WINOGRAD_F43

# Best first: the first one that neither rejects a spec nor is slow for it serves it. The last one rejects nothing.
STRATEGIES: tuple[Strategy, ...] = (POINTWISE, WINOGRAD_F43, WINOGRAD_F23, DEPTHWISE, GROUPED, TAPS, IM2COL)

__all__ = [
    "DEPTHWISE", "GROUPED", "IM2COL", "NATIVE", "POINTWISE", "STRATEGIES", "TAPS", "WINOGRAD_F23", "WINOGRAD_F43",
    "Strategy",
]  # fmt: skip

"""The mathematics: convolutions computed without the vendor's convolution library.

This room knows tensors; nothing of AMD, environment variables or stored verdicts. An algorithm is one file
that ends in a `Strategy`, and one line here.
"""

from rocm_patch.conv.im2col import IM2COL
from rocm_patch.conv.native import NATIVE
from rocm_patch.conv.pointwise import POINTWISE
from rocm_patch.conv.strategy import Strategy

# Best first; the last one rejects nothing.
STRATEGIES: tuple[Strategy, ...] = (POINTWISE, IM2COL)

__all__ = ["IM2COL", "NATIVE", "POINTWISE", "STRATEGIES", "Strategy"]

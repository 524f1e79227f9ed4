"""Failures on purpose: `ROCM_PATCH_FAULT=kind:direction[:after=N]`, for tests and for users who want to see.

The fault stands in front of native convolutions, where MIOpen's would arise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rocm_patch.conv.spec import DIRECTIONS
from rocm_patch.errors import UsageError

# What MIOpen and HIP say through torch: known issues `miopen-stoul` and `invalid-device-function`.
_MESSAGES = {
    "error": "miopenStatusUnknownError",
    "device": "HIP error: an illegal memory access was encountered",
}


@dataclass
class Fault:
    """One failure that is waiting to happen.

    Attributes:
        kind: `error` (MIOpen reports a failure) or `device` (a HIP call fails).
        direction: the direction that fails.
        after: how many native calls in this direction still work.
    """

    kind: str
    direction: str
    after: int = 0

    def before(self, direction: str) -> None:
        """Raise if this native call is one that fails."""
        if direction != self.direction:
            return
        if self.after > 0:
            self.after -= 1
            return
        raise RuntimeError(_MESSAGES[self.kind])


def parse(text: str | None) -> Callable[[str], None] | None:
    """`Fault.before` for `kind:direction[:after=N]`, None for no text.

    Raises:
        UsageError: the text names no fault.
    """
    if not text:
        return None
    kind, _, rest = text.partition(":")
    direction, _, option = rest.partition(":")
    after = option.removeprefix("after=") or "0"
    if kind not in _MESSAGES or direction not in DIRECTIONS or not after.isdigit():
        raise UsageError(
            f"unknown fault {text!r}",
            f"ROCM_PATCH_FAULT=kind:direction[:after=N], kind one of {', '.join(_MESSAGES)}, "
            f"direction one of {', '.join(DIRECTIONS)}",
        )
    return Fault(kind, direction, int(after)).before

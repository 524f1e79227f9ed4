"""What goes wrong in words: what was asked, why it cannot be, and the command that mends it."""

from __future__ import annotations


class RocmPatchError(Exception):
    """An error with a remedy.

    Args:
        message: what was asked and why it cannot be.
        hint: the command or the change that mends it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint


class UsageError(RocmPatchError, ValueError):
    """A value that rocm-patch does not know (also a `ValueError`)."""


class NotAModuleError(RocmPatchError, TypeError):
    """Something other than a `torch.nn.Module` where one is needed (also a `TypeError`)."""


class TorchMissingError(RocmPatchError, ImportError):
    """torch cannot be imported by this interpreter (also an `ImportError`)."""


class NothingWorksError(RocmPatchError, RuntimeError):
    """Every way to compute a convolution is known to fail on this machine (also a `RuntimeError`)."""

"""choose(spec): which strategy serves a convolution, and why.

Who is asked, first answer wins: the user's own word, what failed in this process, the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rocm_patch.conv import NATIVE, STRATEGIES, Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.errors import UsageError
from rocm_patch.settings import POLICIES


class Choice(NamedTuple):
    """A strategy and the reason for it, in words."""

    strategy: Strategy
    why: str


@dataclass
class Chooser:
    """Ranks strategies under one policy.

    Attributes:
        policy: `bypass` never runs native; `guarded` runs native until it fails; `native` always runs it.
        preferred: a strategy's name to use wherever it accepts the spec.
        native_up_to: under `bypass`, images whose largest side is at most this go to native, as `guarded`
            would (the original's SELECTIVE strategy).
        failed: specs that native failed in this process, with its message.
        bypass_dtypes: under `guarded`, types that native is known to crash for on this machine.
    """

    policy: str = "bypass"
    preferred: str | None = None
    native_up_to: int | None = None
    failed: dict[ConvSpec, str] = field(default_factory=dict, compare=False)
    bypass_dtypes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"unknown policy {self.policy!r}", f"give one of {', '.join(POLICIES)}")
        names = [strategy.name for strategy in STRATEGIES]
        if self.preferred is not None and self.preferred not in names:
            raise UsageError(f"unknown strategy {self.preferred!r}", f"give one of {', '.join(names)}")

    def choose(self, spec: ConvSpec) -> Choice:
        """The strategy for a spec; the last of `STRATEGIES` rejects nothing, so there always is one."""
        if self.policy == "native":
            return Choice(NATIVE, "policy native")
        if spec in self.failed:
            return self.bypass(spec, f"native failed here: {self.failed[spec]}")
        if self.policy == "guarded" and spec.dtype in self.bypass_dtypes:
            return self.bypass(spec, f"native {spec.dtype} convolutions are known to crash on this card")
        if self.policy == "guarded":
            return Choice(NATIVE, "policy guarded, no failure so far")
        if self.native_up_to is not None and max(spec.spatial) <= self.native_up_to:
            return Choice(NATIVE, f"no side longer than {self.native_up_to}")
        return self.bypass(spec, "policy bypass")

    def bypass(self, spec: ConvSpec, why: str) -> Choice:
        """The best strategy that is not native."""
        ranked = sorted(STRATEGIES, key=lambda strategy: strategy.name != self.preferred)
        for strategy in ranked:
            if strategy.rejects(spec) is None:
                return Choice(strategy, why)
        raise AssertionError(f"no strategy accepts {spec}")

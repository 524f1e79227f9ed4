"""choose(spec): which strategy serves a convolution, and why.

Who is asked, first answer wins: the user's own word, what is known of this machine, the catalog, the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from rocm_patch.conv import NATIVE, STRATEGIES, Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.errors import NothingWorksError, UsageError
from rocm_patch.settings import POLICIES
from rocm_patch.trust.store import Verdict


class Choice(NamedTuple):
    """A strategy and the reason for it, in words."""

    strategy: Strategy
    why: str


def _nothing_known(spec: ConvSpec, strategy: str) -> Verdict | None:
    return None


@dataclass
class Chooser:
    """Ranks strategies under one policy.

    Attributes:
        policy: `bypass` never runs native; `guarded` runs native until it fails; `native` always runs it.
        preferred: a strategy's name to use wherever it accepts the spec.
        native_up_to: under `bypass`, images whose largest side is at most this go to native, as `guarded`
            would (the original's SELECTIVE strategy).
        exact: leave out algorithms whose error is larger than a matrix product's (Winograd's).
        bypass_dtypes: under `guarded`, types that native is known to crash for on this machine.
        verdict: what is known of a spec and a strategy on this machine.
    """

    policy: str = "bypass"
    preferred: str | None = None
    native_up_to: int | None = None
    bypass_dtypes: tuple[str, ...] = ()
    exact: bool = False
    verdict: Callable[[ConvSpec, str], Verdict | None] = field(default=_nothing_known, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"unknown policy {self.policy!r}", f"give one of {', '.join(POLICIES)}")
        names = [strategy.name for strategy in STRATEGIES]
        if self.preferred is not None and self.preferred not in names:
            raise UsageError(f"unknown strategy {self.preferred!r}", f"give one of {', '.join(names)}")

    def choose(self, spec: ConvSpec) -> Choice:
        """The strategy for a spec.

        Raises:
            NothingWorksError: every strategy that accepts it is known to fail here.
        """
        if self.policy == "native":
            return Choice(NATIVE, "policy native")
        allowed, why = self._native(spec)
        if allowed:
            known = self.verdict(spec, NATIVE.name)
            if known is None or not known.is_bad:
                return Choice(NATIVE, why)
            why = f"native {known}"
        return self.bypass(spec, why)

    def _native(self, spec: ConvSpec) -> tuple[bool, str]:
        """Whether the policy lets a spec run natively where nothing is known against it, and why."""
        if self.policy == "guarded" and spec.dtype in self.bypass_dtypes:
            return False, f"native {spec.dtype} convolutions are known to crash on this card"
        if self.policy == "guarded":
            return True, "policy guarded, no failure so far"
        if self.native_up_to is not None and max(spec.spatial) <= self.native_up_to:
            return True, f"no side longer than {self.native_up_to}"
        return False, "policy bypass"

    def bypass(self, spec: ConvSpec, why: str) -> Choice:
        """The best strategy that is not native.

        Raises:
            NothingWorksError: as `choose`.
        """
        failed: list[str] = []
        for strategy in self._ranked(spec):
            known = self.verdict(spec, strategy.name)
            if known is None or not known.is_bad:
                return Choice(strategy, "; ".join([why, *failed]))
            failed.append(f"{strategy.name} {known}")
        raise NothingWorksError(
            f"no way is left to compute the convolution {spec}: {'; '.join([why, *failed])}",
            "rocm-patch doctor says what this torch build can run; rocm-patch cache clear has all of it tried again",
        )

    def _ranked(self, spec: ConvSpec) -> list[Strategy]:
        """Those that accept a spec: the user's first, then those that are fast for it, then the rest."""
        accepted = [
            strategy
            for strategy in STRATEGIES
            if strategy.rejects(spec) is None and not (self.exact and strategy.is_approximate)
        ]
        return sorted(accepted, key=lambda s: (s.name != self.preferred, s.slow_for(spec) is not None))

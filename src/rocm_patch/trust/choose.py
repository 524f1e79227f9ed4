"""choose(spec): which strategy serves a convolution, and why.

Who is asked, first answer wins: the user's own word, what is known of this machine, the catalog, the policy, what was
timed here, the cost model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from rocm_patch.conv import NATIVE, STRATEGIES, Strategy, likeliest
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.conv.strategy import workspace_budget
from rocm_patch.errors import NothingWorksError, UsageError
from rocm_patch.settings import POLICIES
from rocm_patch.trust.store import Verdict


class Choice(NamedTuple):
    """A strategy and the reason for it, in words.

    Attributes:
        strategy: what serves.
        why: the reason.
        better: what is to serve once it is ready, if that is another one.
    """

    strategy: Strategy
    why: str
    better: Strategy | None = None


def _nothing_known(spec: ConvSpec, strategy: str) -> Verdict | None:
    return None


def _not_known(spec: ConvSpec, strategy: Strategy) -> bool | None:
    return None


def _nothing_timed(spec: ConvSpec) -> Mapping[str, float]:
    return {}


@dataclass
class Chooser:
    """Ranks strategies under one policy.

    Attributes:
        policy: `bypass` never runs native; `guarded` runs native until it fails; `native` always runs it.
        preferred: a strategy's name to use wherever it accepts the spec.
        native_up_to: under `bypass`, images whose largest side is at most this go to native, as `guarded`
            would (the original's SELECTIVE strategy).
        exact: leave out algorithms whose error is larger than a matrix product's (Winograd's).
        workspace: bytes that one convolution may take beyond its operands and result; None for the default,
            `workspace_budget`.
        bypass_dtypes: under `guarded`, types that native is known to crash for on this machine.
        verdict: what is known of a spec and a strategy on this machine.
        is_clean: whether the machine code that a strategy runs for a spec is free of what this machine's card cannot
            run safely; None where that is not known.
        timed: seconds that strategies took for a spec on this machine, by name; empty where none was timed.
    """

    policy: str = "bypass"
    preferred: str | None = None
    native_up_to: int | None = None
    bypass_dtypes: tuple[str, ...] = ()
    exact: bool = False
    workspace: int | None = None
    verdict: Callable[[ConvSpec, str], Verdict | None] = field(default=_nothing_known, compare=False, repr=False)
    is_clean: Callable[[ConvSpec, Strategy], bool | None] = field(default=_not_known, compare=False, repr=False)
    timed: Callable[[ConvSpec], Mapping[str, float]] = field(default=_nothing_timed, compare=False, repr=False)

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
        better: Strategy | None = None
        ranked = self.ranked(spec)
        harmful = {strategy.name for strategy in ranked if self.is_clean(spec, strategy) is False}
        # Which kernels are compiled by now must not decide what a deterministic program computes.
        wait = torch.are_deterministic_algorithms_enabled()
        for strategy in ranked:
            known = self.verdict(spec, strategy.name)
            if known is not None and known.is_bad:
                failed.append(f"{strategy.name} {known}")
            elif strategy.is_ready(spec, wait or strategy.name == self.preferred):
                if strategy.name not in harmful and self.is_clean(spec, strategy) is False:
                    return self.bypass(spec, why)  # its kernels were compiled just now, and are not what one wants
                if harmful and strategy.name not in harmful:
                    why = f"{why}; others run code that this card cannot run safely: {', '.join(sorted(harmful))}"
                if better is not None:
                    why = f"{why}; {better.name} is being compiled"
                return Choice(strategy, "; ".join([why, *failed]), better)
            elif better is None and strategy.rejects(spec) is None:
                better = strategy
        raise NothingWorksError(
            f"no way is left to compute the convolution {spec}: {'; '.join([why, *failed])}",
            "rocm-patch doctor says what this torch build can run; rocm-patch cache clear has all of it tried again",
        )

    def ranked(self, spec: ConvSpec) -> list[Strategy]:
        """Those that accept a spec: the user's first, then those whose code the card can run safely for all that is
        known, each by the time that they took or are likely to take."""
        timed = {} if torch.are_deterministic_algorithms_enabled() else self.timed(spec)

        def place(strategy: Strategy) -> tuple[bool, bool, bool, bool, float]:
            known = timed.get(strategy.name)
            # Whoever takes float64 wants its precision.
            is_coarse = strategy.is_approximate and spec.dtype == "float64"
            return (
                strategy.name != self.preferred, is_coarse, self.is_clean(spec, strategy) is False, known is None,
                strategy.seconds(spec) if known is None else known,
            )  # fmt: skip

        return sorted((strategy for strategy in likeliest(spec) if self._may_serve(spec, strategy)), key=place)

    def _may_serve(self, spec: ConvSpec, strategy: Strategy) -> bool:
        if self.exact and strategy.is_approximate:
            return False
        if strategy.is_bounded:
            return True
        budget = workspace_budget(torch.device(spec.device)) if self.workspace is None else self.workspace
        return strategy.workspace_bytes(spec, budget) <= budget

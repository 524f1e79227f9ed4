"""Which route each convolution takes: one per spec, and what happens when the strategy on it fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from rocm_patch.conv import NATIVE, Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.conv.strategy import memory_format, workspace_budget
from rocm_patch.route import Route
from rocm_patch.settings import LOGGER
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.fault import Fault
from rocm_patch.trust.guard import Guard, is_capturing, is_earlier_fault
from rocm_patch.trust.native_errors import blame
from rocm_patch.trust.store import Verdict
from rocm_patch.tuning import Tuner

# Under `torch.use_deterministic_algorithms(True)` torch refuses matrix products on a GPU unless this variable
# promises a fixed workspace; a program that has convolutions only need not have set it. The value is one of the two
# that torch's message names. Not set before it is needed: with it every product took 39 us more on an H200's host.
_WORKSPACE_VARIABLE, _WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"

# Programs with ever new shapes must not grow the tables for ever.
MOST_ENTRIES = 8192


_is_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms


class Routes:
    """The routes of one override.

    Args:
        chooser: names the strategy for each spec.
        guard: watches over strategies that are unproven here.
        fault: what goes wrong on purpose in native calls.
        on_spec: called with every new spec.
        workspace: bytes that one convolution may take beyond its operands and result; None for the default,
            `workspace_budget`.
        tuner: times strategies where the program asks for it; None never does.
    """

    def __init__(
        self,
        chooser: Chooser,
        guard: Guard,
        fault: Fault | None = None,
        on_spec: Callable[[ConvSpec], None] | None = None,
        workspace: int | None = None,
        tuner: Tuner | None = None,
    ) -> None:
        self.chooser = chooser
        self._tuner = tuner
        if tuner is not None:
            chooser.timed = tuner.timings.of
        self._workspace = chooser.workspace = workspace
        chooser.verdict = guard.verdicts.of
        self.guard, self.fault, self._on_spec = guard, fault, on_spec
        self._witness = guard.witness
        self._routes: dict[ConvSpec, Route] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._has_set_workspace = False
        guard.witness.on_fork.append(self._forget_numbers)

    def taken(self) -> list[Route]:
        """The routes taken so far, in the order of their first call."""
        return [route for route in self._routes.values() if route.calls]

    def of(self, spec: ConvSpec) -> Route:
        """The one route of a spec, made on its first sight."""
        route = self._routes.get(spec)
        if route is None:
            strategy, why, better = self.chooser.choose(spec)
            LOGGER.info("%s -> %s (%s)", spec, strategy.name, why)
            if self._on_spec is not None:
                self._on_spec(spec)
            route = remember(self._routes, spec, self._route(spec, strategy, why))
            route.better = better
            route.is_timed = self._tuner is None or bool(self.chooser.timed(spec))
            self._judge_anew(route)
        return route

    def _route(self, spec: ConvSpec, strategy: Strategy, why: str) -> Route:
        budget = workspace_budget(torch.device(spec.device)) if self._workspace is None else self._workspace
        return Route(spec, strategy, why, memory_format(spec), budget)

    def serve(
        self,
        route: Route,
        by_native: Callable[[], Any],
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result of one direction, by the next strategy for as long as one fails."""
        route.calls += 1
        witness = self._witness
        if not route.is_timed:
            self._tune(route, first, second, bias)
        if route.better is not None:
            self._upgrade(route, first)
        if _is_deterministic() and _WORKSPACE_VARIABLE not in os.environ and first.is_cuda:
            os.environ[_WORKSPACE_VARIABLE] = _WORKSPACE
            self._has_set_workspace = True
        while True:
            # Another thread may move the route on while this one is in the call.
            strategy, is_proven = route.strategy, route.proven
            run: Callable[[], Any] = by_native
            if strategy is not NATIVE:
                run = partial(route.run, first, second, bias)
            elif self.fault is not None:
                run = partial(self.fault.around, route.spec.direction, by_native)
            try:
                if is_proven:
                    witness.count += 1
                    witness.slots[0] = route.number
                    return run()  # type: ignore[no-any-return]
                if is_capturing(first):
                    return self._without_proof(route, run, first, second, bias)
                verdict, result = self.guard.first_call(route.spec, strategy, run, first, second, bias)
            except RuntimeError as error:
                verdict, result = self._after(error, route, strategy, is_proven, first, second, bias)
            if result is not None:
                if verdict.calls and route.strategy is strategy:
                    self._prove(route)
                return result
            self._reroute(route, strategy, verdict)

    def natives_at_once(self, routes: Sequence[Route | None], run: Callable[[], Any]) -> Any:
        """Both gradients in one native call, as aten does it; None where each has to be computed alone.

        That is where one is not native or not proven, and where the call has failed: which one was it?
        """
        known = [route for route in routes if route is not None]
        plain = all(route.strategy is NATIVE and route.proven for route in known)
        if self.fault is not None or not known or not plain:
            return None
        number = self._number(known)
        self._witness.count += 1
        self._witness.slots[0] = number
        try:
            grads = run()
        except RuntimeError as error:
            if blame(error) != "library" or self.chooser.policy == "native":
                raise self._explained(error, *known) from None
            return None
        for route in known:
            route.calls += 1
        return grads

    def _number(self, routes: Sequence[Route]) -> int:
        numbers = (routes[0].number, routes[-1].number)
        if numbers[0] == numbers[1]:
            return numbers[0]
        found = self._pairs.get(numbers)
        if found is None:
            found = self._pairs[numbers] = self.guard.number(*((route.spec, route.strategy) for route in routes))
        return found

    def _without_proof(self, route: Route, run: Callable[[], Any], *operands: Any) -> torch.Tensor:
        """While a CUDA graph is captured nothing may be tried: what is proven, else what is ours."""
        if route.strategy is not NATIVE:
            return run()  # type: ignore[no-any-return]
        strategy, why, _ = self.chooser.bypass(route.spec, "unproven, and a CUDA graph is being captured")
        LOGGER.info("%s -> %s for this graph (%s)", route.spec, strategy.name, why)
        return self._route(route.spec, strategy, why).run(*operands)

    def _after(
        self,
        error: RuntimeError,
        route: Route,
        failed: Strategy,
        was_proven: bool,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[Verdict, torch.Tensor | None]:
        """The verdict on a strategy that raised; raises what is not its fault, or cannot be mended here."""
        culprit = blame(error)
        if culprit == "device":
            if not was_proven and not is_earlier_fault(error):
                # The device was synchronised before this call, so the fault is its own.
                self.guard.convict(route.spec, failed, "crash", str(error))
            raise self._explained(error, route)
        if culprit == "caller" or self.chooser.policy == "native":
            raise error
        result = None
        if culprit == "memory":
            if failed is not NATIVE:
                raise error
            # Too little memory is native's fault only where something else does with it.
            strategy, why, _ = self.chooser.bypass(route.spec, "native ran out of memory")
            result = self._route(route.spec, strategy, why).run(first, second, bias)
        verdict = self.guard.convict(route.spec, failed, "error", str(error).strip())
        if result is not None:
            self._reroute(route, failed, verdict)
        return verdict, result

    def _explained(self, error: RuntimeError, *routes: Route) -> RuntimeError:
        """A failed call of the GPU's runtime leaves its context unusable: say in which convolution it showed."""
        if blame(error) == "device":
            specs = "; ".join(f"{route.strategy.name} convolution {route.spec}" for route in routes)
            error.args = (
                f"{error}\nin the {specs}; the GPU context is unusable from here on\n"
                "hint: start again with ROCM_PATCH_CONV=bypass, or rocm-patch run --conv bypass",
            )
        return error

    def _judge_anew(self, route: Route) -> None:
        route.proven, route.number = False, 0
        if self.guard.trusts(route.spec, route.strategy):
            self._prove(route)

    def _prove(self, route: Route) -> None:
        route.number = self.guard.number((route.spec, route.strategy))
        route.proven = True

    def _reroute(self, route: Route, failed: Strategy, verdict: Verdict) -> None:
        """The next best strategy serves this spec from here on; another thread may have seen to that."""
        if route.strategy is not failed:
            return
        route.strategy, route.why, route.better = self.chooser.choose(route.spec)
        LOGGER.warning(
            "%s convolution %s\n%s is served by %s from here on\n"
            "hint: rocm-patch cache show says what is known; ROCM_PATCH_CONV=bypass saves the attempt",
            failed.name, verdict, route.spec, route.strategy.name,
        )  # fmt: skip
        self._judge_anew(route)

    def _upgrade(self, route: Route, operand: torch.Tensor) -> None:
        """Let what has been compiled meanwhile serve, or give it up."""
        better = route.better
        if better is None or is_capturing(operand):
            return
        if better.is_ready(route.spec, False) or better.rejects(route.spec) is not None:
            route.strategy, route.why, route.better = self.chooser.choose(route.spec)
            LOGGER.info("%s -> %s from here on (%s)", route.spec, route.strategy.name, route.why)
            self._judge_anew(route)

    def _tune(self, route: Route, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Time the strategies of a route if the program asks for it, and take the fastest."""
        tuner = self._tuner
        if tuner is None or not tuner.is_wanted() or is_capturing(first):
            return
        route.is_timed = True
        if not self.chooser.timed(route.spec):

            def run(strategy: Strategy) -> torch.Tensor:
                return self._route(route.spec, strategy, "").run(first, second, bias)

            try:
                tuner.tune(route.spec, run, first, second, bias)
            except RuntimeError as error:
                raise self._explained(error, route) from None
        route.strategy, route.why, route.better = self.chooser.choose(route.spec)
        self._judge_anew(route)

    def take_back(self) -> None:
        """Leave the environment as it was."""
        if self._has_set_workspace:
            os.environ.pop(_WORKSPACE_VARIABLE, None)

    def _forget_numbers(self) -> None:
        """In a forked child."""
        self._pairs.clear()
        for route in self._routes.values():
            route.number = 0


def remember(table: dict[Any, Any], key: Any, value: Any) -> Any:
    """Enter a value into a table that is emptied when it has grown too long."""
    if len(table) >= MOST_ENTRIES:
        table.clear()
    table[key] = value
    return value

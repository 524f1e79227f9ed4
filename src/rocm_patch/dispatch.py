"""convolution() and convolution_backward() with aten's signatures: call -> spec -> strategy -> result.

What a call cannot be served with (shapes that do not fit, unknown types) goes to aten's own kernel, so that
every error is the one that PyTorch itself raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rocm_patch.conv import NATIVE, Strategy, native
from rocm_patch.conv.call import Geometry, backward_specs, forward_spec, memory_format
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.conv.strategy import workspace_budget
from rocm_patch.settings import LOGGER
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.native_errors import blame

# Programs with ever new shapes must not grow the tables for ever.
_MOST_ENTRIES = 8192


@dataclass
class Route:
    """How one spec is served, and how often it was.

    Attributes:
        spec: the convolution.
        strategy: what serves it.
        why: the reason for the strategy.
        memory_format: that of the result.
        calls: how many calls took this route.
    """

    spec: ConvSpec
    strategy: Strategy
    why: str
    memory_format: torch.memory_format
    calls: int = 0

    def run(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The strategy's result in aten's memory format; operands as `Strategy.run` takes them."""
        # Autocast must not reach the products in here. A forward comes with autocast excluded by its own kernel,
        # but a backward() under autocast does not, and would run float32 products in half precision.
        key = _AUTOCAST_KEYS[first.device.type]
        before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
        try:
            result = self.strategy.run(self.spec, first, second, workspace_budget(first.device))
        finally:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)
        return result.contiguous(memory_format=self.memory_format)


# Parsed by name: torch 1.13 has no attributes for them.
_AUTOCAST_KEYS = {
    "cpu": torch._C._dispatch_key_parse("AutocastCPU"),
    "cuda": torch._C._dispatch_key_parse("AutocastCUDA"),
}


class Dispatcher:
    """A pair of functions with the signatures of `aten::_convolution` and `aten::convolution_backward`.

    Args:
        chooser: names the strategy for each spec.
        before_native: called with the direction before every native call (fault injection).
    """

    def __init__(self, chooser: Chooser, before_native: Callable[[str], None] | None = None) -> None:
        self.chooser = chooser
        self._before_native = before_native
        self._routes: dict[ConvSpec, Route] = {}
        # From what a call looks like to its routes; None where only aten can judge the call. Backward has a route
        # per gradient (input, weight), None for one that is not asked for.
        self._forward: dict[tuple[Any, ...], Route | None] = {}
        self._backward: dict[tuple[Any, ...], tuple[Route | None, Route | None] | None] = {}

    def routes(self) -> list[Route]:
        """The routes taken so far, in the order of their first call."""
        return [route for route in self._routes.values() if route.calls]

    def convolution(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        benchmark: bool = False,
        deterministic: bool = False,
        cudnn_enabled: bool = True,
        allow_tf32: bool = True,
    ) -> torch.Tensor:
        """`aten::_convolution`: input (N, C, *spatial), weight, bias (K,) -> (N, K, *out)."""
        geometry = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
        of_bias = None if bias is None else (bias.shape, bias.dtype)
        key = (geometry, of_bias, *_looks(input), *_looks(weight), torch._C._get_cudnn_enabled())
        try:
            route = self._forward[key]
        except KeyError:
            spec = forward_spec(input, weight, bias, Geometry(*geometry))
            route = _remember(self._forward, key, None if spec is None else self._route(spec))
        if route is not None:
            route.calls += 1
        if route is None or route.strategy is NATIVE:
            try:
                if route is not None and self._before_native is not None:
                    self._before_native(route.spec.direction)
                return native.convolution(
                    input, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
                    benchmark, deterministic, cudnn_enabled, allow_tf32,
                )  # fmt: skip
            except RuntimeError as error:
                if route is None or not self._falls_through(error, route):
                    raise
        result = route.run(input, weight)
        if bias is not None:
            result.add_(bias.view(-1, *[1] * (input.dim() - 2)))
        return result

    def convolution_backward(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias_sizes: Sequence[int] | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        output_mask: Sequence[bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """`aten::convolution_backward`: gradients of input, weight and bias; None where the mask says no."""

        def by_native(
            mask: list[bool],
        ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
            return native.convolution_backward(
                grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding,
                groups, mask,
            )  # fmt: skip

        geometry = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
        of_grad = (grad_output.shape, grad_output.dtype)
        wanted = (bool(output_mask[0]), bool(output_mask[1]))
        key = (geometry, wanted, of_grad, *_looks(input), *_looks(weight), torch._C._get_cudnn_enabled())
        try:
            asked = self._backward[key]
        except KeyError:
            specs = backward_specs(grad_output, input, weight, Geometry(*geometry))
            found = specs and tuple(self._route(s) if w else None for s, w in zip(specs, wanted, strict=True))
            asked = _remember(self._backward, key, found)
        if asked is None:
            return by_native(list(output_mask))

        for route in asked:
            if route is not None:
                route.calls += 1
        of_input = of_weight = of_bias = None
        native_routes = [route for route in asked if route is not None and route.strategy is NATIVE]
        if native_routes:
            try:
                if self._before_native is not None:
                    for route in native_routes:
                        self._before_native(route.spec.direction)
                mask = [route is not None and route.strategy is NATIVE for route in asked]
                of_input, of_weight, of_bias = by_native([*mask, output_mask[2]])
            except RuntimeError as error:
                if not self._falls_through(error, *native_routes):
                    raise
        if asked[0] is not None and of_input is None:
            of_input = asked[0].run(grad_output, weight)
        if asked[1] is not None and of_weight is None:
            image, grad = (grad_output, input) if transposed else (input, grad_output)
            of_weight = asked[1].run(image, grad)
        if output_mask[2] and of_bias is None:
            of_bias = grad_output.sum([0, *range(2, grad_output.dim())])
        return of_input, of_weight, of_bias

    def serve(self, spec: ConvSpec, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """One direction of a convolution; operands as `Strategy.run` takes them."""
        route = self._route(spec)
        route.calls += 1
        if route.strategy is NATIVE:
            try:
                if self._before_native is not None:
                    self._before_native(spec.direction)
                return route.run(first, second)
            except RuntimeError as error:
                if not self._falls_through(error, route):
                    raise
        return route.run(first, second)

    def _route(self, spec: ConvSpec) -> Route:
        """The one route of a spec, made on its first sight."""
        route = self._routes.get(spec)
        if route is None:
            strategy, why = self.chooser.choose(spec)
            LOGGER.info("%s -> %s (%s)", spec, strategy.name, why)
            route = _remember(self._routes, spec, Route(spec, strategy, why, memory_format(spec)))
        return route

    def _falls_through(self, error: RuntimeError, *routes: Route) -> bool:
        """Whether a bypass may serve what native failed to; if so, the routes lead there from now on.

        A failed HIP call leaves the GPU context unusable: its error gets the spec and a hint, and is the
        caller's to raise, as are errors that are the user's own.
        """
        culprit = blame(error)
        if culprit == "device":
            specs = "; ".join(str(route.spec) for route in routes)
            error.args = (
                f"{error}\nin the native convolution {specs}; the GPU context is unusable from here on\n"
                "hint: start again with ROCM_PATCH_CONV=bypass, or rocm-patch run --conv bypass",
            )
        if culprit != "library" or self.chooser.policy == "native":
            return False
        message = str(error).strip().splitlines()[0]
        for route in routes:
            self.chooser.failed[route.spec] = message
            route.strategy, route.why = self.chooser.choose(route.spec)
            LOGGER.warning(
                "native convolution failed (%s); %s is served by %s from here on\n"
                "hint: ROCM_PATCH_CONV=bypass saves the attempt",
                message, route.spec, route.strategy.name,
            )  # fmt: skip
        return True


def _looks(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All of a tensor that decides its route, hashable and quick to read."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout


def _remember(table: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(table) >= _MOST_ENTRIES:
        table.clear()
    table[key] = value
    return value


def report(dispatchers: Sequence[Dispatcher]) -> str:
    """A table of the routes taken: calls, strategy, spec and reason, one line each."""
    routes = [route for dispatcher in dispatchers for route in dispatcher.routes()]
    if not routes:
        return "no convolution was served by rocm-patch in this process"
    lines = [f"{'calls':>8}  {'strategy':<10} convolution (reason)"]
    for route in sorted(routes, key=lambda route: -route.calls):
        lines.append(f"{route.calls:>8}  {route.strategy.name:<10} {route.spec} ({route.why})")
    return "\n".join(lines)

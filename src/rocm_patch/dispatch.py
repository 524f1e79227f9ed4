"""convolution() and convolution_backward() with aten's signatures: call -> spec -> strategy -> result.

What a call cannot be served with (shapes that do not fit, unknown types) goes to aten's own kernel, so that
every error is the one that PyTorch itself raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import CodeType
from typing import Any

import torch

from rocm_patch.conv import NATIVE, native
from rocm_patch.conv.call import Geometry, backward_specs, forward_spec, looks
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.conv.to_last import SHARED_COPIES
from rocm_patch.route import Route
from rocm_patch.routes import Routes, remember


class Dispatcher:
    """A pair of functions with the signatures of `aten::_convolution` and `aten::convolution_backward`.

    Args:
        routes: how each spec is served.
    """

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        # From what a call looks like to its routes; None where only aten can judge the call. Backward has a route
        # per gradient (input, weight), None for one that is not asked for.
        self._forward: dict[tuple[Any, ...], Route | None] = {}
        self._backward: dict[tuple[Any, ...], tuple[Route | None, Route | None] | None] = {}

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
        key = (geometry, of_bias, *looks(input), *looks(weight), native.cudnn_enabled())
        try:
            route = self._forward[key]
        except KeyError:
            spec = forward_spec(input, weight, bias, Geometry(*geometry))
            route = remember(self._forward, key, None if spec is None else self.routes.of(spec))

        def by_native() -> torch.Tensor:
            return native.convolution(
                input, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
                benchmark, deterministic, cudnn_enabled, allow_tf32,
            )  # fmt: skip

        if route is None:
            return by_native()
        return self.routes.serve(route, by_native, input, weight, bias)

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

        def by_native(*mask: bool) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
            return native.convolution_backward(
                grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding,
                groups, list(mask),
            )  # fmt: skip

        geometry = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)
        of_grad = (grad_output.shape, grad_output.dtype)
        wanted = (bool(output_mask[0]), bool(output_mask[1]))
        key = (geometry, wanted, of_grad, *looks(input), *looks(weight), native.cudnn_enabled())
        try:
            asked = self._backward[key]
        except KeyError:
            specs = backward_specs(grad_output, input, weight, Geometry(*geometry))
            found = specs and tuple(self.routes.of(s) if w else None for s, w in zip(specs, wanted, strict=True))
            asked = remember(self._backward, key, found)
        if asked is None:
            return by_native(*output_mask)

        of_input, of_weight = asked
        one = of_input or of_weight
        if one is not None and one.strategy is NATIVE:
            grads = self.routes.natives_at_once(asked, partial(by_native, *output_mask))
            if grads is not None:
                return grads  # type: ignore[no-any-return]
        factors = (input, weight)
        if input.is_complex():
            factors = (input.conj().resolve_conj(), weight.conj().resolve_conj())
        input_grad = weight_grad = bias_grad = None
        with SHARED_COPIES:
            if of_input is not None:
                input_grad = self.routes.serve(
                    of_input, lambda: by_native(True, False, False)[0], grad_output, factors[1]
                )
            if of_weight is not None:
                image, grad = (grad_output, factors[0]) if transposed else (factors[0], grad_output)
                weight_grad = self.routes.serve(of_weight, lambda: by_native(False, True, False)[1], image, grad)
        if output_mask[2]:
            bias_grad = grad_output.sum([0, *range(2, grad_output.dim())])
        return input_grad, weight_grad, bias_grad

    def serve(self, spec: ConvSpec, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """One direction of a convolution; operands as `Strategy.run` takes them."""
        route = self.routes.of(spec)
        return self.routes.serve(route, lambda: NATIVE.run(spec, first, second, 0), first, second)


# The functions that a convolution is in for as long as it runs; the guard's watchdog looks for them.
INSIDE: frozenset[CodeType] = frozenset(
    function.__code__ for function in (Dispatcher.convolution, Dispatcher.convolution_backward, Dispatcher.serve)
)


def report(dispatchers: Sequence[Dispatcher]) -> str:
    """A table of the routes taken: calls, strategy, spec and reason, one line each."""
    routes = [route for dispatcher in dispatchers for route in dispatcher.routes.taken()]
    if not routes:
        return "no convolution was served by rocm-patch in this process"
    lines = [f"{'calls':>8}  {'strategy':<10} convolution (reason)"]
    for route in sorted(routes, key=lambda route: -route.calls):
        lines.append(f"{route.calls:>8}  {route.strategy.name:<10} {route.spec} ({route.why})")
    return "\n".join(lines)

"""Strides and types of results and gradients are aten's, whatever the layout of the operands."""

import itertools

import pytest
import torch

import rocm_patch
from against_native import CONVS, LAST, TRANSPOSED, calls, image

pytestmark = pytest.mark.usefixtures("one_thread")


def layouts(dims):
    """Ways to lay out a tensor (a, b, *spatial), values kept but where expanded."""
    found = {
        "contiguous": lambda t: t,
        "spatial outermost": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": lambda t: t[:1, :1].expand_as(t),
        "with an offset": lambda t: torch.cat([t, t], -1)[..., t.shape[-1] - 1 : -1],
        "every second": lambda t: torch.stack([t, t], -1)[..., 1],
    }
    if dims in LAST:
        found["channels last"] = lambda t: t.contiguous(memory_format=LAST[dims])
        found["some channels of channels last"] = lambda t: torch.cat([t, t], 1).contiguous(memory_format=LAST[dims])[
            :, 1 : 1 + t.shape[1]
        ]
    return found


def of_every_size(dims):
    """(batch, in, out, groups, spatial, kernel)"""
    spatial, three, one = (5, 6, 4)[:dims], (3,) * dims, (1,) * dims
    return [
        (2, 4, 6, 1, spatial, three), (2, 4, 6, 2, spatial, three), (2, 4, 4, 4, spatial, three),
        (1, 4, 6, 1, spatial, three), (2, 1, 6, 1, spatial, three), (2, 4, 1, 1, spatial, three),
        (1, 1, 1, 1, spatial, three), (2, 4, 6, 1, spatial, one), (2, 4, 6, 1, one, one),
        (1, 4, 6, 1, one, three), (2, 1, 1, 1, one, one), (1, 4, 6, 2, (*spatial[:-1], 1), (*one[:-1], 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_results_and_gradients_have_natives_strides_whatever_the_layout(dims, transposed):
    conv = (TRANSPOSED if transposed else CONVS)[dims]
    runs = {}
    for batch, into, out, groups, spatial, kernel in of_every_size(dims):
        x = image(batch, into, *spatial, dtype=torch.float32)
        shape = (into, out // groups) if transposed else (out, into // groups)
        w, b = image(*shape, *kernel, dtype=torch.float32), image(out, dtype=torch.float32)
        padding = [k // 2 for k in kernel]
        for (of_x, lay_x), (of_w, lay_w) in itertools.product(layouts(dims).items(), repeat=2):
            name = (tuple(x.shape), of_x, tuple(w.shape), of_w)
            runs[name] = ((lay_x(x), lay_w(w), b), {"padding": padding, "groups": groups})

    def run(given, options):
        operands = [t.detach().requires_grad_() for t in given]
        y = conv(*operands, **options)
        return [y, *torch.autograd.grad(y, operands, torch.ones(y.shape))]

    rocm_patch.disable_all_patches()
    native = {name: run(*arguments) for name, arguments in runs.items()}
    rocm_patch.enable_miopen_bypass(backend="cpu")
    ours = {name: run(*arguments) for name, arguments in runs.items()}
    assert sum(calls().values()) == 3 * len(runs)
    different = []
    for name in runs:
        for what, n, o in zip(("result", "of input", "of weight", "of bias"), native[name], ours[name], strict=True):
            assert o.dtype == n.dtype and torch.allclose(n, o, 1e-4, 1e-4), (name, what)
            # In a dimension of one, the gradient of a weight has what stride oneDNN happens to give it.
            looked_at = [i for i, size in enumerate(n.shape) if size > 1 or what != "of weight"]
            if any(o.stride(i) != n.stride(i) for i in looked_at):
                different.append((what, *name, "native", n.stride(), "ours", o.stride()))
    assert not different, f"{len(different)} differ, the first are {different[:3]}"

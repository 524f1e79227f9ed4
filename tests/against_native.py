"""The same computed natively and under the override, for tests of one against the other."""

import torch
import torch.nn.functional as F

import rocm_patch
from rocm_patch.overrides.aten import ACTIVE

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def image(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(2), dtype=dtype)


def calls():
    """Calls by direction of the override in force; none of them may have gone to aten."""
    found = dict.fromkeys(("forward", "grad_input", "grad_weight"), 0)
    for route in ACTIVE["CPU"].routes.taken():
        assert route.strategy.name != "native", route
        found[route.spec.direction] += route.calls
    return found


def flat(value):
    """The leaves of nested results."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in flat(part)]
    return [value]


def same(function, rtol=1e-9, atol=1e-11):
    """Run natively, then under the override, and compare all results; returns the calls that were served."""
    rocm_patch.disable_all_patches()
    torch.manual_seed(1)
    native = flat(function())
    assert rocm_patch.enable_miopen_bypass(backend="cpu")
    torch.manual_seed(1)
    ours = flat(function())
    served = calls()
    assert len(native) == len(ours)
    for n, o in zip(native, ours, strict=True):
        if isinstance(n, torch.Tensor):
            assert (o.shape, o.dtype, o.layout, o.requires_grad) == (n.shape, n.dtype, n.layout, n.requires_grad)
            assert n.is_meta or torch.allclose(n, o, rtol, atol), (n - o).abs().max()
        else:
            assert n == o
    return served

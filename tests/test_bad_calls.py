"""Calls that aten refuses fail as they do natively; those at the border of what it takes succeed."""

import pytest
import torch

import rocm_patch
from against_native import CONVS, TRANSPOSED, calls

pytestmark = pytest.mark.usefixtures("one_thread")


def bad_and_border_calls(dims, transposed):
    """name -> a call that aten refuses, or takes at the border of what it takes."""
    conv = (TRANSPOSED if transposed else CONVS)[dims]

    def x(batch=1, channels=4, size=6):
        return torch.ones(batch, channels, *[size] * dims)

    def weight(into=4, out=6, size=3):
        return torch.ones(*((into, out) if transposed else (out, into)), *[size] * dims)

    w, b = weight(), torch.ones(6)
    operands = {
        "channels do not fit": (x(channels=3), w),
        "unbatched, channels do not fit": (x(channels=3)[0], w),
        "unbatched, a dimension missing": (x()[0, 0], w),
        "an unbatched empty image": (torch.ones(0, *[6] * dims), w),
        "weight with a dimension less": (x(), w[..., 0]),
        "weight with a dimension more": (x(), w[..., None]),
        "scalar weight": (x(), torch.ones(())),
        "scalar input": (torch.ones(()), w),
        "6-d input": (torch.ones(1, 1, 1, 4, 6, 6), w),
        "6-d input and weight": (torch.ones(1, 4, 6, 6, 6, 6), torch.ones(4, 4, 3, 3, 3, 3)),
        "bias of another size": (x(), w, torch.ones(5)),
        "bias of two dimensions": (x(), w, torch.ones(6, 1)),
        "scalar bias": (x(), w, torch.ones(())),
        "bias of another type": (x(), w, b.double()),
        "bias of half type": (x(), w, b.half()),
        "float32 bias to bfloat16": (x().bfloat16(), w.bfloat16(), b),
        "float64 weight": (x(), w.double()),
        "float64 input": (x().double(), w),
        "float16 input": (x().half(), w),
        "bfloat16 weight": (x(), w.bfloat16()),
        "meta input": (x().to("meta"), w),
        "int8": (x().to(torch.int8), w.to(torch.int8)),
        "int64": (x().long(), w.long()),
        "int64 input": (x().long(), w),
        "bool": (x() > 0, w > 0),
        "complex input": (x().to(torch.complex64), w),
        "complex weight": (x(), w.to(torch.complex64)),
        "complex bias": (x(), w, b.to(torch.complex64)),
        "real bias to complex": (x().to(torch.complex64), w.to(torch.complex64), b),
        "sparse input": (x().to_sparse(), w),
        "sparse weight": (x(), w.to_sparse()),
        "sparse bias": (x(), w, b.to_sparse()),
        "no weight": (x(), None),
        "no input": (None, w),
        "empty batch": (x(batch=0), w, b),
        "empty batch, channels do not fit": (x(batch=0, channels=3), w),
        "no channels": (x(channels=0), weight(into=0)),
        "no channels, but in the weight": (x(channels=0), w),
        "no filters": (x(), weight(out=0)),
        "no filters, no biases": (x(), weight(out=0), b[:0]),
        "kernel of no size": (x(), weight(size=0)),
        "image of no size": (x(size=0), w),
        "kernel larger than the image": (x(size=2), weight(size=9)),
    }
    found = {name: (given, {}) for name, given in operands.items()}
    options = {
        "negative padding": {"padding": -1}, "zero stride": {"stride": 0}, "negative stride": {"stride": -1},
        "zero dilation": {"dilation": 0}, "negative dilation": {"dilation": -2},
        "zero groups": {"groups": 0}, "negative groups": {"groups": -1}, "groups do not divide": {"groups": 3},
        "groups do not fit": {"groups": 2}, "fractional stride": {"stride": 1.5}, "unknown padding": {"padding": "?"},
        "padding same with a stride": {"padding": "same", "stride": 2},
        "a stride too many": {"stride": [1] * (dims + 1)}, "a padding too many": {"padding": [1] * (dims + 1)},
        "a dilation too many": {"dilation": [1] * (dims + 1)}, "large padding": {"padding": 4},
        "dilated beyond the image": {"dilation": 4},
    }  # fmt: skip
    if transposed:
        options |= {
            "output_padding as large as the stride": {"stride": 2, "output_padding": 2},
            "output_padding without stride": {"output_padding": 1},
            "output_padding below the dilation": {"dilation": 2, "output_padding": 1},
            "negative output_padding": {"stride": 2, "output_padding": -1},
            "an output_padding too many": {"stride": 2, "output_padding": [1] * (dims + 1)},
            "negative output": {"padding": 9}, "output of no size": {"padding": 4},
        }  # fmt: skip
    found |= {name: ((x(), w, b), given) for name, given in options.items()}
    found |= {f"image of no size, padding {p}": ((x(size=0), w), {"padding": p}) for p in (1, 2)}
    return {name: lambda given=given, o=o: conv(*given, **o) for name, (given, o) in found.items()}


def outcome(call):
    try:
        out = call()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # NotImplementedError is a RuntimeError
        return type(error).__name__, str(error)
    values = out.detach().double().flatten().tolist() if out.dtype.is_floating_point and not out.is_meta else None
    return out.shape, out.stride(), out.dtype, out.layout, out.device, values and [round(v, 2) for v in values]


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bad_calls_fail_as_natively_and_border_calls_succeed_as_natively(dims, transposed):
    table = bad_and_border_calls(dims, transposed)
    rocm_patch.disable_all_patches()
    native = {name: outcome(call) for name, call in table.items()}
    rocm_patch.enable_miopen_bypass(backend="cpu")
    ours = {name: outcome(call) for name, call in table.items()}
    assert ours == native
    assert sum(isinstance(first, str) for first, *_ in native.values()) > 40
    assert sum(calls().values()) > 0

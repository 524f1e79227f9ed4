"""Compute small convolutions by one fused strategy in Triton's interpreter, and compare with float64; JSON on stdout.

    TRITON_INTERPRET=1 python tests/kernels_interpreted.py STRATEGY [PIECE_BYTES]

The kernels run as they are, as numpy programs on tensors of the CPU. Needs Triton on the path. PIECE_BYTES: what
`columns` takes at a time, so that small convolutions are taken in several pieces.
"""

import json
import sys

import torch
import torch.nn.functional as F

from rocm_patch.conv import STRATEGIES, columns, pieces
from rocm_patch.conv.cases import CASES, Case
from rocm_patch.conv.spec import DIRECTIONS

# Strategies that take the interpreter long: of these a case in one type only; and channels that take it too long.
SLOW, _MANY = ("direct", "implicit_gemm_16"), 20
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Blocks in the interpreter are 32 by 32: here there are several, sums are cut, and the last ones are not full.
LARGER = (
    Case("many channels", (2, 40, 7, 9), (36, 40, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("many channels, stride 2", (2, 40, 9, 7), (36, 40, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("groups of 20 channels", (2, 40, 6, 6), (40, 20, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    Case("one tap, many channels", (3, 40, 5, 5), (36, 40, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("depthwise, rows beyond a position's", (3, 5, 14, 11), (5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
    Case("depthwise 5x5, stride 2", (3, 4, 13, 14), (4, 1, 5, 5), (2, 2), (2, 2), (1, 1), 4),
    Case("depthwise 7x7: parts of rows of taps", (2, 3, 9, 9), (3, 1, 7, 7), (1, 1), (3, 3), (1, 1), 3),
    Case("rows of 16 bytes", (3, 16, 8, 10), (24, 16, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("rows of 16 bytes, one sample, stride 2", (1, 8, 16, 16), (16, 8, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("rows of 16 bytes, padded beyond the kernel", (2, 8, 8, 8), (16, 8, 3, 3), (1, 1), (5, 1), (2, 1)),
    Case("rows of 16 bytes, 3-d", (2, 8, 4, 4, 6), (8, 8, 2, 1, 3), (1, 1, 1), (0, 0, 1), (1, 1, 1)),
)


def exact(case, image, weight, grad):
    wide = [tensor.double().requires_grad_() for tensor in (image, weight)]
    out = CONVS[len(case.stride)](*wide, None, case.stride, case.padding, case.dilation, case.groups)
    of_image, of_weight = torch.autograd.grad(out, wide, grad.double())
    return {"forward": out.detach(), "grad_input": of_image, "grad_weight": of_weight}


def rows_of(strategy):
    for number, case in enumerate((*CASES, *LARGER)):
        if strategy.name == "direct" and case.weight[1] > _MANY:
            continue
        # Both types and both formats, if not all four of them for every case.
        kinds = [("float32", number % 4 == 1), ("float16", number % 4 == 2)]
        for dtype, last in [kinds[number % 2]] if strategy.name in SLOW else kinds:
            last = last and len(case.image) > 3
            spec = case.spec("forward", dtype, "cpu", last)
            torch.manual_seed(number)
            made = [torch.randn(shape).to(getattr(torch, dtype)) for shape in (spec.image, spec.weight, spec.grad)]
            if last:
                made = [tensor.contiguous(memory_format=LAST[tensor.dim()]) for tensor in made]
            image, weight, grad = made
            want = exact(case, *made)
            for direction in DIRECTIONS:
                spec = case.spec(direction, dtype, "cpu", last)
                if strategy.rejects(spec) is not None:
                    continue
                pair = {"forward": (image, weight), "grad_input": (grad, weight)}.get(direction, (image, grad))
                result = strategy.run(spec, *pair, 1 << 30)
                error = float((result.double() - want[direction]).norm() / want[direction].norm())
                right = tuple(result.shape) == spec.result and error <= strategy.rtol[dtype]
                yield {"spec": str(spec), "direction": direction, "dtype": dtype, "error": error, "right": right}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        pieces.PIECE_BYTES = columns.PIECE_BYTES = int(sys.argv[2])
    chosen = next(strategy for strategy in STRATEGIES if strategy.name == sys.argv[1])
    json.dump(list(rows_of(chosen)), sys.stdout)

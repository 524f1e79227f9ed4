"""torch's own OpInfo samples of every convolution with the override on, judged by float64.

    python -m pytest tests/test_opinfo.py                      # on the CPU; what takes longest is left out
    OPINFO_DEVICE=cuda python -m pytest tests/test_opinfo.py   # everything, there; "cpu" is a device too

benchmarks/opinfo.py runs this file and writes down how many samples passed.
"""

import io
import itertools
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import make_tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

import rocm_patch
from rocm_patch.overrides.aten import ACTIVE

if torch.__version__.startswith("1."):
    from functorch import vjp, vmap
else:
    from torch.func import vjp, vmap

# torch's test modules forbid programs to set flags; that would reach every other test of this process.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

EVERYTHING = "OPINFO_DEVICE" in os.environ
DEVICE = os.environ.get("OPINFO_DEVICE", "cpu")
BACKEND = "cpu" if DEVICE == "cpu" else "hip" if torch.version.hip else "cuda"
KEY = "CPU" if DEVICE == "cpu" else "CUDA"
if DEVICE != "cpu":  # cuDNN's float32 is float32 from here on, ours always
    torch._C._set_cudnn_allow_tf32(False)  # the property is frozen by torch's test modules
# TorchScript's fuser is there for GPUs, and for CPUs where torch was built with LLVM (Debian 13's).
HAS_FUSER = DEVICE != "cpu" or torch._C._llvm_enabled()
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# What one rounding costs, relatively. An error may be eight of them beside the largest sum of absolute values that
# was added up: one for the result, the rest for sums of up to 1320 products and for results that are themselves made
# of rounded ones (complex numbers, second derivatives). Half precision is summed in float32.
ROUNDING = {
    torch.float64: 2.0**-52, torch.complex128: 2.0**-52, torch.float32: 2.0**-23, torch.complex64: 2.0**-23,
    torch.float16: 2.0**-10, torch.complex32: 2.0**-10, torch.bfloat16: 2.0**-7,
}  # fmt: skip
ROUNDINGS = 8
# Types that no convolution of ours takes; OpInfo has int64 on the CPU, and complex32 on GPUs, where samples take it.
FOREIGN = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex32]
# Above this many elements, and of complex numbers, a Jacobian is checked along random directions only.
FULL_JACOBIAN = 100


@dataclass
class Sample:
    """One call of a convolution: its tensors (input, weight and maybe bias) and its other arguments."""

    name: str
    tensors: list[torch.Tensor]
    options: dict[str, Any]

    @classmethod
    def of(cls, name, given):
        return cls(name, [given.input, *(t for t in given.args if t is not None)], given.kwargs)

    def __call__(self, *tensors):
        return getattr(F, self.name)(*tensors, **self.options)

    @property
    def dtype(self):
        return self.tensors[0].dtype

    def upstreams(self, count, seed=1):
        out = self(*map(exact, self.tensors)).to(DEVICE, self.dtype)
        return noise([out] * count, seed)


@dataclass
class Convolution:
    dtypes: set[torch.dtype]
    sample_inputs: Callable[..., Any]
    error_inputs: Callable[[], Any]

    def samples(self, dtype):
        torch.manual_seed(0)
        return list(self.sample_inputs(DEVICE, dtype, requires_grad=False))


def own_conv3d_samples(device, dtype, requires_grad):
    """In place of those that torch 1.13 lacks."""
    for image, weight, bias, options in [
        ((1, 3, 4, 4, 4), (3, 3, 3, 3, 3), True, {"stride": (2, 2, 2), "padding": 2}),
        ((2, 4, 5, 6, 5), (2, 2, 3, 2, 3), True, {"stride": (3, 1, 2), "padding": (1, 0, 2), "groups": 2}),
        ((1, 2, 5, 5, 7), (4, 2, 2, 3, 2), True, {"dilation": (1, 2, 3), "padding": "same"}),
        ((2, 4, 3, 4, 3), (8, 1, 3, 3, 2), False, {"groups": 4}),
        ((1, 2, 4, 3, 2), (3, 2, 1, 1, 1), True, {"padding": "valid"}),
        ((1, 2, 3, 4, 5), (2, 2, 3, 4, 5), False, {}),
    ]:
        make = partial(make_tensor, device=device, dtype=dtype, requires_grad=requires_grad)
        for shape in (image, image[1:]):
            yield SampleInput(make(shape), args=(make(weight), make(weight[:1]) if bias else None), kwargs=options)


def convolutions():
    found = {}
    for op in op_db:
        if op.name.startswith("nn.functional.conv"):
            errors = partial(op.error_inputs, DEVICE) if op.error_inputs_func else list
            name = op.name.rpartition(".")[2]
            found[name] = Convolution(set(op.supported_dtypes(DEVICE)), op.sample_inputs, errors)
    if "conv3d" not in found:
        found["conv3d"] = Convolution(found["conv2d"].dtypes, own_conv3d_samples, list)
    return found


CONVOLUTIONS = convolutions()


@contextmanager
def override():
    assert rocm_patch.enable_miopen_bypass(backend=BACKEND)
    try:
        yield ACTIVE[KEY]
    finally:
        rocm_patch.disable_all_patches()


def aten_alone():
    """Without the vendor's library, which the override switches off: ours are the strides and words left then."""
    return torch.backends.cudnn.flags(enabled=False)


def calls():
    return sum(route.calls for route in ACTIVE[KEY].routes.taken()) if KEY in ACTIVE else 0


def exact(tensor):
    """In float64, on the CPU, where aten needs no vendor's library."""
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64).resolve_conj()


def exactly(function, *groups):
    """What a function of lists of tensors should give, and the largest sums that are added up on the way.

    The function must be a sum of products: for absolute values it then gives those sums.
    """
    expected = function(*(list(map(exact, group)) for group in groups))
    sums = function(*([exact(tensor).abs() for tensor in group] for group in groups))
    return [(e.detach(), s.detach().abs().max()) for e, s in zip(expected, sums, strict=True)]


def judge(results, expected, dtype):
    assert len(results) == len(expected)
    for number, (result, (right, sums)) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == right.shape and result.dtype == dtype
        error, most = (exact(result) - right).abs().max(), ROUNDINGS * ROUNDING[dtype] * sums
        assert error <= most, f"result {number}: error {error:.3g}, at most {most:.3g}"


def noise(tensors, seed):
    """Random tensors like these, on their device."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex128 if tensors[0].is_complex() else torch.float64
    return [torch.randn(t.shape, generator=generator, dtype=kind).to(t.device, t.dtype) for t in tensors]


def looks(results):
    """Shape, type and strides: every one, since compiled graphs assert them."""
    return [(tuple(t.shape), t.dtype, t.stride()) for t in results]


def coarse_looks(results):
    """Without the strides of dimensions of size 1: in gradients aten's own differ between its kernels."""
    return [
        (tuple(t.shape), t.dtype, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]) for t in results
    ]


# A check takes a sample and its twin that is not contiguous. It returns what is run under the override, a function
# that gives tensors, and what these should be.


def variants(sample, noncontiguous):
    """The same numbers laid out otherwise."""
    yield noncontiguous.tensors
    last = LAST.get(sample.tensors[0].dim())
    if last is not None and sample.tensors[1].dim() == sample.tensors[0].dim():
        for which in ((0,), (1,), (0, 1)):
            yield [t.contiguous(memory_format=last) if i in which else t for i, t in enumerate(sample.tensors)]
    if sample.dtype in (torch.complex64, torch.complex128):
        yield [t.conj().resolve_conj().conj() for t in sample.tensors]


def check_forward(sample, noncontiguous):
    layouts = [sample.tensors, *variants(sample, noncontiguous)]
    return (
        lambda: [sample(*tensors) for tensors in layouts],
        exactly(lambda tensors: [sample(*tensors)], sample.tensors) * len(layouts),
    )


def gradients(function, wanted, tensors, upstreams):
    """The result and the gradients of those tensors that they are wanted of."""
    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    out = function(*leaves)
    return [
        out,
        *(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], upstreams) if any(wanted) else ()),
    ]


def check_gradients(sample, noncontiguous):
    """Of every choice of tensors."""
    upstreams = sample.upstreams(1)
    choices = list(itertools.product([True, False], repeat=len(sample.tensors)))
    tasks = [(choice, sample.tensors) for choice in choices]
    tasks += [(choices[0], tensors) for tensors in variants(sample, noncontiguous)]
    expected = {choice: exactly(partial(gradients, sample, choice), sample.tensors, upstreams) for choice in choices}
    return (
        lambda: [result for task in tasks for result in gradients(sample, *task, upstreams)],
        [right for choice, _ in tasks for right in expected[choice]],
    )


def derivatives(sample, tensors, tangents, upstreams):
    """Forward-mode, double backward, forward over reverse."""
    upstream, other = upstreams
    with forward_ad.dual_level():
        out = sample(*map(forward_ad.make_dual, tensors, tangents))
        results = [forward_ad.unpack_dual(out).tangent]
    leaves = [t.detach().requires_grad_() for t in (*tensors, upstream)]
    grads = torch.autograd.grad(sample(*leaves[:-1]), leaves[:-1], leaves[-1], create_graph=True)
    results += torch.autograd.grad(grads, [*leaves[:2], leaves[-1]], tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach().requires_grad_(), d) for t, d in zip(tensors, tangents, strict=True)]
        grads = torch.autograd.grad(sample(*duals), duals, forward_ad.make_dual(upstream, other))
        results += [forward_ad.unpack_dual(g).tangent for g in grads]
    return results


def check_derivatives(sample, _):
    vectors = (sample.tensors, noise(sample.tensors, 2), sample.upstreams(2, 3))
    function = partial(derivatives, sample)
    return partial(function, *vectors), exactly(function, *vectors)


def leaves_of(sample):
    return [t.detach().clone().requires_grad_() for t in sample.tensors]


def check_gradcheck(sample, _):
    """Forward-mode and reverse, both batched too."""
    fast = sample.dtype.is_complex or sum(t.numel() for t in sample.tensors) > FULL_JACOBIAN

    def run():
        assert gradcheck(
            sample, leaves_of(sample), check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True, fast_mode=fast, nondet_tol=1e-12,
        )  # fmt: skip
        return []

    return run, []


def check_gradgradcheck(sample, _):
    """Reverse and forward over reverse."""
    # Of complex numbers forward over reverse takes four times as long as the rest; `derivatives` has it too.
    forward = EVERYTHING or not sample.dtype.is_complex

    def run():
        assert gradgradcheck(
            sample, leaves_of(sample), check_fwd_over_rev=forward, check_batched_grad=True,
            gen_non_contig_grad_outputs=True, fast_mode=True, nondet_tol=1e-12,
        )  # fmt: skip
        return []

    return run, []


def check_vmap(sample, _):
    """Over every choice of input, weight and bias, and the gradients of each example, against a loop."""
    upstreams = sample.upstreams(1)
    count = len(sample.tensors)
    dims = (0, 1, 1)[:count]
    batches = [torch.stack([t, *noise([t], 4)], dim=d) for t, d in zip(sample.tensors, dims, strict=True)]
    everything = (True,) * count
    tasks = [[None if one else d for d, one in zip(dims, choice, strict=True)]
             for choice in itertools.product([True, False], repeat=count)][1:]  # fmt: skip

    def arguments(in_dims, tensors, batches):
        return [t if d is None else b for d, t, b in zip(in_dims, tensors, batches, strict=True)]

    def pulled(upstream, *tensors):
        out, pull = vjp(sample, *tensors)
        return (out, *pull(upstream))

    def run():
        results = []
        for in_dims in tasks:
            given = arguments(in_dims, sample.tensors, batches)
            results += [
                vmap(sample, tuple(in_dims))(*given),
                *vmap(partial(pulled, upstreams[0]), tuple(in_dims))(*given),
            ]
        return results

    def loop(in_dims, tensors, batches, upstreams):
        given = arguments(in_dims, tensors, batches)
        each = [
            gradients(sample, everything, [
                t if d is None else t.select(d, i) for d, t in zip(in_dims, given, strict=True)
            ], upstreams)
            for i in range(2)
        ]  # fmt: skip
        stacked = [torch.stack(results) for results in zip(*each, strict=True)]
        return [stacked[0], *stacked]

    return run, [
        right for in_dims in tasks
        for right in exactly(partial(loop, in_dims), sample.tensors, batches, upstreams)
    ]  # fmt: skip


def scripted(sample):
    """The call as TorchScript's compiler reads it."""
    names = ["input", "weight", "bias"][: len(sample.tensors)]
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in sample.options.items()}
    given = ", ".join([*names, *(f"{key}={value!r}" for key, value in options.items())])
    return torch.jit.CompilationUnit(f"def call({', '.join(names)}):\n    return torch.{sample.name}({given})\n").call


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def jit(sample, choice):
    """Scripted and traced, saved, loaded, and run thrice: the executor optimises after what it saw."""
    upstreams = sample.upstreams(1)
    wanted = (choice,) * len(sample.tensors)

    def run():
        results = []
        traced = torch.jit.trace(lambda *tensors: sample(*tensors), sample.tensors, check_trace=False)
        for loaded in map(saved_and_loaded, (scripted(sample), traced)):
            for times in range(3):
                before = calls()
                results += gradients(loaded, wanted, sample.tensors, upstreams)
                # Later a fuser may have made a depthwise convolution of its own: nobody's library has a part in it.
                if KEY in ACTIVE and (times == 0 or not HAS_FUSER):
                    assert calls() > before, "aten served the graph"
        return results

    return run, 6 * exactly(partial(gradients, sample, wanted), sample.tensors, upstreams)


def check_jit(sample, _):
    return jit(sample, False)


def check_jit_gradients(sample, _):
    return jit(sample, True)


CHECKS = {
    "forward": check_forward,
    "gradients": check_gradients,
    "derivatives": check_derivatives,
    "gradcheck": check_gradcheck,
    "gradgradcheck": check_gradgradcheck,
    "vmap": check_vmap,
    "jit": check_jit,
    "jit_gradients": check_jit_gradients,
}
# What native fails some samples of, and why; ours may fail the same samples in the same words. Held to that below.
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
EXCEPTIONS = {
    ("jit_gradients", dtype): "TorchScript's own differentiation refuses complex gradients" for dtype in COMPLEX
}
if HAS_FUSER:
    EXCEPTIONS |= {("jit", dtype): "TorchScript's fuser refuses complex numbers" for dtype in COMPLEX}


def short(dtype):
    return str(dtype).removeprefix("torch.")


def cases():
    for check, (name, convolution) in itertools.product(CHECKS, sorted(CONVOLUTIONS.items())):
        dtypes = {torch.float64, torch.complex128} if check.endswith("gradcheck") else set(ROUNDING)
        for dtype in sorted(convolution.dtypes & dtypes, key=str):
            if check == "vmap" and dtype not in (torch.float32, torch.complex128) and not EVERYTHING:
                continue  # the rules by which calls are batched know no types
            yield pytest.param(check, name, dtype, id=f"{check}-{name}-{short(dtype)}")


def attempt(run, expected, dtype):
    """(results, None), or (results so far, what went wrong)."""
    results = []
    try:
        results = run()
        judge(results, expected, dtype)
    except Exception as failure:  # noqa: BLE001 - whatever a check may raise is what is compared
        return results, failure
    return results, None


@pytest.mark.parametrize(("check", "name", "dtype"), list(cases()))
def test_samples(check, name, dtype, record_property):
    given = CONVOLUTIONS[name].samples(dtype)
    samples = [Sample.of(name, one) for one in given]
    tasks = [CHECKS[check](s, Sample.of(name, one.noncontiguous())) for s, one in zip(samples, given, strict=True)]
    ours, wrong = [], {}
    with override() as dispatcher:
        for task in tasks:
            before = calls()
            results, failure = attempt(*task, dtype)
            if failure is None and calls() == before:
                failure = "aten served this"
            ours.append((results, failure))
        assert all(route.strategy.name != "native" for route in dispatcher.routes.taken())
    natives = [attempt(*task, dtype) for task in tasks] if (check, dtype) in EXCEPTIONS else []
    assert (check, dtype) not in EXCEPTIONS or any(failure for _, failure in natives), "take it off the list"
    excused = [n for n, (_, failure) in enumerate(natives) if failure and repr(failure) == repr(ours[n][1])]
    look = looks if check == "forward" else coarse_looks
    for number, (task, (results, failure)) in enumerate(zip(tasks, ours, strict=True)):
        if failure and number not in excused:
            wrong[number] = failure
        elif results and not failure:
            with aten_alone():
                natives = attempt(*task, dtype)[0]
            # Where native raises (torch 1.13's double backward in bfloat16) there is nothing to compare with.
            differ = [pair for pair in zip(look(natives), look(results), strict=False) if pair[0] != pair[1]]
            if differ:
                wrong[number] = f"{len(differ)} of {len(results)} look otherwise natively, the first: {differ[0]}"
    record_property("samples", len(samples) - len(excused))
    record_property("excused", len(excused))
    assert not wrong, "\n".join(
        f"{number} {samples[number].options} {[tuple(t.shape) for t in samples[number].tensors]}: {why!r}"
        for number, why in wrong.items()
    )


def outcome(function):
    """What a call gives, or the exception that it raises."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001
        return type(error), str(error)


def wrong_calls(name):
    """torch's error samples and, since it has none for transposed convolutions, the same mistakes made with ours."""
    for error in CONVOLUTIONS[name].error_inputs():
        given = error.sample_input
        yield lambda given=given: getattr(F, name)(given.input, *given.args, **given.kwargs)
    good = Sample.of(name, CONVOLUTIONS[name].samples(torch.float64)[0])
    image, weight, *bias = good.tensors
    mistakes = [{"stride": 0}, {"stride": -1}, {"padding": -1}, {"dilation": 0}, {"dilation": -1}, {"groups": 0},
                {"groups": -1}, {"groups": 2}, {"padding": "same", "stride": 2}]  # fmt: skip
    if "transpose" in name:
        mistakes += [{"output_padding": 99}, {"output_padding": -1}]
    for mistake in mistakes:
        yield partial(Sample(name, [], {**good.options, **mistake}), *good.tensors)
    for tensors in (
        (image, weight[0], *bias), (image, weight[..., None], *bias), (image[0, 0], weight, *bias),
        (image, weight.float(), *bias), (image, weight, *(b.float() for b in bias)),
        (image, weight, *(b[:1] for b in bias)), (image[:, :-1], weight, *bias), (image[..., :0], weight, *bias),
        (image.long(), weight, *bias),
    ):  # fmt: skip
        yield partial(good, *tensors)


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_errors(name, record_property):
    """The same exception with the same words; what aten lets pass has the same result."""
    mistakes = list(wrong_calls(name))
    with aten_alone():
        native = list(map(outcome, mistakes))
    with override():
        ours = list(map(outcome, mistakes))
    for theirs, mine in zip(native, ours, strict=True):
        if isinstance(theirs, tuple):
            assert mine == theirs
        else:
            assert looks([mine]) == looks([theirs]) and torch.allclose(mine, theirs)
    raised = sum(isinstance(answer, tuple) for answer in native)
    assert raised >= 0.8 * len(mistakes)
    record_property("samples", raised)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in sorted(CONVOLUTIONS)
        for dtype in FOREIGN
        if dtype not in CONVOLUTIONS[name].dtypes or not dtype.is_complex
    ],
    ids=lambda value: value if isinstance(value, str) else short(value),
)
def test_other_types_behave_as_natively(name, dtype, record_property):
    samples = [Sample.of(name, one) for one in CONVOLUTIONS[name].samples(dtype)]
    with aten_alone():
        native = [outcome(partial(sample, *sample.tensors)) for sample in samples]
    with override():
        ours = [outcome(partial(sample, *sample.tensors)) for sample in samples]
    for theirs, mine in zip(native, ours, strict=True):
        if isinstance(theirs, tuple) and dtype.is_complex:
            # torch 1.13 cannot do the float16 convolutions that it makes of these; of ours, some can.
            assert not isinstance(mine, tuple) or mine[0] is theirs[0]
        elif isinstance(theirs, tuple):
            assert mine == theirs
        elif dtype.is_complex:
            assert looks([mine]) == looks([theirs])
            assert (exact(mine) - exact(theirs)).norm() <= 8 * ROUNDING[dtype] * exact(theirs).norm()
        else:
            assert looks([mine]) == looks([theirs]) and torch.equal(mine, theirs)
    record_property("samples", len(samples))

"""The guard in real processes: what is tried, what is remembered, and what the next process makes of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rocm_patch
from conftest import clean_environ
from rocm_patch.conv import IM2COL, NATIVE, STRATEGIES, TAPS, likeliest
from rocm_patch.conv.cases import CASES
from rocm_patch.dispatch import Dispatcher
from rocm_patch.errors import NothingWorksError
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.routes import Routes
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.fingerprint import Fingerprint
from rocm_patch.trust.guard import GIVE_UP, THOROUGH, Guard
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.store import Store, Verdict
from rocm_patch.trust.verdicts import UNPROVEN, Verdicts

MACHINE = Fingerprint("gfx1010", "", "2.13.0", "hip 6.4", "in-tree", "6.8.0")
CASE = next(case for case in CASES if case.why.startswith("42x42"))
SPEC = CASE.spec("forward")
PROGRAM = """
import json, sys, torch, torch.nn.functional as F
torch.manual_seed(0)
x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
for _ in range({calls}):
    out = F.conv2d(x, w, padding=1)
    out.sum().backward()
aten = sys.modules["rocm_patch.overrides.aten"]
routes = aten.ACTIVE["CPU"].routes
json.dump({{"served": {{r.spec.direction: r.strategy.name for r in routes.taken()}},
           "met": routes.fault.met if routes.fault else 0, "sum": float(out.sum())}}, sys.stdout)
"""


def program(tmp_path, *options, calls=2, fault=None, check=True, cache=None, **environ):
    """A user's script under `rocm-patch run`, guarded on the CPU; (return code, what it says, stderr)."""
    script = tmp_path / "train.py"
    script.write_text(PROGRAM.format(calls=calls))
    if fault is not None:
        environ["ROCM_PATCH_FAULT"] = fault
    environ.setdefault("ROCM_PATCH_HANG_LIMIT", "2")
    environ.setdefault("ROCM_PATCH_BUSY_LIMIT", "5")
    command = [
        sys.executable,
        "-m",
        "rocm_patch",
        "run",
        "--backend",
        "cpu",
        "--conv",
        "guarded",
        *options,
        str(script),
    ]
    done = subprocess.run(
        command, env=clean_environ(ROCM_PATCH_CACHE_DIR=str(cache or tmp_path / "cache"), **environ),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def rows(tmp_path):
    return {(row.label.split()[0], row.strategy): row.verdict for row in Store(tmp_path / "cache").rows()}


@pytest.fixture
def watched(tmp_path):
    """A guard that watches, our own strategies too, and its verdicts."""
    verdicts = Verdicts(Store(tmp_path / "cache"), lambda device: MACHINE)
    guard = Guard(verdicts, tmp_path / "cache" / "runs", Limits(2.0, 5.0), guards_ours=lambda device: True)
    yield guard
    guard.close()


def operands(case=CASE):
    return torch.randn(case.image), torch.randn(case.weight)


def right(image, weight, case=CASE):
    return F.conv2d(image, weight, None, case.stride, case.padding, case.dilation, case.groups)


# The first run in the user's process -----------------------------------------------------------------------------


def test_a_first_run_that_is_right_is_proven_once_and_for_the_next_process(watched, tmp_path):
    image, weight = operands()
    assert not watched.trusts(SPEC, NATIVE)
    verdict, result = watched.first_call(SPEC, NATIVE, lambda: right(image, weight), image, weight)
    assert verdict.kind == "ok" and verdict.error < 1e-5 and verdict.seconds > 0
    assert torch.equal(result, right(image, weight))
    assert watched.trusts(SPEC, NATIVE)
    another = Guard(Verdicts(Store(tmp_path / "cache"), lambda device: MACHINE), tmp_path / "cache" / "runs")
    assert another.trusts(SPEC, NATIVE)
    another.close()


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out * 1.1, lambda out: out.fill_(float("nan")), lambda out: out.roll(1, -1), torch.zeros_like],
)
def test_a_wrong_result_is_never_handed_on(watched, spoil):
    image, weight = operands()
    verdict, result = watched.first_call(SPEC, NATIVE, lambda: spoil(right(image, weight)), image, weight)
    assert verdict.kind == "wrong" and result is None
    assert not watched.trusts(SPEC, NATIVE)
    assert watched.verdicts.of(SPEC, "native").kind == "wrong"


def test_operands_that_say_nothing_put_the_proof_off_but_not_for_ever(watched):
    image, weight = operands()
    image.fill_(float("nan"))
    calls = [watched.first_call(SPEC, NATIVE, lambda: right(image, weight), image, weight)[0].calls for _ in range(3)]
    assert calls == [0, 0, 1]
    assert watched.verdicts.store.get(MACHINE, SPEC.to_json(), "native") is None


def test_an_error_leaves_no_row_and_is_the_callers_to_judge(watched, tmp_path):
    def fails():
        raise RuntimeError("miopenStatusUnknownError")

    with pytest.raises(RuntimeError, match="miopen"):
        watched.first_call(SPEC, NATIVE, fails, *operands())
    assert watched.verdicts.of(SPEC, "native") is None
    watched.close()
    assert list((tmp_path / "cache" / "runs").iterdir()) == []


@pytest.mark.parametrize("change", ["device", "override", "torch", "runtime", "driver", "kernel"])
def test_a_verdict_does_not_outlive_what_it_was_made_with(watched, tmp_path, change):
    watched.convict(SPEC, NATIVE, "hang", "it hung")
    fields = {name: getattr(MACHINE, name) for name in ("device", "override", "torch", "runtime", "driver", "kernel")}
    changed = Fingerprint(**{**fields, change: fields[change] + " newer"})
    verdicts = Verdicts(Store(tmp_path / "cache"), lambda device: changed)
    assert verdicts.of(SPEC, "native") is None and not verdicts.hard(SPEC, "native")
    assert Verdicts(Store(tmp_path / "cache"), lambda device: MACHINE).of(SPEC, "native").kind == "hang"


# A machine that has crashed before --------------------------------------------------------------------------------


def test_after_a_crash_the_next_convolution_is_tried_in_the_sandbox(watched):
    watched.convict(SPEC, NATIVE, "crash", "SIGSEGV")
    other = CASES[3].spec("forward")
    image, weight = operands(CASES[3])
    verdict, result = watched.first_call(other, NATIVE, lambda: right(image, weight, CASES[3]), image, weight)
    assert verdict.kind == "ok" and verdict.calls >= THOROUGH and result is not None
    # What was proven by a single call before that is proven again.
    third = CASES[4].spec("forward")
    watched.verdicts.enter(third, "native", Verdict("ok", calls=1))
    assert not watched.trusts(third, NATIVE)
    assert watched.trusts(other, NATIVE)


def test_after_some_crashes_native_is_not_tried_any_more(watched):
    for case in CASES[:GIVE_UP]:
        watched.convict(case.spec("forward"), NATIVE, "crash", "SIGSEGV")
    image, weight = operands()

    def must_not_run():
        raise AssertionError("it ran")

    verdict, result = watched.first_call(SPEC, NATIVE, must_not_run, image, weight)
    assert verdict.kind == UNPROVEN and result is None and "not tried" in verdict.evidence
    # That is no verdict on this convolution.
    assert watched.verdicts.store.get(MACHINE, SPEC.to_json(), "native") is None


def test_a_suspicion_is_tried_in_the_sandbox_and_ended_by_it(watched):
    watched.verdicts.suspect(SPEC, "native", "this call was running when its process disappeared")
    assert not watched.trusts(SPEC, NATIVE)
    image, weight = operands()
    verdict, _ = watched.first_call(SPEC, NATIVE, lambda: right(image, weight), image, weight)
    assert verdict.kind == "ok" and watched.verdicts.suspicion(SPEC, "native") is None
    assert watched.trusts(SPEC, NATIVE)


def test_a_suspicion_with_evidence_becomes_a_verdict(tmp_path):
    verdicts = Verdicts(Store(tmp_path / "cache"), lambda device: MACHINE)
    environ = {**os.environ, "ROCM_PATCH_FAULT": "segfault:forward:after=100"}
    guard = Guard(verdicts, tmp_path / "runs", Limits(10.0, 30.0), environ=environ)
    verdicts.suspect(SPEC, "native", "this call was started last when its process disappeared")

    def must_not_run():
        raise AssertionError("it ran")

    verdict, result = guard.first_call(SPEC, NATIVE, must_not_run, *operands())
    guard.close()
    assert verdict.kind == "crash" and "SIGSEGV" in verdict.evidence and result is None
    assert verdicts.store.get(MACHINE, SPEC.to_json(), "native").kind == "crash"


# What is chosen then ----------------------------------------------------------------------------------------------


def test_a_bad_verdict_takes_the_next_strategy_and_the_last_one_says_what_to_do():
    bad = {"native": Verdict("hang"), "pointwise": Verdict("wrong")}
    spec = CASES[0].spec("forward")  # one tap: four ways
    chooser = Chooser("guarded", verdict=lambda spec, name: bad.get(name))
    rest = [strategy for strategy in likeliest(spec) if strategy.name not in bad]
    assert IM2COL in rest and TAPS in rest
    for strategy in rest:  # each slower than the one before, but it works
        chosen, why, _ = chooser.choose(spec)
        assert chosen is strategy and "native hung" in why and "pointwise gave wrong" in why
        bad[strategy.name] = Verdict("crash")
    with pytest.raises(NothingWorksError, match=r"(?s)no way is left.*hint: rocm-patch doctor"):
        chooser.choose(spec)


def test_our_own_strategy_is_guarded_where_it_has_to_be(watched):
    """On an AMD card the BLAS library may run foreign code: a matrix product that is wrong is not believed."""
    image, weight = operands()
    assert not watched.trusts(SPEC, IM2COL)
    wrong = lambda: IM2COL.run(SPEC, image, weight, 1 << 30) * 1.1  # noqa: E731
    verdict, result = watched.first_call(SPEC, IM2COL, wrong, image, weight)
    assert verdict.kind == "wrong" and result is None


def test_under_bypass_on_an_amd_card_ours_are_proven_one_by_one(watched):
    """What happens there, on the CPU: forward with its bias, both gradients, then a product that turns out wrong."""
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    dispatcher = Dispatcher(Routes(Chooser("bypass"), watched))
    x, w, b = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    exact = [t.requires_grad_() for t in (x.double(), w.double(), b.double())]
    right_out = F.conv2d(*exact, padding=1)
    right_out.sum().backward()
    for _ in range(2):
        out = dispatcher.convolution(x, w, b, *geometry)
        grads = dispatcher.convolution_backward(torch.ones_like(out), x, w, [4], *geometry, [True, True, True])
        for ours, right_one in zip((out, *grads), (right_out, *(t.grad for t in exact)), strict=True):
            assert (ours - right_one).norm() <= 1e-5 * right_one.norm()
    routes = dispatcher.routes.taken()
    assert len(routes) == 3 and all(route.proven and route.number and route.calls == 2 for route in routes)
    kept = watched.verdicts.store.rows()
    assert {(row.strategy, row.verdict.kind, row.verdict.calls) for row in kept} == {("im2col", "ok", 1)}
    for strategy in STRATEGIES:
        if strategy.rejects(routes[0].spec) is None:
            watched.convict(routes[0].spec, strategy, "wrong", "it lied")
    with pytest.raises(NothingWorksError, match="im2col gave wrong values: it lied"):
        Dispatcher(Routes(Chooser("bypass"), watched)).convolution(x, w, b, *geometry)


# The override on the CPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_guarded_results_and_gradients_are_natives(dtype):
    def run():
        x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(dtype).requires_grad_()
        w = torch.linspace(-1, 1, 4 * 3 * 3 * 3).reshape(4, 3, 3, 3).to(dtype).requires_grad_()
        b = torch.linspace(-1, 1, 4).to(dtype).requires_grad_()
        out = F.conv2d(x, w, b, padding=1)
        out.float().pow(2).sum().backward()
        return [out.detach(), x.grad, w.grad, b.grad]

    if dtype is torch.float16 and torch.__version__.startswith("1."):  # which has none on the CPU
        with pytest.raises(RuntimeError, match="not implemented"):
            run()
        return
    native = run()
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    for _ in range(3):  # tried, proven, both gradients at once
        for ours, exact in zip(run(), native, strict=True):
            tolerance = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
            assert (ours - exact).double().norm() <= tolerance * exact.double().norm()
    routes = ACTIVE["CPU"].routes.taken()
    assert {route.strategy.name for route in routes} == {"native"} and all(route.proven for route in routes)


def test_the_transposed_convolution_is_judged_with_its_bias():
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    layer = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
    layer(torch.randn(2, 4, 5, 5)).sum().backward()
    assert {route.strategy.name for route in ACTIVE["CPU"].routes.taken()} == {"native"}


def test_the_callers_errors_stay_the_callers():
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    with pytest.raises(RuntimeError, match="expected input"):
        F.conv2d(torch.randn(1, 2, 5, 5), torch.randn(3, 4, 3, 3))
    assert ACTIVE["CPU"].routes.taken() == []


def test_threads_that_meet_the_same_error_convict_native_alone(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_FAULT", "error:forward")
    x, w = torch.randn(2, 3, 16, 16), torch.randn(4, 3, 3, 3)
    exact = F.conv2d(x, w)
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    start = threading.Barrier(6)

    def work(_):
        start.wait()
        return F.conv2d(x, w)

    with ThreadPoolExecutor(6) as pool:
        assert all(torch.allclose(out, exact, atol=1e-5) for out in pool.map(work, range(6)))
    kept = Store(Path(os.environ["ROCM_PATCH_CACHE_DIR"])).rows()
    assert [(row.strategy, row.verdict.kind) for row in kept] == [("native", "error")]


def test_a_fault_that_was_there_before_is_not_the_convolutions(watched, monkeypatch):
    """An assertion of an earlier kernel shows at the first synchronisation."""

    def shows(tensor):
        raise RuntimeError("HIP error: device-side assert triggered")

    monkeypatch.setattr("rocm_patch.trust.guard._synchronize", shows)
    dispatcher = Dispatcher(Routes(Chooser("guarded"), watched))
    with pytest.raises(RuntimeError, match="device-side assert"):
        dispatcher.convolution(*operands(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert watched.verdicts.store.rows() == []


def test_a_result_that_cannot_be_compared_is_handed_on(watched, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("HIP out of memory. Tried to allocate 8.00 MiB")

    monkeypatch.setattr("rocm_patch.trust.reference.judge", fails)
    image, weight = operands()
    verdict, result = watched.first_call(SPEC, NATIVE, lambda: right(image, weight), image, weight)
    assert verdict.calls == 0 and torch.equal(result, right(image, weight))
    assert watched.verdicts.store.rows() == []


def test_a_failed_pair_of_gradients_is_taken_apart(monkeypatch):
    """Both gradients come in one native call once proven; if that fails, only the one at fault is bypassed."""
    rocm_patch.enable_miopen_bypass(backend="cpu", strategy="guarded")
    x, w = torch.randn(1, 2, 6, 6, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    F.conv2d(x, w).sum().backward()
    from rocm_patch.conv import native

    kernel = native.convolution_backward

    def fails_for_weights(*arguments):
        if arguments[-1][1]:
            raise RuntimeError("miopenStatusInternalError")
        return kernel(*arguments)

    monkeypatch.setattr("rocm_patch.conv.native.convolution_backward", fails_for_weights)
    exact = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    F.conv2d(x, w).sum().backward()
    assert torch.allclose(x.grad, exact[0], atol=1e-5) and torch.allclose(w.grad, exact[1], atol=1e-4)
    served = {route.spec.direction: route.strategy.name for route in ACTIVE["CPU"].routes.taken()}
    assert served == {"forward": "native", "grad_input": "native", "grad_weight": "im2col"}


# Whole programs ---------------------------------------------------------------------------------------------------


def test_a_second_run_finds_everything_proven(tmp_path):
    _, first, said = program(tmp_path)
    assert set(first["served"].values()) == {"native"} and "trying" not in said
    proven = rows(tmp_path)
    assert {key: verdict.kind for key, verdict in proven.items()} == {
        (direction, "native"): "ok" for direction in ("forward", "grad_input", "grad_weight")
    }
    assert list((tmp_path / "cache" / "runs").iterdir()) == []
    _, second, _ = program(tmp_path)
    assert second == first and rows(tmp_path) == proven


def test_a_program_that_is_killed_convicts_nobody(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM.format(calls=1_000_000))
    environ = clean_environ(ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "rocm_patch", "run", "--backend", "cpu", "--conv", "guarded", str(script)]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(rows(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, answer, said = program(tmp_path)
    assert set(answer["served"].values()) == {"native"}
    assert said.count("in a process of its own first") in (1, 2)  # the last call, or the last pair of gradients
    assert {verdict.kind for verdict in rows(tmp_path).values()} == {"ok"}


def test_a_hang_without_restart_is_said_and_left_to_the_user(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM.format(calls=1))
    environ = clean_environ(
        ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"), ROCM_PATCH_FAULT="hang:forward", ROCM_PATCH_HANG_LIMIT="1"
    )
    command = [sys.executable, "-m", "rocm_patch", "run", "--backend", "cpu", "--conv", "guarded", str(script)]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    said = ""
    while "hint: end this program" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert "a convolution hangs: native of forward 2x3x8x8 by 4x3x3x3" in said and "no progress for" in said
    assert "F.conv2d(x, w, padding=1)" in said  # the stack
    assert process.poll() is None
    process.kill()
    process.wait()
    assert rows(tmp_path)["forward", "native"].kind == "hang"
    _, answer, _ = program(tmp_path, fault="hang:forward")
    assert answer["served"]["forward"] == "im2col" and answer["met"] == 0


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_proven_call_that_does_not_return(tmp_path, ranks):
    """It hangs; but where there are ranks it may wait for another one, so that it is a suspicion only."""
    script = tmp_path / "train.py"
    script.write_text(PROGRAM.format(calls=5))
    environ = clean_environ(
        ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"), ROCM_PATCH_FAULT="hang:forward:after=2",
        ROCM_PATCH_HANG_LIMIT="1", WORLD_SIZE=ranks,
    )  # fmt: skip
    command = [sys.executable, "-m", "rocm_patch", "run", "--backend", "cpu", "--conv", "guarded", str(script)]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    said = ""
    while "hint: end this program" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.kill()
    process.wait()
    store = Store(tmp_path / "cache")
    assert rows(tmp_path)["forward", "native"].kind == ("hang" if ranks == "1" else "ok")
    assert [suspicion.strategy for suspicion in store.suspicions()] == ([] if ranks == "1" else ["native"])
    assert ("a convolution hangs" if ranks == "1" else "the last convolution was") in said


def test_a_long_compilation_is_no_hang(tmp_path):
    """Ten minutes under a limit of one, scaled down: a compiler at work for six seconds under a limit of one."""
    _, answer, said = program(
        tmp_path, "--restart", fault="compile:forward:seconds=6", calls=1, ROCM_PATCH_HANG_LIMIT="1",
        ROCM_PATCH_BUSY_LIMIT="60",
    )  # fmt: skip
    assert set(answer["served"].values()) == {"native"} and answer["met"] >= 1
    assert "hang" not in said and {verdict.kind for verdict in rows(tmp_path).values()} == {"ok"}


def test_a_call_that_comes_back_after_all_is_acquitted(tmp_path):
    _, answer, said = program(
        tmp_path, fault="compile:forward:seconds=4", calls=1, ROCM_PATCH_HANG_LIMIT="1", ROCM_PATCH_BUSY_LIMIT="2"
    )
    assert "a convolution hangs" in said and "has come back after all" in said
    assert answer["served"]["forward"] == "native" and rows(tmp_path)["forward", "native"].kind == "ok"


def test_forked_workers_have_a_record_of_their_own(tmp_path):
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, sys, torch, torch.nn.functional as F\n"
        "torch.set_num_threads(1)\n"
        "x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)\n"
        "F.conv2d(x, w)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    F.conv2d(x, w); F.conv2d(torch.randn(1, 2, 9, 9), w)\n"
        "    os.kill(os.getpid(), 9)\n"
        "os.waitpid(pid, 0)\n"
        "F.conv2d(x, w)\n"
    )
    environ = clean_environ(ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "rocm_patch", "run", "--backend", "cpu", "--conv", "guarded", str(script)]
    subprocess.run(command, env=environ, check=True, timeout=60, capture_output=True)
    assert {row.label.split()[1] for row in Store(tmp_path / "cache").rows()} == {"1x2x6x6", "1x2x9x9"}
    # The parent's is gone with its clean end; the child's tells of the call that it was killed after.
    (left,) = (tmp_path / "cache" / "runs").glob("*.run")
    assert b"1x2x9x9" in left.read_bytes() and b"1x2x6x6" not in left.read_bytes()


def test_an_unusable_cache_costs_one_warning_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("in the way")
    _, answer, said = program(tmp_path, cache=tmp_path / "file" / "cache")
    assert set(answer["served"].values()) == {"native"}
    assert said.count("hint:") in (1, 2) and "ROCM_PATCH_CACHE_DIR" in said

"""The sandbox: real processes that crash, hang and lie, told apart, and nothing of them left."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import psutil
import pytest
import torch

from conftest import clean_environ, python
from rocm_patch.conv import IM2COL
from rocm_patch.conv.cases import CASES
from rocm_patch.conv.spec import DIRECTIONS, FORWARD, GRAD_INPUT, ConvSpec
from rocm_patch.trust import trial
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.sandbox import Sandbox

MARK = "SANDBOX_TEST_MARK"
QUICK = Limits(still=1.5, busy=2.5)
PATIENT = Limits(still=60.0, busy=60.0)
CASE = next(case for case in CASES if "every network" in case.why)
BAD = {
    "error": "error", "device": "crash", "segfault": "crash", "abort": "crash", "spin": "hang", "hang": "hang",
    "memory": "error", "nan": "wrong", "wrong": "wrong",
}  # fmt: skip
# torch 1.13 on the CPU: F.conv_transpose2d of bfloat16 refuses healthy shapes, and is wrong by its whole size for one
# channel and one filter.
TORCH_1 = torch.__version__.startswith("1.")
COMBINATIONS = [(kind, direction) for kind in BAD for direction in DIRECTIONS]


def marked(**extra):
    return clean_environ(**{MARK: uuid.uuid4().hex, **extra})


def prove(sandbox, direction=FORWARD, strategy="native", **options):
    return sandbox.prove(CASE.spec(direction).to_json(), strategy, **options)


def alive(environ):
    """Processes that a test's mark finds."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == environ[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def survivors(environ):
    """Command lines of those that are still there after a while."""
    deadline = time.monotonic() + 10
    while alive(environ) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [process.cmdline() for process in alive(environ)]


def trying(environ):
    """The process that tries things: the one whose parent is this test."""
    (child,) = [process for process in psutil.Process().children() if process in alive(environ)]
    return child


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def site(tmp_path, code):
    """An environment whose Python starts with this code."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code))
    return marked(PYTHONPATH=str(tmp_path))


@pytest.fixture(scope="module")
def healthy():
    environ = marked()
    with Sandbox("cpu", PATIENT, environ) as sandbox:
        yield sandbox, environ
    assert survivors(environ) == []


@pytest.fixture(scope="module")
def verdicts():
    """Every fault in every direction, each in a sandbox of its own, four at a time."""

    def one(kind, direction):
        environ = marked(ROCM_PATCH_FAULT=f"{kind}:{direction}")
        with Sandbox("cpu", QUICK, environ) as sandbox:
            result = prove(sandbox, direction), sandbox.device_usable
        return *result, survivors(environ)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = {key: pool.submit(one, *key) for key in COMBINATIONS}
    return {key: future.result() for key, future in futures.items()}


@pytest.mark.parametrize(("kind", "direction"), COMBINATIONS)
def test_each_fault_gets_its_verdict(verdicts, kind, direction):
    found, is_usable, left = verdicts[kind, direction]
    assert found.kind == BAD[kind]
    assert is_usable
    assert left == []
    words = {
        "error": "miopenStatusUnknownError", "device": "HIP error: an illegal memory access", "memory": "memory",
        "segfault": "killed by SIGSEGV in the call: Fatal Python error: Segmentation fault | File",
        "abort": "killed by SIGABRT in the call: Fatal Python error: Aborted | File",
        "spin": "in _spin |", "hang": "no progress for 2 s in the call: File", "nan": "nan or inf",
        "wrong": "relative error 0.1",
    }  # fmt: skip
    assert words[kind] in found.evidence
    assert "\n" not in found.evidence and len(found.evidence) < 2500
    assert found.calls == (1 if found.kind == "wrong" else 0)
    if kind == "wrong":
        assert found.error == pytest.approx(0.1, rel=0.01)
    if found.kind == "hang":
        assert QUICK.still < found.seconds < QUICK.busy + 3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("strategy", ["native", "im2col", "pointwise"])
def test_a_healthy_strategy_is_ok_and_one_process_serves_many(healthy, strategy, direction):
    sandbox, environ = healthy
    cases = [CASES[0], CASES[1]] if strategy == "pointwise" else [CASE, *CASES[-3:], CASES[10], CASES[14]]
    prove(sandbox)
    child = trying(environ)
    for case in cases:
        for dtype in ("float32", "float64", "bfloat16"):
            for channels_last in {False, len(case.image) > 3}:
                spec = case.spec(direction, dtype, "cpu", channels_last)
                found = sandbox.prove(spec.to_json(), strategy, calls=2)
                if (strategy, direction, dtype) == ("native", GRAD_INPUT, "bfloat16") and TORCH_1:
                    assert found.kind in ("error", "wrong"), (spec, found)
                    continue
                assert found.kind == "ok", (spec, found)
                assert found.calls == 2 and found.evidence == ""
                assert 0 <= found.error <= IM2COL.rtol[dtype]
                assert 0 < found.seconds < 1
    assert trying(environ) == child


def test_calls_end_with_their_number_or_their_time(healthy):
    sandbox, _ = healthy
    assert prove(sandbox, calls=7, seconds=60).calls == 7
    start = time.monotonic()
    assert 1 < prove(sandbox, calls=10**7, seconds=0.3).calls < 10**7
    assert time.monotonic() - start < 5
    assert prove(sandbox, calls=10**7, seconds=0).calls == 1


HUGE = ConvSpec(
    FORWARD, (1 << 20, 1 << 10, 64, 64), (1 << 10, 1 << 10, 3, 3), (1, 1), (1, 1), (1, 1), 1, (64, 64),
    "float32", "cpu",
)  # fmt: skip
NOTHING_TO_SAY = {
    "beyond memory": (HUGE.to_json(), "native", "GiB of memory"),
    "not a convolution": ("[]", "native", "no operands: not a convolution"),
    "not JSON": ("{", "native", "no operands: "),
    "nonsense in a convolution": (
        CASE.spec(FORWARD).to_json().replace("[4,5,", '["x",5,'),
        "native",
        "no operands: ",
    ),
    "no strategy": (CASE.spec(FORWARD).to_json(), "magic", "no strategy is called 'magic'"),
    "refused": (CASE.spec(FORWARD).to_json(), "pointwise", "pointwise does not serve it: the kernel has 9 taps"),
    "unknown type": (CASE.spec(FORWARD, "float8_e4m3fn").to_json(), "native", "no accuracy for float8_e4m3fn"),
}


@pytest.mark.parametrize("why", NOTHING_TO_SAY)
def test_where_nothing_can_be_said_it_says_why(healthy, why):
    sandbox, environ = healthy
    prove(sandbox)
    child = trying(environ)
    spec, strategy, evidence = NOTHING_TO_SAY[why]
    found = sandbox.prove(spec, strategy)
    assert found.kind == "unknown" and evidence in found.evidence
    assert prove(sandbox).kind == "ok"
    assert trying(environ) == child


def test_what_the_caller_did_wrong_is_an_error(healthy):
    spec = CASE.spec(FORWARD).to_json().replace('"groups":1', '"groups":3')
    assert healthy[0].prove(spec, "native").kind == "error"


def test_a_compilation_is_no_hang():
    environ = marked(ROCM_PATCH_FAULT="compile:forward:seconds=4")
    with Sandbox("cpu", Limits(still=1.5, busy=30.0), environ) as sandbox:
        found = prove(sandbox)
    assert found.kind == "ok" and found.seconds >= 4
    assert survivors(environ) == []


def test_a_compilation_without_end_is_one_and_its_compiler_goes_too():
    environ = marked(ROCM_PATCH_FAULT="compile:forward:seconds=300")
    with Sandbox("cpu", QUICK, environ) as sandbox:
        found = prove(sandbox)
        assert found.kind == "hang" and re.match(r"at work for \d s and not done in the call", found.evidence)
        names = [process.name() for process in alive(environ)]
        assert "clang" not in names
    assert survivors(environ) == []


def test_damage_by_an_earlier_trial_is_not_charged_to_a_later_one(tmp_path):
    # The process's second forward call crashes, whatever it is; the first works.
    environ = site(tmp_path, "import sys; print('old news', file=sys.stderr)")
    environ["ROCM_PATCH_FAULT"] = "segfault:forward:after=1"
    with Sandbox("cpu", PATIENT, environ) as sandbox:
        assert prove(sandbox).kind == "ok"
        first = trying(environ)
        assert prove(sandbox).kind == "ok"
        assert trying(environ) != first
        found = prove(sandbox, calls=2)  # by itself
        # What was said before this trial is no evidence.
        assert found.kind == "crash" and found.calls == 1
        assert found.evidence.startswith(
            "killed by SIGSEGV in the call: Fatal Python error: Segmentation fault | File"
        )
        assert prove(sandbox, GRAD_INPUT).kind == "ok"
        assert prove(sandbox, FORWARD, "im2col", calls=3).kind == "ok"  # faults are native's


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_who_is_killed_from_outside_is_not_convicted(number):
    environ = marked(ROCM_PATCH_FAULT="hang:forward")
    with Sandbox("cpu", PATIENT, environ) as sandbox, concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert prove(sandbox, GRAD_INPUT).kind == "ok"
        trial_of_hang = pool.submit(prove, sandbox)
        time.sleep(0.5)
        child = trying(environ)
        child.send_signal(number)
        found = trial_of_hang.result(timeout=30)
        assert found.kind == "unknown"
        assert f"killed by {signal.Signals(number).name} from outside in the call" in found.evidence
        if number == signal.SIGKILL:
            assert sandbox.device_usable
            assert prove(sandbox, GRAD_INPUT).kind == "ok"
    assert survivors(environ) == []


def test_descendants_go_also_those_that_left_the_group(tmp_path):
    environ = site(
        tmp_path,
        """
        import subprocess
        subprocess.Popen(["sleep", "300"])
        subprocess.Popen(["sleep", "301"], start_new_session=True)
        subprocess.Popen(["sleep", "302"], preexec_fn=lambda: __import__("os").setpgid(0, 0))
        print('{"phase": "result", "kind": "a lie"}', flush=True)
        """,
    )
    with Sandbox("cpu", PATIENT, environ) as sandbox:
        assert prove(sandbox).kind == "ok"
        sleeping = {process.cmdline()[1]: process for process in alive(environ) if process.name() == "sleep"}
        assert set(sleeping) == {"300", "301", "302"}
        # It goes before the user's processes when memory runs out, and leaves no core file.
        child = trying(environ)
        with open(f"/proc/{child.pid}/oom_score_adj", encoding="ascii") as score:
            assert score.read() == "1000\n"
        assert child.rlimit(psutil.RLIMIT_CORE)[0] == 0
    assert survivors(environ) == []


DRIVER = """
import os, sys, time
from rocm_patch.conv.cases import CASES
from rocm_patch.trust.progress import Limits
from rocm_patch.trust.sandbox import Sandbox
sandbox = Sandbox("cpu", Limits(60, 60), os.environ)
sandbox.prove(CASES[3].spec("grad_input").to_json(), "native")
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(300)
print("go", flush=True)
sandbox.prove(CASES[3].spec("forward").to_json(), "native")
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, "fork"])
def test_it_dies_with_the_process_that_it_belongs_to(ending):
    environ = marked(ROCM_PATCH_FAULT="compile:forward:seconds=300")
    command = [sys.executable, "-c", DRIVER, str(ending)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as owner:
        assert owner.stdout.readline() == "go\n"
        wait_for(lambda: any(process.name() == "clang" for process in alive(environ)))
        # A fork that holds the pipes open as well does not keep it alive.
        forks = [p for p in psutil.Process(owner.pid).children() if os.getpgid(p.pid) == os.getpgid(owner.pid)]
        assert len(forks) == (ending == "fork")
        owner.send_signal(signal.SIGKILL if ending == "fork" else ending)
        owner.wait(timeout=20)
        wait_for(lambda: set(alive(environ)) == set(forks))
        for fork in forks:
            fork.kill()
        assert ("KeyboardInterrupt" in owner.stderr.read()) == (ending == signal.SIGINT)


def test_it_outlives_the_thread_that_started_it(healthy):
    sandbox, environ = healthy
    sandbox.close()
    assert survivors(environ) == []
    thread = threading.Thread(target=prove, args=(sandbox,))
    thread.start()
    thread.join()
    child = trying(environ)
    time.sleep(0.2)
    assert prove(sandbox).kind == "ok"
    assert trying(environ) == child


def test_a_fork_leaves_its_parents_child_alone(healthy):
    sandbox, environ = healthy
    prove(sandbox)
    child = trying(environ)
    fork = os.fork()
    if fork == 0:
        os._exit(sandbox.close() is not None or prove(sandbox).kind != "ok" or sandbox.close() is not None)
    assert os.waitpid(fork, 0)[1] == 0
    assert prove(sandbox).kind == "ok"
    assert trying(environ) == child


def test_a_child_that_died_between_two_trials_is_nobodys_verdict(healthy):
    sandbox, environ = healthy
    prove(sandbox)
    child = trying(environ)
    child.send_signal(signal.SIGSEGV)
    wait_for(lambda: child.status() == psutil.STATUS_ZOMBIE)
    assert prove(sandbox).kind == "ok"
    assert trying(environ) != child


def test_what_cannot_be_killed_is_left_behind_and_counts_as_a_hang(caplog):
    environ = marked(ROCM_PATCH_FAULT="hang:forward")
    # No time to be gone after SIGKILL: as if the kernel held it.
    sandbox = Sandbox("cpu", QUICK, environ, kill_seconds=0)
    found = prove(sandbox)
    assert found.kind == "hang" and "and cannot be killed: the kernel holds it in the call" in found.evidence
    (held,) = sandbox.left_behind
    assert f"process {held} cannot be killed" in caplog.text and "hint: " in caplog.text
    assert prove(sandbox, GRAD_INPUT).kind == "ok"
    start = time.monotonic()
    sandbox.close()
    assert time.monotonic() - start < 1
    for pid in sandbox.left_behind:
        os.waitpid(pid, 0)
    assert survivors(environ) == []


BROKEN = {
    "does not import": ("raise ImportError('libamdhip64.so.5: cannot open')",
                        "does not start: ended with exit code 1: .*ImportError: libamdhip64.so.5: cannot open"),
    "crashes": ("import os; os.abort()", "does not start: killed by SIGABRT: Fatal Python error: Aborted"),
    "hangs": ("import time; time.sleep(300)", r"no sign of life from cpu within 2 s: File .*torch.__init__.py"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_torch_that_does_not_start_says_nothing_of_convolutions(broken, tmp_path):
    code, evidence = BROKEN[broken]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    environ = marked(PYTHONPATH=str(tmp_path))
    with Sandbox("cpu", PATIENT, environ, start_seconds=2 if broken == "hangs" else 60) as sandbox:
        first = prove(sandbox)
        assert first.kind == "unknown" and not sandbox.device_usable
        assert re.search(evidence, first.evidence), first.evidence
        start = time.monotonic()
        assert prove(sandbox).evidence == first.evidence
        assert time.monotonic() - start < 0.1
    assert survivors(environ) == []


def test_a_device_that_is_gone_after_a_fault_is_not_used_again(tmp_path):
    # torch starts once, as on a GPU that does not come back from a crash.
    environ = site(
        tmp_path,
        f"""
        import os
        if os.path.exists({str(tmp_path / "started")!r}):
            os._exit(7)
        open({str(tmp_path / "started")!r}, "w").close()
        """,
    )
    environ["ROCM_PATCH_FAULT"] = "segfault:forward"
    with Sandbox("cpu", PATIENT, environ, cool_down=0.5) as sandbox:
        start = time.monotonic()
        found = prove(sandbox)
        assert time.monotonic() - start > 0.5
        assert found.kind == "crash"
        assert found.evidence.endswith("afterwards: a process for cpu does not start: ended with exit code 7")
        assert not sandbox.device_usable
        assert prove(sandbox, GRAD_INPUT).kind == "unknown"
        assert "ended with exit code 7" in prove(sandbox, GRAD_INPUT).evidence
    (tmp_path / "started").unlink()
    with Sandbox("cpu", PATIENT, environ) as sandbox:
        assert prove(sandbox, GRAD_INPUT).kind == "ok"
        found = prove(sandbox)  # may be the first trial's damage
        assert found.kind == "unknown" and not sandbox.device_usable
        assert "exit code 7; before that: crash, killed by SIGSEGV in the call" in found.evidence


def test_a_device_and_a_python_that_do_not_exist():
    missing = "cuda:63"
    with Sandbox(missing, PATIENT, marked(), cool_down=0) as sandbox:
        found = prove(sandbox)
        assert found.kind == "unknown" and missing in found.evidence and not sandbox.device_usable
    with Sandbox("cpu", PATIENT, marked(), python="/nowhere/python") as sandbox:
        found = prove(sandbox)
        assert found.kind == "unknown" and not sandbox.device_usable
        assert found.evidence == "cannot start /nowhere/python: No such file or directory"


def test_one_wrong_element_among_many_is_seen():
    spec = CASE.spec(FORWARD)
    first, second = trial._operands(spec)
    result = IM2COL.run(spec, first, second, 1 << 20)
    assert trial._judge(spec, IM2COL, first, second, [result]).kind == "ok"
    seen = set()
    for index in range(0, result.numel(), 97):
        spoilt = result.clone()
        spoilt.view(-1)[index] += 0.1
        seen.add(trial._judge(spec, IM2COL, first, second, [result, spoilt]).kind)
    assert seen == {"wrong"}


def test_a_wrong_reference_convicts_nobody():
    spec = CASE.spec(FORWARD)
    first, second = trial._operands(spec)
    exact = IM2COL.run(spec, first, second, 1 << 20).double()
    assert trial._accuse(spec, first, second, exact * 1.1, 0.1, 1e-5).kind == "unknown"


def test_the_parents_side_needs_no_torch():
    python("-c", "import rocm_patch.trust.sandbox, sys; assert 'torch' not in sys.modules")

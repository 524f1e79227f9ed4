"""Failures on purpose: each kind is what it says, meets its direction only, and waits as long as it is told to."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from conftest import clean_environ
from rocm_patch.conv.spec import DIRECTIONS, FORWARD, GRAD_INPUT
from rocm_patch.errors import UsageError
from rocm_patch.trust import fault


def ones():
    return torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", fault.KINDS)
def test_other_directions_and_the_first_calls_work(kind):
    parsed = fault.parse(f"{kind}:grad_input:after=2")
    for direction in (*DIRECTIONS, GRAD_INPUT):
        assert torch.equal(parsed.around(direction, ones), ones())
    assert (parsed.met, parsed.after) == (0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "explode:forward", "error", "error:", "error:backward", ":forward", "error:forward:after",
        "error:forward:after=", "error:forward:after=-1", "error:forward:after=x", "error:forward:soon=1",
        "error:forward:after=1:after=2", "error:forward:seconds=3", "compile:forward:seconds=³", "error:forward:",
    ],
)  # fmt: skip
def test_what_names_no_fault_is_refused(text):
    with pytest.raises(UsageError, match="hint: ROCM_PATCH_FAULT=kind") as caught:
        fault.parse(text)
    assert all(kind in str(caught.value) for kind in fault.KINDS)


def test_no_text_is_no_fault():
    assert fault.parse(None) is None
    assert fault.parse("") is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [("error", "miopenStatusUnknownError"), ("device", "HIP error: "), ("memory", "allocate memory|out of memory")],
)
def test_what_torch_would_raise(kind, message):
    parsed = fault.parse(f"{kind}:forward:after=1")
    parsed.around(FORWARD, ones)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            parsed.around(FORWARD, ones)
    assert parsed.met == 2


def test_wrong_results_look_like_right_ones():
    nan = fault.parse("nan:forward").around(FORWARD, ones)
    wrong = fault.parse("wrong:forward").around(FORWARD, ones)
    assert bool(nan.isnan().all())
    assert torch.equal(wrong, ones() * 1.1)
    for result in (nan, wrong):
        assert (result.shape, result.dtype, result.stride()) == (ones().shape, ones().dtype, ones().stride())
    halves = fault.parse("wrong:forward").around(FORWARD, lambda: ones().to(torch.bfloat16))
    assert halves.dtype == torch.bfloat16


def test_compiling_takes_its_time_in_a_child_and_leaves_nothing():
    code = (
        "import torch; from rocm_patch.trust import fault; parsed = fault.parse('compile:forward:seconds=2')\n"
        "print('go', flush=True); print(parsed.around('forward', lambda: torch.ones(2)).sum().item())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=clean_environ()
    ) as busy:
        assert busy.stdout.readline() == "go\n"
        start = time.monotonic()
        time.sleep(1)
        (compiler,) = psutil.Process(busy.pid).children()
        assert compiler.name() == "clang"
        assert sum(compiler.cpu_times()[:2]) > 0.1
        assert busy.stdout.readline() == "2.0\n"
        assert time.monotonic() - start > 1.5
    assert not compiler.is_running()


@pytest.mark.alone  # how much of a processor it gets is looked at
@pytest.mark.parametrize(("kind", "least", "most"), [("spin", 0.4, 1.5), ("hang", 0.0, 0.3)])
def test_what_never_returns_takes_the_processor_or_does_not(kind, least, most):
    code = (
        "import torch, threading, time; from rocm_patch.trust import fault\n"
        "parsed = fault.parse('KIND:forward')\n"
        "threading.Thread(target=lambda: (time.sleep(1), print('other threads go on', flush=True))).start()\n"
        "print('go', flush=True); parsed.around('forward', lambda: torch.ones(2)); print('returned')"
    ).replace("KIND", kind)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean_environ()
    ) as stuck:
        try:
            assert stuck.stdout.readline() == "go\n"
            before, start = sum(psutil.Process(stuck.pid).cpu_times()[:2]), time.monotonic()
            assert stuck.stdout.readline() == "other threads go on\n"
            time.sleep(0.5)
            share = (sum(psutil.Process(stuck.pid).cpu_times()[:2]) - before) / (time.monotonic() - start)
            assert least <= share <= most
            if kind == "spin":  # Ctrl-C does not get through
                stuck.send_signal(signal.SIGINT)
                time.sleep(0.5)
                assert stuck.poll() is None
        finally:
            stuck.kill()
        assert "returned" not in stuck.stdout.read()

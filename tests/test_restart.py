"""`rocm-patch run --restart` as a shell sees it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import clean_environ, rocm_patch
from rocm_patch.trust.store import Store

CONV = "import torch, torch.nn.functional as F\ntorch.set_num_threads(1)\n"


def run(tmp_path, script, *options, fault=None, **environ):
    """The script under `run --restart`, guarded on the CPU."""
    path = tmp_path / "train.py"
    path.write_text(script)
    if fault is not None:
        environ["ROCM_PATCH_FAULT"] = fault
    environ.setdefault("ROCM_PATCH_HANG_LIMIT", "2")
    return rocm_patch(
        "run", "--restart", "--backend", "cpu", "--conv", "guarded", *options, str(path), "an argument", check=False,
        ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"), **environ,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os._exit(75)", 75),  # the watchdog's code, from a program that uses it itself
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("import os; os.abort()", 134),
        ("import ctypes; ctypes.string_at(0)", 139),
    ],
)
def test_other_ends_are_the_programs_own(tmp_path, script, code):
    done = run(tmp_path, f"print('once', flush=True)\n{script}")
    assert done.returncode == code and done.stdout == "once\n" and "again" not in done.stderr


def test_a_crash_outside_convolutions_of_a_program_that_has_some(tmp_path):
    """The last convolution is under suspicion, the program is started again, and crashes by itself: no more then."""
    call = "F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3))\n"
    done = run(tmp_path, CONV + call + call + "import os; os.abort()")
    assert done.returncode == 134
    assert done.stderr.count("starting it again on the bypass") == 1
    assert not [row for row in Store(tmp_path / "cache").rows() if row.verdict.is_bad]


def test_arguments_stdin_and_streams_are_the_programs(tmp_path):
    path = tmp_path / "echo.py"
    path.write_text("import sys; print(sys.argv[1:], sys.stdin.read()); print('err', file=sys.stderr)")
    done = rocm_patch("run", "--restart", "-q", str(path), "a", "--b", input="typed")
    assert done.stdout == "['a', '--b'] typed\n" and done.stderr == "err\n"


def test_a_script_from_stdin_cannot_be_started_again():
    done = rocm_patch("run", "--restart", "-", input="print(1)", check=False)
    assert done.returncode == 2 and "hint: put it into a file" in done.stderr


def test_a_command_that_cannot_be_started(tmp_path):
    path = tmp_path / "not-executable"
    path.write_text("#!/nowhere\n")
    path.chmod(0o755)
    done = rocm_patch("run", "--restart", "--", str(path), check=False)
    assert done.returncode == 2 and "cannot run" in done.stderr and "hint:" in done.stderr


def test_a_crash_in_a_convolution_is_followed_by_a_run_on_the_bypass(tmp_path):
    script = CONV + (
        "import os, sys\n"
        "print(os.environ['ROCM_PATCH_CONV'], sys.argv[1], flush=True)\n"
        "print(float(F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)).sum()))"
    )
    done = run(tmp_path, script, fault="segfault:forward")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "guarded an argument\nbypass an argument\n486.0\n"
    assert "the program crashed (SIGSEGV); its last convolution was native of forward 1x2x5x5" in done.stderr
    (row,) = Store(tmp_path / "cache").rows()
    assert row.verdict.kind == "crash" and "Segmentation fault" in row.verdict.evidence
    assert list((tmp_path / "cache" / "runs").iterdir()) == []


def test_a_crash_in_a_worker_of_a_launcher(tmp_path):
    """torchrun and its like end with a code of their own when a worker crashes."""
    worker = tmp_path / "worker.py"
    worker.write_text(CONV + "print(float(F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)).sum()))")
    script = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, {str(worker)!r}]).returncode != 0)"
    done = run(tmp_path, script, fault="abort:forward")
    assert done.returncode == 0 and done.stdout == "486.0\n"
    assert "exit code 1, and a crash below it" in done.stderr


def test_a_lost_gpu_context_is_followed_by_a_run_on_the_bypass(tmp_path):
    script = CONV + "print(float(F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)).sum()))"
    done = run(tmp_path, script, fault="device:forward")
    assert done.returncode == 0 and done.stdout == "486.0\n" and "HIP error" in done.stderr
    assert "ended after a convolution failed (crash: native of forward" in done.stderr


def test_a_program_that_handles_the_error_is_left_alone(tmp_path):
    """It saves its work after a lost GPU context, and ends well: nothing is started again."""
    script = CONV + (
        "try:\n    F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3))\nexcept RuntimeError:\n    print('saved')"
    )
    done = run(tmp_path, script, fault="device:forward")
    assert done.returncode == 0 and done.stdout == "saved\n" and "again" not in done.stderr


def test_a_hang_ends_within_the_limit_and_five_seconds(tmp_path):
    script = CONV + (
        "import sys, time\n"
        "print(time.time(), flush=True)\n"
        "print(float(F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)).sum()))"
    )
    done = run(tmp_path, script, fault="hang:forward", ROCM_PATCH_HANG_LIMIT="3")
    assert done.returncode == 0, done.stderr
    first, second, result = map(float, done.stdout.split())
    assert result == 486 and "a convolution hangs" in done.stderr
    # Between the two starts lies the end of the first one, and the start of a Python with torch.
    assert 3 <= second - first <= 3 + 5 + 15


def test_signals_are_passed_on(tmp_path):
    path = tmp_path / "handles.py"
    path.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *a: print('usr1', flush=True))\n"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(5))\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    command = [sys.executable, "-m", "rocm_patch", "run", "--restart", str(path)]
    process = subprocess.Popen(command, env=clean_environ(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "usr1\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 5


def test_ctrl_c_reaches_the_program_once(tmp_path):
    """On a terminal the program gets the signal by itself; passed on as well, it would come twice."""
    import pty

    path = tmp_path / "handles.py"
    path.write_text(
        "import signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *a: got.append(1))\n"
        "print('ready', flush=True)\n"
        "while not got: time.sleep(0.05)\n"
        "time.sleep(1.5)\n"
        "print('got', len(got), flush=True)\n"
        "sys.exit(4)\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "rocm_patch", "run", "--restart", str(path)]
        os.execve(command[0], command, clean_environ())
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1024)
    os.write(terminal, b"\x03")
    while b"got 1" not in said and b"got 2" not in said:
        said += os.read(terminal, 1024)
    assert b"got 1" in said
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    os.close(terminal)


def test_the_program_does_not_outlive_a_killed_launcher(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "rocm_patch", "run", "--restart", str(path)]
    process = subprocess.Popen(command, env=clean_environ(), stdout=subprocess.PIPE, text=True)
    program = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(program, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it lives")

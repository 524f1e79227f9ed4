"""What counts as progress of a call that does not return."""

import signal
import subprocess
import sys
import time

import pytest

from conftest import clean_environ
from rocm_patch.trust.progress import Limits, Patience, caches

pytestmark = pytest.mark.torch_free

# Asks about itself, as the watchdog does, while its main thread does `{work}`; prints when it has lost patience.
WATCHER = """
import os, sys, threading, time
from pathlib import Path
from rocm_patch.trust.progress import Limits, Patience
patience = Patience(Limits({still}, {busy}), os.getpid(), [Path({folder!r})])
def ask():
    start = time.monotonic()
    while True:
        why = patience.lost(waits_for_gpu={waits})
        if why or time.monotonic() - start > {seconds}:
            print(why, flush=True); os._exit(0)
        time.sleep(0.1)
threading.Thread(target=ask).start()
print('ready', flush=True)
{work}
"""


def watch(work, tmp_path, still=1.0, busy=60.0, seconds=4.0, waits=False, during=lambda process: None):
    code = WATCHER.format(work=work, still=still, busy=busy, seconds=seconds, folder=str(tmp_path), waits=waits)
    process = subprocess.Popen([sys.executable, "-c", code], env=clean_environ(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    during(process)
    return process.stdout.readline().strip()


def test_a_call_that_sleeps_is_lost_after_the_limit(tmp_path):
    assert watch("time.sleep(60)", tmp_path).startswith("no progress for 1")


def test_a_call_that_computes_is_not_until_the_longer_limit(tmp_path):
    loop = "while True: pass"
    assert watch(loop, tmp_path) == "None"
    assert watch(loop, tmp_path, busy=2.0).startswith("at work for 2 s")


def test_computing_is_no_progress_while_the_gpu_is_waited_for(tmp_path):
    assert watch("while True: pass", tmp_path, waits=True).startswith("no progress")


def test_a_compiler_among_the_children_is_progress_and_other_children_are_not(tmp_path):
    compiler = tmp_path / "bin" / "clang-17"
    compiler.parent.mkdir()
    compiler.symlink_to("/bin/sh")
    child = "import subprocess; subprocess.run(['sh', '-c', 'while kill -0 $PPID; do :; done'], executable={!r})"
    assert watch(child.format(str(compiler)), tmp_path / "none") == "None"
    assert watch(child.format("/bin/sh"), tmp_path / "none").startswith("no progress")


def test_a_cache_that_grows_is_progress(tmp_path):
    grows = f"for n in range(100): time.sleep(0.3); Path({str(tmp_path)!r}, str(n)).write_text('kernel')"
    assert watch(grows, tmp_path) == "None"


@pytest.mark.parametrize("work", ["time.sleep(60)"])
def test_a_program_that_was_stopped_has_not_had_the_time(tmp_path, work):
    """Ctrl-Z for longer than the limit."""

    def stop(process):
        time.sleep(0.3)
        process.send_signal(signal.SIGSTOP)
        time.sleep(9)
        process.send_signal(signal.SIGCONT)

    # Of the nine seconds five count, which is less than the limit of seven.
    assert watch(work, tmp_path, still=7.0, seconds=9.6, during=stop) == "None"


def test_a_process_that_has_ended_makes_none():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    patience = Patience(Limits(0.3, 60.0), process.pid)
    deadline = time.monotonic() + 5
    while patience.lost() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_miopen_keeps_its_caches():
    found = caches({"HOME": "/home/ann", "MIOPEN_USER_DB_PATH": "/var/tmp/db"})
    assert [str(path) for path in found] == ["/var/tmp/db", "/home/ann/.cache/miopen", "/home/ann/.config/miopen"]
    assert caches({})[0].is_absolute()

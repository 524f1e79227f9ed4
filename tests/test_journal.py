"""What a process leaves behind when it dies, and what is made of it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import clean_environ
from rocm_patch.trust.fingerprint import Fingerprint
from rocm_patch.trust.journal import Call, Journal, host_and_boot, left_behind
from rocm_patch.trust.remains import settle
from rocm_patch.trust.store import Store, Verdict

pytestmark = pytest.mark.torch_free

MACHINE = Fingerprint("gfx1010", "10.3.0", "1.13.1+rocm5.2", "hip 5.2.2", "in-tree", "6.8.0")


def call(name="42x42", strategy="native"):
    return Call(MACHINE, f'{{"spec":"{name}"}}', f"forward {name}", strategy)


def child(body, folder, *, end=None, timeout=60):
    """A process that runs `body` with a journal in `folder`; its return code."""
    code = (
        "import os, signal, sys, time, ctypes\n"
        "from pathlib import Path\n"
        "from test_journal import call\n"
        "from rocm_patch.trust.journal import Journal\n"
        f"journal = Journal(Path({str(folder)!r}), 'launch-1')\n" + body
    )
    environ = clean_environ(PYTHONPATH=str(Path(__file__).parent), PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)
    if end is not None:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(end)
    process.communicate(timeout=timeout)
    return process.returncode


def test_a_clean_end_leaves_nothing(tmp_path):
    assert (
        child(
            "with journal.attempt(call()): pass\njournal.slots[0] = journal.number([call()])\njournal.close()",
            tmp_path,
        )
        == 0
    )
    assert list(tmp_path.iterdir()) == []


def test_the_unproven_call_in_flight_is_found_after_sigkill(tmp_path):
    body = "with journal.attempt(call()):\n    print('ready', flush=True); time.sleep(60)"
    assert child(body, tmp_path, end=signal.SIGKILL) == -signal.SIGKILL
    (remains,) = left_behind(tmp_path)
    assert remains.attempt == (call(),) and remains.proven == () and remains.launch == "launch-1"
    assert (remains.host, remains.boot) == host_and_boot() and remains.stack == ""
    assert list(tmp_path.iterdir()) == []


def test_the_last_proven_call_is_found_after_sigkill(tmp_path):
    body = (
        "numbers = [journal.number([call(str(n))]) for n in range(50)]\n"
        "assert numbers == list(range(1, 51)) and journal.number([call('3')]) == 4\n"
        "both = journal.number([call('a'), call('b')])\n"
        "for number in (*numbers, both): journal.slots[0] = number\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    child(body, tmp_path, end=signal.SIGKILL)
    (remains,) = left_behind(tmp_path)
    assert remains.attempt == () and remains.proven == (call("a"), call("b"))


def test_a_living_owner_is_left_alone(tmp_path):
    journal = Journal(tmp_path)
    with journal.attempt(call()):
        assert list(left_behind(tmp_path)) == []
        # Another process does not take it for dead either.
        body = (
            "from rocm_patch.trust.journal import left_behind\n"
            f"assert list(left_behind(Path({str(tmp_path)!r}))) == []\n"
            "journal.close()"
        )
        assert child(body, tmp_path) == 0
    assert journal.path.exists()
    journal.close()


def test_a_forked_child_neither_holds_the_lock_nor_writes_the_slot(tmp_path):
    body = (
        "here, there = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    journal.let_parent_have_faults(); journal.abandon()\n"
        "    os.write(there, b'.'); os.close(1); time.sleep(5); os._exit(0)\n"
        "os.read(here, 1)\n"
        "journal.slots[0] = journal.number([call()])\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    assert child(body, tmp_path, end=signal.SIGKILL) == -signal.SIGKILL
    assert [remains.proven for remains in left_behind(tmp_path)] == [(call(),)]


@pytest.mark.parametrize("content", [b"", b"\0" * 8192, b"\xff" * 5000, b"\x01" + b"\0" * 15 + b"{}" + b"\0" * 5000])
def test_a_torn_file_says_nothing_and_goes(tmp_path, content):
    (tmp_path / "x.run").write_bytes(content)
    assert list(left_behind(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_number_without_a_line_says_nothing(tmp_path):
    child("journal.slots[0] = 7\nprint('ready', flush=True); time.sleep(60)", tmp_path, end=signal.SIGKILL)
    (remains,) = left_behind(tmp_path)
    assert remains.proven == ()


def test_a_folder_that_is_not_there(tmp_path):
    assert list(left_behind(tmp_path / "none")) == []


def settled(folder):
    store = Store(folder / "store")
    found = settle(store, folder)
    known = store.get(MACHINE, call().spec, "native")
    return found, known, store.suspicion(MACHINE, call().spec, "native")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name
)
def test_whoever_was_merely_killed_is_a_suspicion_and_no_verdict(tmp_path, number):
    """The OOM killer, Ctrl-C, a scheduler's limit, torchrun that ends a sibling."""
    body = "with journal.attempt(call()):\n    print('ready', flush=True); time.sleep(60)"
    child(body, tmp_path, end=number)
    _, verdict, suspicion = settled(tmp_path)
    assert verdict is None
    if number == signal.SIGINT:  # Python's own end of the call: nothing is left
        assert suspicion is None
    else:
        assert "was running when its process disappeared" in suspicion


def crash_in(path, folder):
    """A process that dies by SIGSEGV in a function of a file `path`, while an unproven call is in flight."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import ctypes\ndef convolution(): ctypes.string_at(0)\n")
    body = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('m', {str(path)!r})\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "with journal.attempt(call()): m.convolution()"
    )
    return child(body, folder)


def test_a_stack_inside_the_convolution_is_evidence(tmp_path):
    runs = tmp_path / "runs"
    assert crash_in(tmp_path / "rocm_patch" / "conv" / "native.py", runs) == -signal.SIGSEGV
    _, verdict, suspicion = settled(runs)
    assert verdict.kind == "crash" and "Segmentation fault" in verdict.evidence and suspicion is None
    assert "native.py" in verdict.evidence


def test_a_stack_elsewhere_is_none(tmp_path):
    runs = tmp_path / "runs"
    assert crash_in(tmp_path / "users" / "own.py", runs) == -signal.SIGSEGV
    found, verdict, suspicion = settled(runs)
    assert verdict is None and "Segmentation fault" in suspicion and found[0].stack


def test_after_a_crash_elsewhere_every_proven_call_is_suspected(tmp_path):
    """A GPU's fault shows later than it is made, and in another thread: the last call need not be the one."""
    body = "for n in range(3): journal.slots[0] = journal.number([call(str(n))])\nos.abort()"
    assert child(body, tmp_path) == -signal.SIGABRT
    store = Store(tmp_path / "store")
    settle(store, tmp_path)
    assert [suspicion.label for suspicion in store.suspicions()] == ["forward 0", "forward 1", "forward 2"]
    assert store.rows() == []


def test_a_machine_that_went_down_in_an_unproven_call_convicts_it(tmp_path):
    body = "with journal.attempt(call()):\n    print('ready', flush=True); time.sleep(60)"
    child(body, tmp_path, end=signal.SIGKILL)
    (path,) = tmp_path.glob("*.run")
    host, boot = host_and_boot()
    if not host:
        pytest.skip("not on this machine: it has no /etc/machine-id")
    content = path.read_bytes()
    path.write_bytes(content.replace(boot.encode(), b"0" * len(boot)))
    _, verdict, _ = settled(tmp_path)
    assert verdict.kind == "crash" and "the machine went down" in verdict.evidence


def test_another_machines_boot_says_nothing(tmp_path):
    """A cache shared by a cluster: its job was killed there, and this machine was not even on."""
    body = "with journal.attempt(call()):\n    print('ready', flush=True); time.sleep(60)"
    child(body, tmp_path, end=signal.SIGKILL)
    (path,) = tmp_path.glob("*.run")
    host, boot = host_and_boot()
    content = path.read_bytes().replace(boot.encode(), b"0" * len(boot))
    path.write_bytes(content.replace(f'"host": "{host}"'.encode(), f'"host": "{"x" * len(host)}"'.encode()))
    _, verdict, suspicion = settled(tmp_path)
    assert verdict is None and suspicion


def test_a_new_good_verdict_ends_a_suspicion(tmp_path):
    body = "with journal.attempt(call()):\n    print('ready', flush=True); time.sleep(60)"
    child(body, tmp_path, end=signal.SIGKILL)
    store = Store(tmp_path / "store")
    settle(store, tmp_path)
    store.put(MACHINE, call().spec, call().label, "native", Verdict("ok", calls=128))
    assert store.suspicion(MACHINE, call().spec, "native") is None


def test_the_row_is_on_disk_before_the_call(tmp_path):
    """Power-cut model: in the order of system calls, row and number are written and synced before the call starts."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("not on this machine: strace is not installed")
    code = (
        "import os\nfrom pathlib import Path\nfrom test_journal import call\n"
        "from rocm_patch.trust.journal import Journal\n"
        f"journal = Journal(Path({str(tmp_path)!r}))\n"
        "with journal.attempt(call()): os.write(2, b'THE CALL')\n"
        "journal.close()"
    )
    trace = tmp_path / "trace"
    command = [
        strace,
        "-f",
        "-y",
        "-e",
        "trace=pwrite64,msync,fsync,write,rename",
        "-o",
        str(trace),
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(
        command, env=clean_environ(PYTHONPATH=str(Path(__file__).parent)), capture_output=True, text=True, timeout=120
    )
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("not on this machine: processes may not be traced")
    assert done.returncode == 0, done.stderr
    lines = trace.read_text().splitlines()

    def first(pattern, start=0):
        return next(i for i in range(start, len(lines)) if re.search(pattern, lines[i]))

    row = first(r"pwrite64\(.*\.run>.*machine")
    number = first(r"msync\(", row)
    synced = first(r"fsync\(\d+<.*\.run>\)\s*= 0", number)
    the_call = first(r"write\(2.*THE CALL")
    assert row < number < synced < the_call
    # The file's name is on disk as well, and what ends the attempt.
    assert first(rf"fsync\(\d+<{re.escape(str(tmp_path))}>\)\s*= 0") < row
    assert first(r"fsync\(\d+<.*\.run>\)\s*= 0", the_call) > the_call


def test_a_full_disk_refuses_the_journal_at_once(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("not on this machine: no file system can be mounted")
    try:
        with pytest.raises(OSError, match="No space"):
            Journal(mount / "runs")
        assert list((mount / "runs").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_that_fills_up_later_does_not_stop_an_attempt(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("not on this machine: no file system can be mounted")
    try:
        journal = Journal(mount / "runs")
        with pytest.raises(OSError, match="No space"):
            (mount / "filler").write_bytes(bytes(2 << 20))
        for n in range(100):
            with journal.attempt(call(str(n))):
                pass
        # Beyond the room that was taken at the start a call has no number, and nothing else happens.
        numbers = [journal.number([call("x" * 1000 + str(n))]) for n in range(400)]
        assert numbers[0] and numbers[-1] == 0
        journal.close()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_faulthandler_of_the_program_is_left_alone(tmp_path):
    body = (
        "import faulthandler\n"
        "journal.close()\nassert not faulthandler.is_enabled()\n"
        "faulthandler.enable()\n"
        f"again = Journal(Path({str(tmp_path)!r}))\nagain.close()\n"
        "assert faulthandler.is_enabled()"
    )
    assert child(body, tmp_path) == 0


def test_the_header_says_whose_it_was(tmp_path):
    journal = Journal(tmp_path)
    assert f'"pid": {os.getpid()}'.encode() in journal.path.read_bytes()
    journal.close()


def test_ever_new_shapes_fill_neither_the_file_nor_hide_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("rocm_patch.trust.journal.MOST_NUMBERS", 5)
    journal = Journal(tmp_path)
    assert [journal.number([call(str(n))]) for n in range(8)] == [1, 2, 3, 4, 5, 0, 0, 0]
    size = journal.path.stat().st_size
    for n in range(100):
        with journal.attempt(call(f"attempt {n}")):
            content = journal.path.read_bytes()
            assert f"attempt {n}".encode() in content and content[8] == 1
    assert journal.path.stat().st_size == size
    journal.close()

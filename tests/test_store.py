"""The verdict store: real processes on real files, and whatever happens to the files."""

import dataclasses
import json
import logging
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import clean_environ
from hammer import MACHINE, forked
from rocm_patch.trust.store import VERDICTS, Store, Verdict

pytestmark = pytest.mark.torch_free

HAMMER = Path(__file__).with_name("hammer.py")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def said():
    """The warnings so far, each a whole text."""
    texts, handler, logger = [], logging.Handler(), logging.getLogger("rocm_patch")
    handler.emit = lambda record: texts.append(record.getMessage())
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def put(store, spec, kind="ok", **values):
    return store.put(MACHINE, spec, f"label of {spec}", "native", Verdict(kind, **values))


def get(store, spec):
    return store.get(MACHINE, spec, "native")


def specs(store):
    return {row.spec for row in store.rows()}


def pragma(folder, name):
    connection = sqlite3.connect(folder / "verdicts.db")
    try:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]
    finally:
        connection.close()


def set_aside(folder):
    return [path.name for path in folder.iterdir() if ".corrupt-" in path.name]


def in_child(work):
    """Run something in a forked child; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


def other_process(folder, spec, kind="ok", check=True):
    """A put by a process that has nothing to do with this one."""
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_store as t\n"
    code += "assert t.put(t.Store(Path(sys.argv[2])), sys.argv[3], sys.argv[4])"
    arguments = [str(HAMMER.parent), str(folder), spec, kind]
    subprocess.run([sys.executable, "-c", code, *arguments], check=check, env=clean_environ(), timeout=60)


# What is kept


def test_reading_makes_nothing(folder, said):
    store = Store(folder)
    assert get(store, "a") is None and store.rows() == [] and store.hard(MACHINE, "native") == 0
    assert store.suspicion(MACHINE, "a", "native") is None and store.suspicions() == []
    assert store.acquit(MACHINE, "a", "native") and store.forget(MACHINE, "a", "native") and store.clear() == 0
    assert not folder.exists() and store.where == str(folder / "verdicts.db") and said == []


def test_a_verdict_comes_back_whole_in_another_process(folder):
    verdict = Verdict("crash", 1.25, 3e-7, 17, 1.7e9, "SIGSEGV\nat line 1\n\tgrüße \udcff and \0 bytes")
    store = Store(folder)
    assert store.put(MACHINE, "{spec}", "forward 1x2", "im2col", verdict)
    known = Store(folder).get(MACHINE, "{spec}", "im2col")
    assert dataclasses.replace(known, evidence="") == dataclasses.replace(verdict, evidence="")
    assert known.evidence == verdict.evidence.replace("\udcff", "?")
    (row,) = Store(folder).rows()
    assert (row.machine, row.spec, row.label, row.strategy) == (MACHINE, "{spec}", "forward 1x2", "im2col")
    assert row.verdict == known and known.is_hard and known.is_bad
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert put(store, "b") and math.isnan(get(store, "b").error) and math.isnan(get(Store(folder), "b").error)


@pytest.mark.parametrize(
    ("first", "second", "stands"),
    [
        (("ok", 3), ("crash", 1), "crash"),
        (("wrong", 1), ("ok", 99), "wrong"),
        (("hang", 1), ("ok", 99), "hang"),
        (("hang", 1), ("error", 1), "hang"),
        (("error", 1), ("crash", 1), "crash"),
        (("crash", 1), ("hang", 1), "hang"),
        (("ok", 3), ("ok", 2), 3),
        (("ok", 3), ("ok", 4), 4),
    ],
)
def test_which_of_two_verdicts_stands(folder, first, second, stands):
    for kind, calls in (first, second):
        # Each in a process of its own, so to speak: a store that remembers nothing.
        store = Store(folder)
        put(store, "a", kind, calls=calls)
        put(store, f"only to be there, {kind}")
    for known in (get(store, "a"), get(Store(folder), "a")):
        assert stands == (known.kind if isinstance(stands, str) else known.calls)
    in_memory = Store(folder.parent / "cache" / "verdicts.db")
    for kind, calls in (first, second):
        assert not put(in_memory, "a", kind, calls=calls)
    known = get(in_memory, "a")
    assert stands == (known.kind if isinstance(stands, str) else known.calls)


def test_suspicions(folder):
    store = Store(folder)
    assert store.suspect(MACHINE, "a", "label", "native", "died") and store.suspect(MACHINE, "b", "", "native", "too")
    other = Store(folder)
    assert other.suspicion(MACHINE, "a", "native") == "died" and other.suspicion(MACHINE, "a", "im2col") is None
    assert [(s.spec, s.label, s.evidence) for s in other.suspicions(MACHINE)] == [
        ("a", "label", "died"),
        ("b", "", "too"),
    ]
    assert put(other, "a") and store.suspicion(MACHINE, "a", "native") is None
    assert other.acquit(MACHINE, "b", "native") and store.suspicions() == []
    # Nobody suspects what is convicted.
    assert put(store, "c", "crash") and other.suspect(MACHINE, "c", "", "native", "died again")
    assert Store(folder).suspicion(MACHINE, "c", "native") is None and get(other, "c").kind == "crash"


def test_counting_taking_back_and_clearing(folder):
    store, other = Store(folder), Store(folder)
    elsewhere = dataclasses.replace(MACHINE, torch="2.13.0")
    for spec, kind in (("a", "crash"), ("b", "hang"), ("c", "error"), ("d", "ok"), ("e", "wrong")):
        put(store, spec, kind)
    other.put(MACHINE, "a", "", "im2col", Verdict("hang"))
    other.put(elsewhere, "a", "", "native", Verdict("hang"))
    other.suspect(elsewhere, "z", "", "native", "died")
    assert store.hard(MACHINE, "native") == 2 and other.hard(MACHINE, "im2col") == 1 == store.hard(
        elsewhere, "native"
    )
    assert other.forget(MACHINE, "a", "native") and store.hard(MACHINE, "native") == 1
    # What a process has seen for itself stays true for it, whatever others take back.
    assert get(Store(folder), "a") is None and get(store, "a").kind == "crash"
    assert put(other, "a") and get(Store(folder), "a").kind == "ok"
    assert store.clear(elsewhere) == 2 and other.rows(elsewhere) == [] and len(other.rows()) == 6
    assert store.clear(only_bad=True) == 4 and specs(other) == specs(store) == {"a", "d"}
    assert other.clear() == 2 and store.rows() == [] and get(Store(folder), "a") is None


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MACHINE)])
def test_a_verdict_holds_for_its_fingerprint_alone(folder, field):
    put(Store(folder), "a", "crash")
    changed = dataclasses.replace(MACHINE, **{field: getattr(MACHINE, field) + "1"})
    store = Store(folder)
    assert store.get(changed, "a", "native") is None and store.hard(changed, "native") == 0
    assert store.rows(changed) == [] and get(store, "a").kind == "crash"


# Others who use it


def test_two_stores_see_each_other_at_once(folder):
    one, two = Store(folder), Store(folder)
    for number in range(20):
        put((one, two)[number % 2], str(number), VERDICTS[number % 5])
        assert get((two, one)[number % 2], str(number)).kind == VERDICTS[number % 5]


def test_threads(folder, said):
    store = Store(folder)

    def work(number):
        for count in range(40):
            put(store, f"{number}.{count}", "error" if count % 10 == 0 else "ok")
            assert get(store, f"{number}.{count}") is not None

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    put(store, "last")
    assert specs(Store(folder)) == {f"{n}.{c}" for n in range(8) for c in range(40)} | {"last"} and said == []


def test_a_fork_shares_no_connection(folder, said):
    """SQLite's locks are the process's: a child that used its parent's would write past others."""
    store = Store(folder)
    put(store, "parent")
    come, go = os.pipe(), os.pipe()

    def child():
        assert put(store, "child") and get(store, "parent") is not None
        os.write(come[1], b"x")
        os.read(go[0], 1)
        # The parent has closed the file by now, and another process has used and closed it.
        assert put(store, "child, later", "crash") and get(store, "other") is not None

    pid = forked(child)
    os.read(come[0], 1)
    store.close()
    other_process(folder, "other")
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert put(store, "parent, later")
    assert specs(Store(folder)) == {"parent", "child", "other", "child, later", "parent, later"}
    assert pragma(folder, "integrity_check") == "ok" and said == []


def test_forks_while_threads_write(folder):
    # SQLite's waiting is not fair: threads that write without a pause can keep a child out for seconds.
    store, stop = Store(folder, wait=30), threading.Event()

    def work(number):
        count = 0
        while not stop.is_set():
            count += 1
            put(store, f"thread {number}.{count}", "error")

    threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
    [thread.start() for thread in threads]
    try:
        codes = [in_child(lambda n=n: put(store, f"child {n}", "crash") or os._exit(3)) for n in range(20)]
    finally:
        stop.set()
        [thread.join() for thread in threads]
    assert codes == [0] * 20
    put(store, "last")
    assert {f"child {n}" for n in range(20)} | {"last"} <= specs(Store(folder))
    assert pragma(folder, "integrity_check") == "ok"


def test_a_lock_that_stays_costs_twice_the_patience_and_nothing_is_lost(folder, said):
    store = Store(folder, wait=0.5)
    put(store, "before", "crash")
    holder = sqlite3.connect(folder / "verdicts.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    assert not put(store, "first", "hang")
    assert 0.4 < time.monotonic() - start < 1.5
    for number in range(8):
        assert not put(store, str(number))
    # Half as long each time, and at least 0.05 s: 0.5 + 0.25 + 0.125 + 0.0625 + 5 x 0.05, and what else runs here.
    assert time.monotonic() - start < 3
    assert get(store, "first").kind == "hang" and store.hard(MACHINE, "native") == 2
    assert len(said) == 1 and "hint:" in said[0] and store.where == str(folder / "verdicts.db")
    holder.execute("ROLLBACK")
    assert put(store, "after")
    assert specs(Store(folder)) == {"before", "first", "after", *map(str, range(8))}
    holder.close()


def test_a_file_that_nobody_may_even_read_blocks_nobody(folder):
    first = Store(folder, wait=0.4)
    put(first, "a")
    first.close()
    holder = sqlite3.connect(folder / "verdicts.db", isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    store, start = Store(folder, wait=0.4), time.monotonic()
    assert get(store, "a") is None and not put(store, "b", "crash") and get(store, "b").kind == "crash"
    assert time.monotonic() - start < 2.5
    # Nor does one that had it open before take it for damaged.
    assert not put(first, "d", "hang") and get(first, "d").kind == "hang"
    holder.close()
    assert put(store, "c") and put(first, "e") and specs(Store(folder)) == set("abcde") and not set_aside(folder)


def test_entries_that_could_not_be_written_are_written_at_the_end(folder):
    code = (
        "import os, sqlite3, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_store as t\n"
        "folder = Path(sys.argv[2]); store = t.Store(folder, wait=0.1); t.put(store, 'a')\n"
        "holder = sqlite3.connect(folder / 'verdicts.db', isolation_level=None); holder.execute('BEGIN IMMEDIATE')\n"
        "assert not t.put(store, 'b', 'crash'); holder.execute('ROLLBACK'); holder.close()"
    )
    arguments = [str(HAMMER.parent), str(folder)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=clean_environ(), timeout=60)
    assert specs(Store(folder)) == {"a", "b"}


# What happens to the files


def filled(folder, count=60):
    store = Store(folder)
    for number in range(count):
        put(store, str(number), VERDICTS[number % 5], when=1e9 + number, evidence=f"evidence {number} " * 9)
    store.close()
    return folder / "verdicts.db"


@pytest.mark.parametrize(
    "offset", [0, 16, 18, 19, 20, 24, 28, 32, 44, 52, 56, 96, 100, 105, 110, 3000, 4096, 4101, 9000]
)
@pytest.mark.parametrize("size", [1, 4, 700])
def test_damage_anywhere(folder, said, offset, size):
    path = filled(folder)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(random.Random(offset).randbytes(size))
    store = Store(folder)
    for number in range(0, 60, 7):
        known = get(store, str(number))
        assert known is None or known.kind in VERDICTS
    store.rows(), store.hard(MACHINE, "native")
    covers_version = offset <= 60 < offset + size
    if covers_version:  # then it looks as if a newer rocm-patch had written it, or one that wrote nothing
        assert put(store, "new", "crash") or store.where == "memory"
        return
    assert put(store, "new", "crash")
    aside = set_aside(folder)
    again = Store(folder)
    assert get(again, "new").kind == "crash" and (pragma(folder, "integrity_check") == "ok" or not aside)
    assert len(said) <= 1 and bool(aside) == bool(said)
    assert all("hint: rocm-patch cache clear --all" in text for text in said)


@pytest.mark.parametrize("offset", [0, 18, 44, 100])
def test_damage_that_cannot_be_overlooked(folder, said, offset):
    path = filled(folder)
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = b"\xff" * 40
    if offset < 60:
        content[60:64] = (1).to_bytes(4, "big")
    path.write_bytes(content)
    store = Store(folder)
    assert get(store, "1") is None and put(store, "new", "crash") and specs(Store(folder)) == {"new"}
    (aside,) = set_aside(folder)
    assert (folder / aside).read_bytes() == content and len(said) == 1 and aside in said[0]


@pytest.mark.parametrize("length", [1, 99, 100, 4096, 5000, 9000])
def test_a_file_cut_short(folder, length):
    path = filled(folder)
    os.truncate(path, length)
    store = Store(folder)
    assert [get(store, str(number)) for number in range(60)] and put(store, "new", "hang")
    assert get(Store(folder), "new").kind == "hang" and pragma(folder, "integrity_check") == "ok"


def test_many_find_the_damage_at_once(folder):
    path = filled(folder)
    path.write_bytes(b"no database" * 1000)
    ready = os.pipe()

    def child(number):
        os.read(ready[0], 1)
        assert put(Store(folder, wait=20), str(number), "error")

    children = [forked(lambda number=number: child(number)) for number in range(12)]
    os.write(ready[1], b"x" * 12)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 12
    assert specs(Store(folder)) == set(map(str, range(12)))
    assert len(set_aside(folder)) == 1


def test_a_newer_schema_is_left_alone(folder, said):
    path = filled(folder)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA user_version=2")
    connection.close()
    before = path.read_bytes()
    store = Store(folder)
    assert get(store, "1") is None and not put(store, "new", "crash") and get(store, "new").kind == "crash"
    assert store.where == "memory" and store.hard(MACHINE, "native") == 1 and store.clear() == 1
    store.close()
    assert path.read_bytes() == before and len(said) == 1 and "newer" in said[0] and "ROCM_PATCH_CACHE_DIR" in said[0]


@pytest.mark.parametrize("place", ["folder", "file", "under a file"])
def test_something_else_in_its_place(tmp_path, said, place):
    folder = tmp_path / "cache"
    if place == "file":
        (folder / "verdicts.db").mkdir(parents=True)
    else:
        folder.write_text("mine")
        folder = folder / "below" if place == "under a file" else folder
    store = Store(folder, wait=0.3)
    for number in range(3):
        assert not put(store, str(number), "crash") and get(store, str(number)).kind == "crash"
    assert store.where == "memory" and specs(store) == {"0", "1", "2"}
    assert len(said) == 1 and "hint:" in said[0] and "ROCM_PATCH_CACHE_DIR" in said[0]
    # And once the place is free, all of it is written.
    if place == "file":
        (folder / "verdicts.db").rmdir()
    else:
        (tmp_path / "cache").unlink()
    assert put(store, "3") and specs(Store(folder)) == {"0", "1", "2", "3"} and store.where != "memory"


def test_where_write_ahead_logging_cannot_work(folder, said):
    (folder / "verdicts.db-shm").mkdir(parents=True)
    store = Store(folder)
    assert put(store, "a", "crash") and put(Store(folder), "b") and specs(store) == {"a", "b"}
    assert pragma(folder, "journal_mode") == "delete" and said == []


def test_the_folder_is_deleted_underneath(folder, said):
    one, two = Store(folder), Store(folder)
    put(one, "a", "crash"), put(two, "b", "hang")
    shutil.rmtree(folder)
    assert get(one, "a").kind == "crash" and one.hard(MACHINE, "native") == 1 and not folder.exists()
    assert put(one, "c") and specs(Store(folder)) == {"a", "c"}
    # The other has not written since; it still knows.
    assert get(two, "b").kind == "hang" and get(two, "a").kind == "crash"
    assert put(two, "d") and specs(Store(folder)) == {"a", "b", "c", "d"} == specs(one) and said == []


def test_a_file_that_took_a_deleted_ones_inode_is_another_file(folder):
    """As if it had been cleared by somebody: what this process knows would be thought forgotten."""
    for n in range(5):
        store, other = Store(folder), Store(folder)
        put(store, f"mine {n}", "hang")
        store.close()
        shutil.rmtree(folder)
        put(other, f"another's {n}")
        other.close()
        assert get(store, f"mine {n}").kind == "hang"
        assert specs(Store(folder)) >= {f"another's {n}"}


@pytest.mark.parametrize("gone", [["-wal"], ["-shm"], ["-wal", "-shm"]])
def test_its_journal_is_deleted_underneath(folder, gone):
    """Two processes would write past each other: one into a journal that nobody else finds."""
    store = Store(folder)
    put(store, "a", "crash")
    for name in gone:
        (folder / f"verdicts.db{name}").unlink()
    # It may find nothing that it could read now; the next use by those that have the old journal open mends it.
    other_process(folder, "b", "hang", check=False)
    assert put(store, "c") and get(store, "c") is not None
    other_process(folder, "d", "hang")
    assert {"a", "c", "d"} <= specs(Store(folder)) and pragma(folder, "integrity_check") == "ok"


def test_its_file_is_moved_away_underneath(folder):
    store = Store(folder)
    put(store, "a", "crash")
    (folder / "verdicts.db").rename(folder / "elsewhere.db")
    other_process(folder, "b")
    assert put(store, "c") and specs(Store(folder)) == {"a", "b", "c"}


def test_killed_while_it_is_made(tmp_path):
    for number in range(40):
        folder = tmp_path / str(number)
        child = forked(lambda folder=folder: put(Store(folder), "a", "crash"))
        time.sleep(number * 0.0004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = Store(folder)
        assert put(store, "b", "hang") and {"b"} <= specs(Store(folder)) <= {"a", "b"}
        assert not set_aside(folder)
        store.close()


def test_what_is_bad_is_on_disk_before_put_returns(folder):
    """By the order of the system calls: a power cut after `put` must not lose a crash; a lost ok costs a check."""
    if shutil.which("strace") is None:
        pytest.skip("not on this machine: strace")
    code = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_store as t\n"
        "store = t.Store(Path(sys.argv[2])); t.put(store, 'first')\n"
        "for kind in t.VERDICTS: os.write(1, kind.encode()); t.put(store, kind, kind)\n"
        "os.write(1, b'end'); os._exit(0)"
    )
    trace = folder.with_name("trace")
    subprocess.run(
        ["strace", "-f", "-o", trace, "-e", "trace=write,pwrite64,fsync,fdatasync", sys.executable, "-c", code,
         HAMMER.parent, folder],
        check=True, env=clean_environ(), stdout=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    calls = [line.split(None, 1)[1] for line in trace.read_text().splitlines()]
    marks = [
        next(i for i, call in enumerate(calls) if call.startswith(f'write(1, "{word}"'))
        for word in (*VERDICTS, "end")
    ]
    for kind, start, stop in zip(VERDICTS, marks, marks[1:]):  # noqa: B905  (one mark more)
        during = [call.partition("(")[0] for call in calls[start + 1 : stop]]
        assert "pwrite64" in during
        # The last thing is the sync, after all that was written.
        assert (during[-1] in ("fsync", "fdatasync")) == (kind != "ok"), (kind, during)


# The acceptance: processes killed at random moments


def hammered(tmp_path, mode, processes, seconds, wait=2.0):
    """The report of `hammer.py` after what holds for every mode has been checked."""
    command = [sys.executable, HAMMER, tmp_path / "cache", tmp_path / "logs", mode, processes, seconds, wait]
    if mode in ("full", "readonly"):
        command = ["unshare", "--map-root-user", "--mount", *command]
        try:
            subprocess.run([*command[:3], "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"not on this machine: a mount namespace of one's own ({error})")
    done = subprocess.run(
        [str(word) for word in command], env=clean_environ(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["integrity"] == "ok", report
    assert report["missing"] == report["unput"] == [] and report["lost"] == 0, report
    assert report["kills"] > seconds * 5 and report["saved"] > seconds * 10, report
    assert set(report["codes"]) == {0} and report["finals"] == len(report["codes"]), report
    # Beyond its patience a call pays for the last nap of SQLite's busy handler (0.1 s) and for what it does once it
    # has the lock: up to four syncs (journal, folder, file at a checkpoint, journal again) and the wait for a
    # processor after each. What one of these costs on this machine at this time is measured beside it.
    assert report["slowest"] < wait + 0.3 + 5 * report["clock"], report
    return report


@pytest.mark.alone
def test_64_processes_killed_at_random_for_a_minute(tmp_path):
    report = hammered(tmp_path, "plain", 64, 60)
    # The last kills, of up to 64 survivors, are followed by the check that `hammered` looks at.
    assert report["set_aside"] == 0 and report["checks"] >= (report["kills"] - 64) // 200 > 0, report


@pytest.mark.alone
def test_the_same_with_the_folder_deleted_underneath(tmp_path):
    assert hammered(tmp_path, "deleted", 16, 8)["troubles"] > 3


@pytest.mark.alone
def test_the_same_with_the_disk_full(tmp_path):
    report = hammered(tmp_path, "full", 16, 8)
    assert report["troubles"] > 1 and report["unsaved"] > 0 and report["set_aside"] == 0, report
    assert any("full" in text for text in report["warnings"]), report


@pytest.mark.alone
def test_the_same_with_the_folder_made_read_only(tmp_path):
    report = hammered(tmp_path, "readonly", 16, 8)
    assert report["troubles"] > 1 and report["unsaved"] > 0 and report["set_aside"] == 0, report
    assert any("cannot be written" in text for text in report["warnings"]), report


def test_a_read_only_folder_can_be_read(tmp_path):
    """A cache that a container gets read-only: what is known there counts."""
    folder = tmp_path / "cache"
    filled(folder)
    code = (
        "import sys, os, subprocess; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import test_store as t\n"
        "folder = Path(sys.argv[2]); do = lambda *words: subprocess.run(['mount', *words], check=True)\n"
        "do('--bind', folder, folder); do('-o', 'remount,bind,ro', folder); os.chdir('/'); store = t.Store(folder)\n"
        "assert t.get(store, '3').kind == 'hang' and len(store.rows()) == 60 and store.where != 'memory'\n"
        "assert not t.put(store, 'new', 'crash') and t.get(store, 'new').kind == 'crash' and len(store.rows()) == 61"
    )
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", code, str(HAMMER.parent), str(folder)]
    try:
        subprocess.run([*command[:3], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not on this machine: a mount namespace of one's own ({error})")
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert specs(Store(folder)) == set(map(str, range(60)))


def test_no_write_ahead_logging_on_a_network_folder(tmp_path):
    """The mount table is what the kernel shows this one process, with the folder's line replaced."""
    folder = tmp_path / "cache"
    table = tmp_path / "mounts"
    table.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\n")
    code = (
        "import sys, os, subprocess; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import test_store as t\n"
        "subprocess.run(['mount', '--bind', sys.argv[3], f'/proc/{os.getpid()}/mounts'], check=True)\n"
        "folder = Path(sys.argv[2]); store = t.Store(folder); assert t.put(store, 'a', 'crash')\n"
        "assert t.get(t.Store(folder), 'a').kind == 'crash' and not (folder / 'verdicts.db-wal').exists()"
    )
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", code, HAMMER.parent, folder, table]
    try:
        subprocess.run([*command[:3], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not on this machine: a mount namespace of one's own ({error})")
    done = subprocess.run(
        [str(word) for word in command], env=clean_environ(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert pragma(folder, "journal_mode") == "delete" and specs(Store(folder)) == {"a"}

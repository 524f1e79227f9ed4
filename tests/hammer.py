"""Many processes on one verdict store, killed at random moments, while its folder is in trouble; for test_store.py.

python tests/hammer.py FOLDER LOGS MODE PROCESSES SECONDS WAIT prints one JSON document. MODE is plain, deleted, full
or readonly; the last two mount something over FOLDER and need a mount namespace in which that is allowed.
"""

import ctypes
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from rocm_patch.trust.fingerprint import Fingerprint
from rocm_patch.trust.store import VERDICTS, Store, Verdict

MACHINE = Fingerprint("gfx1010", "", "1.13.1", "hip 5.2", "in-tree", "6.8")
STRATEGY = "native"
SHARED = 40
FINAL_SECONDS = 15


def kind_of(spec):
    return VERDICTS[sum(spec.encode()) % len(VERDICTS)]


def proof(spec, kind):
    """What only somebody who has put this very verdict would know."""
    return f"{kind} of {spec}, " * 12


class Worker:
    """One process: puts, gets, and a log of what it was told is on disk."""

    def __init__(self, number, folder, logs, mode, wait):
        self.number, self.folder, self.mode, self.wait = number, folder, mode, wait
        self.log = os.open(logs / str(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.slowest, self.stops = 0.0, False
        handler = logging.Handler()
        handler.emit = lambda record: self.tell("warned", record.getMessage().partition("\n")[0])
        logging.getLogger("rocm_patch").handlers[:] = [handler]
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stops", True))
        self.store = Store(folder, wait)
        self.random = random.Random(number)

    def tell(self, *words):
        os.write(self.log, (" ".join(map(str, words)) + "\n").encode())

    def timed(self, call, *arguments):
        start = time.monotonic()
        result = call(*arguments)
        seconds = time.monotonic() - start
        if seconds > self.slowest:
            self.slowest = seconds
            self.tell("slow", seconds, call.__name__)
        return result

    def put(self, spec, kind, calls=1):
        verdict = Verdict(kind, 0.5, 1e-6, calls, 1e9, proof(spec, kind))
        self.tell("putting", spec, kind)
        saved = self.timed(self.store.put, MACHINE, spec, f"label of {spec}", STRATEGY, verdict)
        self.tell("saved" if saved else "unsaved", spec, kind)

    def run(self):
        count, mine = 0, []
        while not self.stops:
            count += 1
            spec = f"{self.number}.{count}"
            self.put(spec, kind_of(spec))
            mine.append(spec)
            shared = f"shared.{self.random.randrange(SHARED)}"
            kind = "crash" if self.random.random() < 0.02 else "ok"
            self.put(shared, kind, self.random.randrange(1, 100))
            earlier = self.random.choice(mine)
            known = self.timed(self.store.get, MACHINE, earlier, STRATEGY)
            if known is None or known.kind != kind_of(earlier) or known.evidence != proof(earlier, known.kind):
                self.tell("lost", earlier, known)
            if count % 5 == 0:
                self.timed(self.store.suspect, MACHINE, f"dead.{self.number}", "", STRATEGY, "died")
                self.timed(self.store.hard, MACHINE, STRATEGY)
            if count % 20 == 0:
                self.timed(self.store.close)
                if self.mode == "plain":
                    self.store = Store(self.folder, self.wait)
            time.sleep(self.random.random() * 0.02)
        # The trouble is over: what was in memory alone goes into the file with the next entry.
        end = time.monotonic() + FINAL_SECONDS
        while time.monotonic() < end:
            if self.timed(
                self.store.put, MACHINE, f"final.{self.number}", "", STRATEGY, Verdict("ok", evidence="end")
            ):
                self.tell("final")
                return


def forked(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody outlives the one who started it
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def clock(folder, log):
    """What waiting costs here without any store: the longest that a nap and a sync took beyond the nap."""
    worst, told = 0.0, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(folder / "clock", "wb", buffering=0) as file:
        while True:
            start = time.monotonic()
            time.sleep(0.02)
            file.write(b"x")
            os.fsync(file.fileno())
            worst = max(worst, time.monotonic() - start - 0.02)
            os.write(told, f"{worst}\n".encode())


class Trouble:
    """What happens to the folder; `step` is called all the time."""

    def __init__(self, folder, mode):
        self.folder, self.mode, self.next, self.is_on, self.times = folder, mode, time.monotonic() + 1, False, 0
        if mode == "full":
            _do("mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", folder)

    def step(self):
        if self.mode == "plain" or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + random.uniform(0.3, 0.9)
        if self.is_on:
            self.end()
        else:
            self.times += 1
            self.is_on = self.begin()

    def begin(self):
        if self.mode == "deleted":
            # As `rm -r` does it: by the names that it has read, one after another, whatever comes back meanwhile.
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        if self.mode == "full":
            with suppress(OSError), open(self.folder / "ballast", "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        else:
            # Files that are open stay writable, as they do after chmod; whoever opens anew finds it read-only.
            side = self.folder.with_name("side")
            side.mkdir(exist_ok=True)
            _do("mount", "--bind", self.folder, side)
            _do("mount", "-o", "remount,bind,ro", side)
            _do("mount", "--move", side, self.folder)
        return True

    def end(self):
        if not self.is_on:
            return
        self.is_on = False
        if self.mode == "full":
            (self.folder / "ballast").unlink()
        else:
            _do("umount", "-l", self.folder)


def _do(*command):
    subprocess.run([str(word) for word in command], check=True)


def hammer(folder, logs, mode, processes, seconds, wait):
    logs.mkdir()
    folder.mkdir(parents=True)
    trouble = Trouble(folder, mode)
    timer = forked(lambda: clock(logs.parent, logs.parent / "clock.log"))
    # Started by fork, which is fast; the store is made in the child.
    alive, count, kills, checks = [], 0, 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        while len(alive) < processes:
            count += 1
            worker = count
            alive.append(forked(lambda worker=worker: Worker(worker, folder, logs, mode, wait).run()))
        trouble.step()
        time.sleep(random.random() * 0.03)
        victim = alive.pop(random.randrange(len(alive)))
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        assert os.WIFSIGNALED(status), f"a worker ended by itself: {status}"
        kills += 1
        if mode == "plain" and kills % 200 == 0:
            checks += integrity(folder) == "ok"
    trouble.end()
    survivors = [worker for worker in alive if random.random() < 0.5] or alive[:1]
    for worker in set(alive) - set(survivors):
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        kills += 1
    for worker in survivors:
        os.kill(worker, signal.SIGTERM)
    codes = [os.waitpid(worker, 0)[1] for worker in survivors]
    os.kill(timer, signal.SIGKILL)
    os.waitpid(timer, 0)
    return {
        "kills": kills, "checks": checks, "troubles": trouble.times, "codes": codes, "wait": wait,
        "clock": max(map(float, (logs.parent / "clock.log").read_text().split())), **verify(folder, logs, mode),
    }  # fmt: skip


def integrity(folder):
    connection = sqlite3.connect(folder / "verdicts.db", timeout=20)
    try:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
    finally:
        connection.close()


def verify(folder, logs, mode):
    """What the file says against what the workers were told."""
    known = {row.spec: row.verdict for row in Store(folder, 20).rows()}
    told, finals, kinds = Counter(), 0, {}
    missing, unput, slowest, warnings = [], [], (0.0, ""), Counter()
    put, shared_bad = set(), set()
    for log in logs.iterdir():
        lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
        has_ended = ["final"] in lines
        finals += has_ended
        said = Counter(line[2] for line in ([w[0], "", " ".join(w[1:])] for w in lines) if line[0] == "warned")
        warnings.update(said)
        kinds[log.name] = max(said.values(), default=0)
        for words in lines:
            told[words[0]] += 1
            if words[0] == "putting":
                put.add((words[1], words[2]))
            elif words[0] == "slow":
                slowest = max(slowest, (float(words[1]), words[2]))
            # Deleting a file takes what was in it, but for what those who live know.
            must_be_there = words[0] == "saved" and (mode != "deleted" or has_ended)
            if must_be_there or (words[0] == "unsaved" and has_ended):
                if words[1] not in known:
                    missing.append(" ".join(words))
                elif words[2] == "crash" and words[1].startswith("shared"):
                    shared_bad.add(words[1])
                elif not words[1].startswith("shared") and known[words[1]].kind != words[2]:
                    missing.append(" ".join(words))
    for spec, verdict in known.items():
        is_final = spec.startswith("final.") and verdict.evidence == "end"
        if not is_final and ((spec, verdict.kind) not in put or verdict.evidence != proof(spec, verdict.kind)):
            unput.append(f"{spec} {verdict}")
    missing += [f"bad {spec}" for spec in shared_bad if known[spec].kind != "crash"]
    return {
        "integrity": integrity(folder), "rows": len(known), "missing": missing[:10], "unput": unput[:10],
        "lost": told["lost"], "saved": told["saved"], "unsaved": told["unsaved"], "finals": finals,
        "slowest": slowest[0], "slowest_call": slowest[1], "warnings": dict(warnings.most_common(8)),
        "set_aside": len([path for path in folder.iterdir() if ".corrupt-" in path.name]),
    }  # fmt: skip


if __name__ == "__main__":
    given = sys.argv[1:]
    print(
        json.dumps(hammer(Path(given[0]), Path(given[1]), given[2], int(given[3]), float(given[4]), float(given[5])))
    )

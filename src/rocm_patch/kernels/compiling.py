"""Compiles kernels in child processes while the program goes on: a compiler that aborts ends its child only.

Triton 3.8.0 ends the process over a float16 `tl.dot` for gfx1010 (seen here); so nothing is compiled in the user's
process before a child has come through with it. What a child compiled lies in Triton's own cache on disk, from where
this process, and every later one, loads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

from rocm_patch.kernels.variant import Target, Variant
from rocm_patch.settings import LOGGER

# A kernel takes 0.3 to 5 s; a busy machine may take its time.
_LIMIT_SECONDS = 180.0
_MOST_CHILDREN = 8
# How long a child is kept that has nothing to do.
_IDLE_SECONDS = 5.0
_END_SECONDS = 2.0


class Compilation:
    """One variant for one target: under way, done, or failed.

    Attributes:
        failure: why it cannot be had, None while that is not known.
        over: set once that is decided.
    """

    def __init__(self, variant: Variant, target: Target, is_to_run: bool) -> None:
        self.variant, self.target, self.is_to_run = variant, target, is_to_run
        self.failure: str | None = None
        self.over = threading.Event()


class Compiler:
    """Children that compile, started when there is something to compile."""

    def __init__(self) -> None:
        self._asked: dict[tuple[Variant, Target], Compilation] = {}
        self._jobs: queue.SimpleQueue[Compilation] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers = 0
        self._idle = 0

    def ask(self, variant: Variant, target: Target, is_to_run: bool = True) -> Compilation:
        """Have it compiled; the same answer to the same question.

        Args:
            variant: what.
            target: for which GPU.
            is_to_run: it will be run here, on such a GPU: have all that is needed for that.
        """
        key = (variant, target)
        with self._lock:
            found = self._asked.get(key)
            if found is None:
                found = self._asked[key] = Compilation(variant, target, is_to_run)
                self._jobs.put(found)
                if not self._idle and self._workers < min(_MOST_CHILDREN, (os.cpu_count() or 2) // 2):
                    self._workers += 1
                    threading.Thread(target=self._work, daemon=True, name="rocm-patch kernels").start()
        return found

    def forget(self) -> None:
        """In a forked child, whose threads are gone."""
        self.__init__()  # type: ignore[misc]

    def _work(self) -> None:
        child = None
        try:
            while True:
                with self._lock:
                    self._idle += 1
                try:
                    job = self._jobs.get(timeout=_IDLE_SECONDS)
                except queue.Empty:
                    with self._lock:
                        if self._jobs.empty():
                            self._workers -= 1
                            return
                    continue
                finally:
                    with self._lock:
                        self._idle -= 1
                child = self._serve(job, child)
        finally:
            if child is not None:
                child.end(_END_SECONDS)

    def _serve(self, job: Compilation, child: Any) -> Any:
        """Compile one; returns the child if it can go on."""
        from rocm_patch.child import Child

        try:
            if child is None:
                child = Child(sys.executable, "rocm_patch.kernels.compiling", [json.dumps(sys.path)], os.environ)
            child.send(_request(job))
            job.failure = _answer(child)
            if job.failure is None and job.is_to_run:
                _prepare(job)
        except Exception as error:  # noqa: BLE001
            # Whatever goes wrong while a kernel is made is a reason not to use it, never one to end the program.
            job.failure = f"{type(error).__name__}: {error}".split("\n")[0]
        if job.failure is not None:
            LOGGER.info("the kernel %s cannot be compiled: %s", job.variant, job.failure)
            if child is not None:
                _end(child, job)
                child = None
        job.over.set()
        return child


def _end(child: Any, job: Compilation) -> None:
    """The next kernel gets a child that nothing has gone wrong in."""
    was_over, said, status = False, "", None
    with contextlib.suppress(OSError):  # somebody else has waited for it
        was_over, said = child.is_over(), child.last_words()
        status = child.end(_END_SECONDS)
    if was_over:
        how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with {status}"
        job.failure = f"the compiler ended {how}: {said}"[:400]


def _request(job: Compilation) -> dict[str, Any]:
    return {"variant": vars(job.variant), "target": vars(job.target)}


def _answer(child: Any) -> str | None:
    """Why the child failed, or None."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < deadline:
        answer = child.line()
        if answer is not None:
            failure: str | None = answer["failure"]
            return failure
        if child.is_over():
            return "the compiler ended"
    return f"not compiled within {_LIMIT_SECONDS:.0f} s"


def _prepare(job: Compilation) -> None:
    """What loading it needs beside the code: Triton before 3.7 compiles a C function per signature, on disk too."""
    from triton.runtime import driver

    kernel = job.variant.compiled(job.target)
    driver.active.launcher_cls(kernel.src, kernel.metadata)


def main(requests: int, answers: int, path: str) -> None:
    """The child: a line with a variant and a target in, a line with `failure` out."""
    sys.path[:] = json.loads(path)
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            failure = None
            try:
                variant(request["variant"]).compiled(Target(**request["target"]))
            except Exception as error:  # noqa: BLE001  (what Triton raises is the answer)
                failure = f"{type(error).__name__}: {error}".strip().split("\n")[0][:400]
            os.write(answers, json.dumps({"failure": failure}).encode() + b"\n")


def variant(fields: dict[str, Any]) -> Variant:
    """The variant of what JSON made of one."""
    pairs = {name: tuple(map(tuple, fields[name])) for name in ("divisors", "constants")}
    return Variant(**{**fields, "types": tuple(fields["types"]), **pairs})


COMPILER = Compiler()
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=COMPILER.forget)

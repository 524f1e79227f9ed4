"""Is a call that does not return at work, or does it hang?

MIOpen's first search for a shape may compile for minutes (reported: 4 for one shape), in the process itself, in
compiler children, or in threads; and a first call reads libraries of gigabytes from a disk. So processor time, pages
read and growth of MIOpen's caches count as progress, up to a second, longer limit: a loop that never ends takes
processor time too. While a call waits for the GPU they do not count: the wait itself may spin.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rocm_patch.machine import sysfs
from rocm_patch.machine.folders import home_of

# Processes that comgr, MIOpen, hipcc and Triton start to compile.
_COMPILERS = re.compile(r"clang|lld|hipcc|amdclang|comgr|cc1|ptxas|^ld$|^as$|opt$|llc")
# A waiting process still takes a little time, a working one most of it.
_BUSY_SHARE = 0.2
# Whoever asks every second and has not for so many was stopped.
_LONGEST_STEP = 5.0


@dataclass(frozen=True)
class Limits:
    """Seconds that a call may take.

    Attributes:
        still: without progress.
        busy: in all, as long as there is progress.
    """

    still: float = 60.0
    busy: float = 1200.0


@dataclass
class Patience:
    """Watches one call of one process.

    Attributes:
        limits: how long is too long.
        pid: the process that the call runs in; its descendants' compilers are watched with it.
        folders: caches whose growth is progress.
    """

    limits: Limits
    pid: int
    folders: Sequence[Path] = ()
    _began: float = field(default_factory=time.monotonic)
    _moved: float = field(default_factory=time.monotonic)
    _asked: float = field(default_factory=time.monotonic)
    _looked: float = 0.0
    _cpu: float = 0.0
    _read: int = 0

    def lost(self, *, waits_for_gpu: bool = False) -> str | None:
        """Why this call counts as hung, None while it may still end. To be asked every second or so.

        Args:
            waits_for_gpu: the call waits for the GPU, so that processor time shows nothing.
        """
        now = time.monotonic()
        # Ctrl-Z, a debugger: the call has not had this time either.
        stopped = max(0.0, now - self._asked - _LONGEST_STEP)
        self._began, self._moved, self._asked = self._began + stopped, self._moved + stopped, now
        if not waits_for_gpu and self._progressed(now):
            self._moved = now
        if now - self._moved > self.limits.still:
            return f"no progress for {now - self._moved:.0f} s"
        if now - self._began > self.limits.busy:
            return f"at work for {now - self._began:.0f} s and not done"
        return None

    def restart(self) -> None:
        """A new phase of the call has begun, which has all its time before it."""
        self._began = self._moved = self._asked = time.monotonic()

    def _progressed(self, now: float) -> bool:
        cpu, faults = _cpu_seconds_and_page_reads(self.pid)
        read = faults + _bytes_in(self.folders)
        share = (cpu - self._cpu) / max(now - self._looked, 1e-3)
        is_first, grew = self._looked == 0.0, read > self._read
        self._looked, self._cpu, self._read = now, cpu, read
        return not is_first and (share > _BUSY_SHARE or grew)


def caches(environ: Mapping[str, str]) -> list[Path]:
    """The folders that MIOpen compiles into and keeps its findings in (MIOpen's docs, "Kernel cache", "Find-db")."""
    home = Path(home_of(environ))
    given = [environ.get(name) for name in ("MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR")]
    return [Path(path) for path in given if path] + [home / ".cache" / "miopen", home / ".config" / "miopen"]


def _cpu_seconds_and_page_reads(pid: int) -> tuple[float, int]:
    """Processor time, and pages read from disk, of a process and of the compilers below it, as far as they show."""
    total, reads, todo, is_first = 0.0, 0, [pid], True
    while todo:
        process = todo.pop()
        try:
            stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
            tasks = list(Path(f"/proc/{process}/task").iterdir())
        except OSError:  # it has ended
            continue
        # A thread may end meanwhile, and not every kernel lists children.
        children = [int(child) for task in tasks for child in sysfs.text(task / "children").split()]
        name, _, rest = stat.partition("(")[2].rpartition(")")
        todo += children
        fields = rest.split()
        if is_first or _COMPILERS.search(name):
            # utime, stime, and what ended children took: fields 14 to 17 of proc(5).
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            reads += int(fields[9])  # majflt: a file system without pages on a disk has none
        is_first = False
    return total, reads


def _bytes_in(folders: Sequence[Path]) -> int:
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118  (may be thousands)
                except OSError:  # replaced while we look
                    continue
    return total

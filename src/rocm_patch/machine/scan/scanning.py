"""The scan: which libraries have code for a card, and what of it the card cannot run safely."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rocm_patch.machine import catalog
from rocm_patch.machine.fit import OVERRIDE, override_target
from rocm_patch.machine.scan import files, inventory, places
from rocm_patch.machine.scan.hazards import Examination
from rocm_patch.machine.scan.inventory import Content
from rocm_patch.machine.scan.kept import Kept, examined_targets

# Processes side by side unless more are asked for: each holds one bundle unpacked, and with two of them all together
# stayed below 1 GiB over the builds of docs/REAL_BUILDS.md.
_JOBS, _MOST_JOBS = 2, 4
_WORKER_BYTES = 3 << 29
_TASK_BYTES = 16 << 20
# Below this a process of its own costs more than it brings.
_ALONE_BYTES = 8 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """For whom the code is looked at.

    Attributes:
        card: the chip, `gfx1010`; empty to list only.
        override: the value of HSA_OVERRIDE_GFX_VERSION under which it runs; empty without one.
    """

    card: str = ""
    override: str = ""

    @property
    def reported(self) -> str:
        """The chip for which code is loaded."""
        return override_target(self.override) or self.card

    @property
    def examined(self) -> tuple[str, ...]:
        """The targets whose code is examined."""
        return examined_targets(self.card, self.reported) if self.card else ()


@dataclass(frozen=True)
class Answer:
    """Whether a library serves a card.

    Attributes:
        kind: `native`; `override`, another chip's code under an override; `compiled`, when it is loaded, from code
            for no chip; or `none`.
        words: the same for people.
        chip: whose code is meant, empty for none.
    """

    kind: str
    words: str
    chip: str


@dataclass
class Library:
    """Files that belong together.

    Attributes:
        name: `libtorch_hip.so`, `rocBLAS kernels`.
        folder: the file, or the folder of its files.
        files: how many hold something for a GPU.
        content: what they hold.
    """

    name: str
    folder: Path
    files: int = 0
    content: Content = field(default_factory=Content)

    @property
    def has_code(self) -> bool:
        """Whether there is machine code or what becomes such, not only records."""
        return any(amount.objects for amount in self.content.targets.values())

    def answer(self, question: Question) -> Answer:
        """Whether it serves the card of a question, under its override or without one."""
        card, override = question.card, question.override
        own = self._code_for(card)
        if override:
            foreign = self._code_for(question.reported)
            under = f"{OVERRIDE}={override}"
            if foreign:
                also = f"; without it {own}" if own and own != foreign else ""
                return Answer("override", f"code for {foreign} under {under}{also}", question.reported)
            without = f"; without it native, {own}" if own else ""
            return Answer("none", f"none under {under}, which asks for {question.reported}{without}", "")
        if own:
            return Answer("native", "native" if own == card else f"native, by {own}", card)
        if self._code_for("amdgcnspirv"):
            return Answer("compiled", "compiled for the card when it is loaded", "")
        known = catalog.arch(card)
        pretended = override_target(known.override) if known and known.override else ""
        foreign = self._code_for(pretended) if pretended else ""
        if foreign and known:
            return Answer("override", f"only through {OVERRIDE}={known.override}, as {foreign}", pretended)
        return Answer("none", f"none for {card}", "")

    def _code_for(self, chip: str) -> str:
        """The target of the code that a chip would take here, empty where there is none."""
        known = self.content.targets
        with_code = {target for target, amount in known.items() if amount.objects} or set(known)
        return next((target for target in catalog.targets_of(chip) if target in with_code), "")

    def harm(self, question: Question) -> Examination:
        """What the examination of the code that the answer is about has found."""
        chip = self.answer(question).chip
        return self.content.harm(catalog.targets_of(chip) if chip else ())


@dataclass
class Scan:
    """What was found.

    Attributes:
        question: for whom.
        libraries: those that hold something for a GPU, by name.
        bytes: what the files take that were looked at.
        where: the files and folders.
    """

    question: Question
    libraries: list[Library]
    bytes: int
    where: tuple[Path, ...]


def scan(
    where: Sequence[Path],
    question: Question,
    environ: Mapping[str, str],
    progress: Progress | None = None,
    again: bool = False,
    jobs: int = 0,
    only_remembered: bool = False,
) -> Scan:
    """Look through files and folders; what was looked at before and has not changed is remembered.

    Args:
        where: files and folders.
        question: for whom.
        environ: says where the cache is.
        progress: called with bytes done and bytes in all.
        again: read everything, whatever is remembered.
        jobs: processes side by side, at most four; 0 for two, or one on a single processor.
        only_remembered: read no file.
    """
    kept = Kept(environ, question.card, question.reported)
    new: list[tuple[Path, str, Content]] = []
    contents: dict[Path, Content] = {}
    read: set[Path] = set()
    tasks: list[_Task] = []
    found = list(places.files(where))
    for file in found:
        known = None if again else kept.read(file.path, file.identity)
        if known is not None:
            contents[file.path] = known
            continue
        contents[file.path] = Content()
        read.add(file.path)
        if only_remembered:
            continue
        try:
            tasks += _tasks(file.path, files.parts(file.path), question)
        except (OSError, ValueError) as error:
            contents[file.path].notes.append(str(error))
    total, done = sum(task.bytes for task in tasks), 0
    tasks.sort(key=lambda task: -task.bytes)  # a long one at the end would be waited for
    for task, content in _run(tasks, min(jobs or min(os.cpu_count() or 1, _JOBS), _MOST_JOBS)):
        contents[task.path].add(content)
        done += task.bytes
        if progress is not None:
            progress(done, total)
    libraries: dict[tuple[str, Path], Library] = {}
    for file in found:
        content = contents[file.path]
        if content.targets or content.notes:
            # What could not be read today may be readable tomorrow: only what is whole is remembered.
            if file.path in read and not content.notes:
                new.append((file.path, file.identity, content))
            library = libraries.setdefault((file.library, file.folder), Library(file.library, file.folder))
            library.files += 1
            library.content.add(content)
    kept.write(new)
    kept.close()
    ordered = sorted(libraries.values(), key=lambda library: (str(library.folder.parent), library.name))
    size = sum(int(file.identity.partition("|")[0]) for file in found)
    return Scan(question, ordered, size, tuple(where))


@dataclass(frozen=True)
class _Task:
    path: Path
    parts: tuple[files.Part, ...]
    card: str
    examine: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def _tasks(path: Path, parts: Sequence[files.Part], question: Question) -> list[_Task]:
    """The parts of one file in portions of about the same size."""
    tasks: list[_Task] = []
    portion: list[files.Part] = []
    size = 0
    for part in parts:
        portion.append(part)
        size += part.bytes
        if size >= _TASK_BYTES:
            tasks.append(_Task(path, tuple(portion), question.card, question.examined))
            portion, size = [], 0
    if portion:
        tasks.append(_Task(path, tuple(portion), question.card, question.examined))
    return tasks


def _work(task: _Task) -> Content:
    return inventory.read(task.path, task.parts, task.card, task.examine)


def _run(tasks: Sequence[_Task], jobs: int) -> Any:
    """Each task with what it found, in the order in which they end."""
    if jobs < 2 or sum(task.bytes for task in tasks) < _ALONE_BYTES:
        for task in tasks:
            yield task, _work(task)
        return
    left = set(tasks)
    try:
        with _pool(jobs) as pool:
            waiting = {pool.submit(_work, task): task for task in tasks}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
                left.discard(waiting[future])
    except BrokenProcessPool:
        # A file that shrinks while it is read, or the kernel's want of memory, ends the process that reads it.
        for task in [task for task in tasks if task in left]:
            try:
                with _pool(1) as pool:
                    yield task, pool.submit(_work, task).result()
            except BrokenProcessPool:
                yield task, Content(notes=["the process that read it died: did the file change meanwhile?"])


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_limit)


def _limit() -> None:
    """A worker gets no more memory than it can need; a spoilt file then fails by a MemoryError, which is a note."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    least = _WORKER_BYTES if most == resource.RLIM_INFINITY else min(_WORKER_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (least, most))

"""How workers fail in the field, each provoked for real, and what the user reads then."""

import logging
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import rocm_patch
from conftest import clean_environ
from conftest import rocm_patch as command
from rocm_patch.overrides.dataloader import WorkerStartError
from rocm_patch.workers import fork_server, server

RUN = ("run", "-q", "--backend", "cpu", "--conv", "native")


class Holding(Dataset):
    """A dataset that holds things."""

    def __init__(self, **things):
        vars(self).update(things)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index


class Compose:
    def __init__(self, *transforms):
        self.transforms = list(transforms)


def a_generator():
    yield 1


def open_file():
    return open(__file__)


def a_tensor_of_a_graph():
    return torch.ones(2, requires_grad=True) * 2


THINGS = {
    "lock": (threading.Lock, r"dataset\.transform\.transforms\[1\]: lock \(_thread\.lock\)"),
    "file": (open_file, r"transforms\[1\]: open file '.*test_worker_failures\.py'"),
    "database": (lambda: sqlite3.connect(":memory:"), r"transforms\[1\]: database handle \(sqlite3\.Connection\)"),
    "generator": (a_generator, r"transforms\[1\]: generator a_generator"),
    "graph": (a_tensor_of_a_graph, r"transforms\[1\]: tensor of shape \(2,\) on cpu"),
    "lambda with a lock": (
        lambda: (lambda lock: lambda: lock)(threading.Lock()),
        r"transforms\[1\] variable 'lock': lock",
    ),
    "by key": (
        lambda: {"a": [0, {"b": threading.Event()}]},
        r"\['a'\]\[1\]\['b'\]: lock",
    ),
    "slots": (lambda: Slotted(threading.Lock()), r"transforms\[1\]\.thing: lock"),
    "partial": (
        lambda: __import__("functools").partial(print, threading.Lock()),
        r"transforms\[1\]\.args\[0\]: lock",
    ),
    "fork's lock": (lambda: multiprocessing.get_context("fork").Lock(), r"transforms\[1\]: lock \(multiprocessing"),
}


class Slotted:
    __slots__ = ("thing",)

    def __init__(self, thing):
        self.thing = thing


@pytest.mark.parametrize("thing", THINGS)
def test_what_cannot_be_sent_is_named_with_its_path(thing, caplog):
    make, pattern = THINGS[thing]
    if thing == "fork's lock" and sys.version_info < (3, 11, 5):
        pytest.skip("this Python notices in the worker")
    dataset = Holding(first=1, transform=Compose(None, make(), len))
    rocm_patch.patch_dataloader()
    with pytest.raises(WorkerStartError, match=pattern) as raised:
        iter(DataLoader(dataset, num_workers=1))
    assert str(raised.value).startswith("cannot start workers by spawn: ") and "hint: " in str(raised.value)
    with caplog.at_level(logging.WARNING, "rocm_patch"):
        rocm_patch.patch_dataloader(start_method="auto")
        caplog.clear()
        dataset.marker = thing  # the note is said once for one reason
        assert [int(n) for n in DataLoader(dataset, num_workers=1)] == [0, 1]
    assert re.search(pattern, caplog.text) or "forked" not in caplog.text
    assert "workers of a loader over Holding are forked" in caplog.text or caplog.text == ""


def test_pythons_own_spawn_names_it_too(tmp_path):
    """The caller asked for spawn in so many words: Python serves it, and refuses lambdas and local classes."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            from torch.utils.data import DataLoader
            class Plain:
                def __init__(self, **things): vars(self).update(things)
                def __len__(self): return 1
                def __getitem__(self, i): return i
            def local():
                class Local: pass
                return Local()
            def tell(dataset, **options):
                try: iter(DataLoader(dataset, num_workers=1, multiprocessing_context="spawn", **options))
                except Exception as error: print(str(error).splitlines()[1:])
            if __name__ == "__main__":
                tell(Plain(transform=Plain(transforms=[len, 0, lambda x: x])))
                tell(Plain(thing=local()))
                tell(Plain(), collate_fn=lambda x: x)
            """
        )
    )
    lines = command(*RUN, str(script)).stdout.splitlines()
    assert "'dataset.transform.transforms[2]: lambda at train.py:14', 'hint: define it with" in lines[0]
    assert "'dataset.thing: instance of the local class local.<locals>.Local', 'hint: define the class" in lines[1]
    assert "'collate_fn: lambda at train.py:16', 'hint: " in lines[2]


def test_lambdas_and_local_classes_travel_with_ours():
    class Local(Holding):
        def __getitem__(self, index):
            return self.function(index)

    for method in ("auto", "spawn"):
        rocm_patch.patch_dataloader(start_method=method)
        assert [int(n) for n in DataLoader(Local(function=lambda n: n + 7), num_workers=1)] == [7, 8]


class Doing(Dataset):
    def __init__(self, what):
        self.what = what

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.what(index)


@pytest.fixture
def auto():
    rocm_patch.patch_dataloader(start_method="auto")


def test_a_killed_worker_is_named(auto):
    def be_killed(index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    with pytest.raises(RuntimeError, match="exited unexpectedly") as raised:
        list(DataLoader(Doing(be_killed), num_workers=2))
    assert re.search(r"worker \(pid \d+\) was killed by SIGKILL \(it had \d+ MiB at most\)", str(raised.value))


@pytest.mark.alone
def test_a_killed_worker_is_named_within_a_second(auto):
    dataset = Doing(lambda index: time.sleep(60 * (index > 3)) or 0)
    iterator = iter(DataLoader(dataset, num_workers=2, prefetch_factor=1))
    next(iterator), next(iterator)
    start = time.monotonic()
    threading.Timer(0.2, os.kill, (iterator._workers[0].pid, signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match="was killed by SIGKILL"):
        list(iterator)
    assert time.monotonic() - start < 1.2


def test_a_worker_that_leaves_is_named(auto):
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) ended with exit code 3"):
        list(DataLoader(Doing(lambda index: os._exit(3)), num_workers=1))


def test_the_out_of_memory_killer_is_named(tmp_path):
    """In a group of 400 MiB that the worker joins and outgrows."""
    group = Path("/sys/fs/cgroup/rocm-patch-test-" + str(os.getpid()))
    try:
        if (Path("/sys/fs/cgroup") / "cgroup.controllers").exists():
            limits = {"memory.max": str(400 << 20), "memory.swap.max": "0"}
            Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
        else:
            group = Path("/sys/fs/cgroup/memory") / group.name
            limits = {"memory.limit_in_bytes": str(400 << 20)}
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group of processes can be made here: {error}")
    try:
        for name, value in limits.items():
            if (group / name).exists():
                (group / name).write_text(value)
        script = tmp_path / "train.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import os, torch
                from torch.utils.data import DataLoader, Dataset
                class Growing(Dataset):
                    def __len__(self): return 4
                    def __getitem__(self, i): return sum(map(len, [b"x" * (100 << 20) for _ in range(20)]))
                def join(worker): open({str(group / "cgroup.procs")!r}, "w").write(str(os.getpid()))
                list(DataLoader(Growing(), num_workers=1, worker_init_fn=join))
                """
            )
        )
        said = command(*RUN, str(script), check=False).stderr
    finally:
        group.rmdir()
    found = re.search(r"killed by SIGKILL: the machine or its container ran out of memory.* had ([\d,]+) MiB", said)
    assert found and 200 < int(found[1].replace(",", "")) < 900, said
    assert "hint: fewer workers" in said


@pytest.mark.parametrize("method", ["auto", "fork"])
def test_a_batch_that_cannot_be_sent_is_an_error_and_not_a_hang(method):
    rocm_patch.patch_dataloader(start_method="auto")

    class Local:
        pass

    def make(index):
        return {"x": [1, Local()]}

    dataset = Doing(make)
    if method == "fork":
        dataset.lock = threading.Lock()  # cannot be pickled: forked
    with pytest.raises(RuntimeError, match=r"batch\['x'\]\[1\]: instance of the local class .*Local"):
        list(DataLoader(dataset, num_workers=1, batch_size=None, collate_fn=lambda batch: batch))


def test_an_exception_that_cannot_be_sent_is_told(auto):
    class LocalError(Exception):
        pass

    def fail(index):
        raise LocalError("point 7")

    with pytest.raises(RuntimeError, match=r"LocalError \(a class that cannot be sent(.|\n)*point 7"):
        list(DataLoader(Doing(fail), num_workers=1))


def test_a_gpu_that_is_initialised_in_a_worker_is_told_once_with_the_stack(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from torch.utils.data import DataLoader, Dataset
            class OnGpu(Dataset):
                def __len__(self): return 8
                def __getitem__(self, i):
                    try: return torch.ones(1).cuda().cpu()
                    except (AssertionError, RuntimeError): return torch.ones(1)
            print(sum(len(x) for x in DataLoader(OnGpu(), num_workers=3)))
            """
        )
    )
    done = command(*RUN, str(script))
    assert done.stdout == "8\n"
    assert done.stderr.count("a loader's worker initialises the GPU") == 1, done.stderr
    assert 'train.py", line 7, in __getitem__' in done.stderr and "hint:" in done.stderr


LARGE_BATCHES = """
import torch
from torch.utils.data import DataLoader, Dataset
class Large(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.full((1 << 20,), i)
print(sum(int(b[:, 5].sum()) for b in DataLoader(Large(), batch_size=2, num_workers=2)))
"""


def test_a_small_dev_shm_is_no_bus_error(tmp_path):
    """As in a container: /dev/shm of 1 MiB, batches of 16."""
    script = tmp_path / "train.py"
    script.write_text(LARGE_BATCHES)
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*small, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this user may not mount")
    plain = subprocess.run(
        [*small, sys.executable, script],
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert plain.returncode and re.search("us error|No space left", plain.stderr)  # it fails without us
    done = subprocess.run(
        [*small, sys.executable, "-m", "rocm_patch", *RUN, script],
        env=clean_environ(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "28\n"), done.stderr


def test_many_tensors_in_flight_are_not_too_many_open_files(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from torch.utils.data import DataLoader, Dataset
            class Boxes(Dataset):
                def __len__(self): return 64
                def __getitem__(self, i): return [torch.full((5, 4), i) for _ in range(20)]
            batches = list(DataLoader(Boxes(), batch_size=4, num_workers=2, collate_fn=lambda b: b))
            print(sum(int(t[0, 0]) for batch in batches for item in batch for t in item))
            """
        )
    )
    few = ["sh", "-c", 'ulimit -n 200 && exec "$@"', "sh", sys.executable]
    options = {"env": clean_environ(), "capture_output": True, "text": True, "timeout": 120, "check": False}
    plain = subprocess.run([*few, script], **options)
    assert plain.returncode and "open files" in plain.stderr
    done = subprocess.run([*few, "-m", "rocm_patch", *RUN, script], **options)
    assert (done.returncode, done.stdout) == (0, f"{20 * sum(range(64))}\n"), done.stderr


WAITING = """
import os, sys, time, torch
from torch.utils.data import DataLoader, Dataset
class Slow(Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        time.sleep(0.05 if i < 8 else 30)
        return i
iterator = iter(DataLoader(Slow(), num_workers=3))
next(iterator)
from rocm_patch.workers import fork_server
print(fork_server.of_this_process().pid, *[worker.pid for worker in iterator._workers], flush=True)
list(iterator)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_no_worker_outlives_the_program(tmp_path, end):
    """Ctrl-C goes to the whole group, as a terminal sends it; the others to the program alone."""
    script = tmp_path / "train.py"
    script.write_text(WAITING)
    program = subprocess.Popen(
        [sys.executable, "-m", "rocm_patch", *RUN, script], env=clean_environ(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 4
    (os.killpg if end == signal.SIGINT else os.kill)(program.pid, end)
    _, said = program.communicate(timeout=60)
    assert program.returncode == -end, said
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _lives(pid)]
    if end == signal.SIGINT:
        assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt"), said


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_fork_server_that_was_killed_is_started_again(auto):
    assert len(list(DataLoader(Holding(), num_workers=1))) == 2
    first = fork_server.of_this_process().pid
    os.kill(first, signal.SIGKILL)
    assert [int(n) for n in DataLoader(Holding(), num_workers=2)] == [0, 1]
    assert fork_server.of_this_process().pid != first


def test_the_fork_server_never_touches_the_gpu(auto, tmp_path, monkeypatch):
    """An import that opens a GPU's device is left to the worker, and a new server takes the place of the old one."""
    device = Path(f"/dev/nvidia-rocm-patch-test-{os.getpid()}")
    try:
        device.write_text("")
    except OSError as error:
        pytest.skip(f"no device can be pretended here: {error}")
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "opens_a_gpu.py").write_text(
        "import os\n"
        f"_opened = os.open({str(device)!r}, os.O_RDONLY)\n"  # a public number would travel to the worker
        "class Touching:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return os.path.exists(f'/proc/self/fd/{_opened}')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    try:
        import opens_a_gpu

        assert list(DataLoader(opens_a_gpu.Touching(), num_workers=1, batch_size=None)) == [True, True]
        running = fork_server.of_this_process()
        assert "opens_a_gpu" in running.unsafe and server.gpu_descriptors(running.pid) == []
        assert server.gpu_descriptors() == [str(device)]
        os.close(opens_a_gpu._opened)
    finally:
        device.unlink()


def test_loaders_side_by_side_nested_and_in_threads(auto):
    outer = DataLoader(Doing(lambda n: n), num_workers=2)
    inner = DataLoader(Doing(lambda n: 10 * n), num_workers=1)
    pairs = [(int(a), int(b)) for a, b in zip(outer, inner, strict=True)]
    assert pairs == [(n, 10 * n) for n in range(8)]
    nested = [[int(b) for b in inner] for a in outer if a < 2]
    assert nested == [[10 * n for n in range(8)]] * 2
    results = []
    threads = [threading.Thread(target=lambda: results.append(len(list(outer)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [8, 8, 8]


def test_persistent_workers_are_the_callers_choice(auto):
    epochs = {}
    for persistent in (False, True):
        loader = DataLoader(Doing(lambda _: os.getpid()), num_workers=1, persistent_workers=persistent)
        epochs[persistent] = [{int(pid) for pid in loader} for _ in range(2)]
    assert epochs[False][0] != epochs[False][1] and epochs[True][0] == epochs[True][1]


def test_loaders_in_processes_of_torch_multiprocessing_spawn(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, torch.multiprocessing as mp
            from torch.utils.data import DataLoader
            def work(rank, queue):
                queue.put((rank, sum(int(n) for n in DataLoader(list(range(5)), num_workers=2))))
            if __name__ == "__main__":
                queue = mp.get_context("spawn").SimpleQueue()
                mp.spawn(work, (queue,), nprocs=2)
                print(sorted(queue.get() for _ in range(2)))
            """
        )
    )
    done = command(*RUN, str(script))
    assert done.stdout == "[(0, 10), (1, 10)]\n" and done.stderr == ""


def test_a_forked_child_has_a_server_of_its_own(auto):
    assert len(list(DataLoader(Holding(), num_workers=1))) == 2
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            numbers = [int(n) for n in DataLoader(Holding(), num_workers=1)]
            os.write(writer, repr(numbers).encode())
        finally:
            fork_server.of_this_process().stop()
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"[0, 1]"
    os.close(reader)
    assert [int(n) for n in DataLoader(Holding(), num_workers=1)] == [0, 1]


def test_the_programs_own_choice_is_left_alone(auto):
    parents = Doing(lambda _: os.getppid())
    forked = {int(pid) for pid in DataLoader(parents, num_workers=1, multiprocessing_context="fork")}
    assert forked == {os.getpid()}
    served = {int(pid) for pid in DataLoader(parents, num_workers=1)}
    assert served == {fork_server.of_this_process().pid}


def test_what_became_of_each_loader_is_in_the_status(auto):
    list(DataLoader(Holding(), num_workers=1))
    list(DataLoader(Holding(), num_workers=1))
    list(DataLoader(Holding(lock=threading.Lock()), num_workers=1))
    list(DataLoader(Holding(), num_workers=1, multiprocessing_context="fork"))
    over = f"workers of DataLoader over {__name__}.Holding"
    served, forked, left = rocm_patch.patch_status()["dataloader"].details
    assert served.startswith(f"{over} come from the fork server")
    assert forked == f"{over} are forked, since dataset.lock: lock (_thread.lock)"
    assert left == f"{over} start by fork, as was asked for"


class Parents(Dataset):
    """Which process each worker came from."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.tensor([float(index), os.getppid()])


def test_accelerates_copy_of_a_loader_is_served(auto):
    accelerate = pytest.importorskip("accelerate")
    loader = DataLoader(Parents(), num_workers=1, batch_size=2)
    prepared = accelerate.Accelerator(cpu=True).prepare(loader)
    for _ in range(2):
        assert {int(parent) for batch in prepared for parent in batch[:, 1]} == {fork_server.of_this_process().pid}


def test_lightnings_loaders_are_served(auto, tmp_path):
    lightning = pytest.importorskip("lightning")
    seen = set()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            seen.update(int(parent) for parent in batch[:, 1])
            return self.layer(batch / 1e6).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Parents(), num_workers=2, batch_size=4))
    assert seen == {fork_server.of_this_process().pid}


class Forever:
    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from iter(self.sampler)


class EndlessLoader(DataLoader):
    """As ultralytics and timm have it: one iterator, made with the loader, over a batch sampler that repeats."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Forever(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


def test_a_subclass_with_an_iterator_of_its_own_is_served(auto):
    loader = EndlessLoader(Parents(), num_workers=2, batch_size=4)
    for _ in range(3):
        batches = torch.cat(list(loader))
        assert batches[:, 0].tolist() == list(range(16))
        assert set(batches[:, 1].tolist()) == {fork_server.of_this_process().pid}

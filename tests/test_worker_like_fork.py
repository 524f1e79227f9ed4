"""What a worker does where the program, or the system, is unusual: the same as a forked one of plain torch."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conftest import clean_environ, python

IMPORTS = """
import argparse, json, logging, os, pathlib, random, signal, sys, threading, time
import numpy, torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
if sys.argv[1:] == ["ours"]:
    import rocm_patch
    rocm_patch.patch_dataloader(start_method="auto")
    logging.getLogger("rocm_patch").setLevel(logging.CRITICAL)
"""
PROGRAMS = {
    # Names that are set, and objects that are changed, after a worker's import of the script would have ended.
    "set_under_the_guard": """
        import config
        CFG = {"scale": 1}
        SIZE, TABLE = 1, None
        class D(Dataset):
            scale = 1
            @staticmethod
            def looked_up(i): return float(TABLE[i]) if TABLE is not None else -1
            def __len__(self): return 3
            def __getitem__(self, i):
                return (i, CFG["scale"], D.scale, SIZE, args.scale, self.looked_up(i), config.options.width,
                        float(config.table[i]), numpy_module.pi, helper(i))
        def helper(i): return args.scale + i
        def change():
            global SIZE
            CFG["scale"] = D.scale = SIZE = 9
        if __name__ == "__main__":
            import numpy as numpy_module
            args = argparse.Namespace(scale=7, parser=argparse.ArgumentParser())
            TABLE = torch.arange(3.0)
            config.options = argparse.Namespace(width=3)
            config.table = numpy.arange(3) * 2
            lock = threading.Lock()  # read by nobody in a worker
            change()
            print(list(DataLoader(D(), batch_size=None, num_workers=2)))
        """,
    "set_under_the_guard_and_cannot_be_sent": """
        class D(Dataset):
            def __len__(self): return 2
            def __getitem__(self, i):
                with lock: return i
        if __name__ == "__main__":
            lock = threading.Lock()
            print(list(DataLoader(D(), batch_size=None, num_workers=1)))
        """,
    # The way by the fork server fails when a worker loads the dataset; what was drawn until then is drawn again.
    "another_way_is_tried": """
        pid = os.getpid()
        class Odd:
            def __reduce__(self): return fails, (os.getpid(),)
        def fails(made_in):
            if os.getpid() != made_in: raise OSError("cannot open the device again")
            return Odd()
        class D(Dataset):
            def __init__(self): self.odd, self.rows, self.lock = Odd(), torch.zeros(1000, 1000), threading.Lock()
            def __len__(self): return 8
            def __getitem__(self, i):
                self.rows[i] += 1
                return i, float(torch.rand(())), float(self.rows[i, 0])
        if __name__ == "__main__":
            torch.manual_seed(0)
            data = D()
            for lock in (data.lock, None):
                data.lock = lock
                print([[part.tolist() for part in batch] for batch in DataLoader(data, 4, True, num_workers=2)])
                print(data.rows.is_shared(), data.rows.sum())
            batches = iter([[0, 1], [2, 3], [4, 5], [6, 7]])
            print([batch[0].tolist() for batch in DataLoader(data, num_workers=1, batch_sampler=batches)])
        """,
    "signals": """
        class D(Dataset):
            def __len__(self): return 40
            def __getitem__(self, i): time.sleep(0.01); return i
        if __name__ == "__main__":
            os.setpgid(0, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            signal.signal(signal.SIGUSR1, lambda *_: None)  # as a batch system sends it before the time is up
            for batch in DataLoader(D(), batch_size=None, num_workers=2):
                if batch == 5: os.killpg(0, signal.SIGUSR1)
            print("finished", batch)
        """,
    "folder_and_path": """
        import tempfile
        sys.path.append(pathlib.Path("/nowhere"))
        numpy.seterr(all="raise")
        class D(Dataset):
            def __len__(self): return 2
            def __getitem__(self, i):
                try: return str(numpy.float64(1) / numpy.float64(i))
                except FloatingPointError as error: return str(error)
        if __name__ == "__main__":
            folder = tempfile.mkdtemp()
            os.chdir(folder)
            os.rmdir(folder)
            print(list(DataLoader(D(), batch_size=None, num_workers=1)))
        """,
    "a_file_that_was_replaced": """
        class D(Dataset):
            def __init__(self, rows): self.rows = rows
            def __len__(self): return 3
            def __getitem__(self, i): return int(self.rows[i])
        if __name__ == "__main__":
            numpy.arange(100_000).tofile("rows.bin")
            data = D(numpy.memmap("rows.bin", numpy.int64, "r"))
            print(list(DataLoader(data, batch_size=None, num_workers=1)))
            (numpy.arange(100_000) + 900).tofile("other.bin")
            os.replace("other.bin", "rows.bin")
            print(list(DataLoader(data, batch_size=None, num_workers=1)))
        """,
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prints_what_it_prints_with_plain_torch(tmp_path, name):
    (tmp_path / "config.py").write_text("options = None\ntable = None\n")
    script = tmp_path / "train.py"
    script.write_text(IMPORTS + textwrap.dedent(PROGRAMS[name]))
    plain = python("-W", "ignore", str(script), cwd=tmp_path)
    (tmp_path / "rows.bin").unlink(missing_ok=True)
    ours = python("-W", "ignore", str(script), "ours", cwd=tmp_path)
    assert plain.stdout and ours.stdout == plain.stdout
    assert ours.stderr == "" or plain.stderr, ours.stderr


@pytest.mark.parametrize("missing", ["memfd_create", "pidfd_open", "memfd_create pidfd_open"])
def test_a_python_without_calls_that_the_kernel_has(tmp_path, missing):
    """uv's Pythons lack os.memfd_create, conda's os.pidfd_open."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import os\nfor name in {missing.split()!r}: delattr(os, name)\n"
        + IMPORTS
        + "if __name__ == '__main__':\n"
        + "    loader = DataLoader(TensorDataset(torch.ones(8, 10_000)), batch_size=4, num_workers=1)\n"
        + "    print([float(x.sum()) for (x,) in loader], rocm_patch.patch_status()['dataloader'].details)\n"
    )
    shown = python(str(script), "ours").stdout
    assert "[40000.0, 40000.0]" in shown and "come from the fork server" in shown


def test_what_packages_print_when_they_are_imported_is_printed_once(tmp_path):
    package = tmp_path / "site-packages" / "greeting.py"
    package.parent.mkdir()
    package.write_text("import os\nprint('good morning')\nclass Hours:\n    def __len__(self): return 2\n"
                       "    def __getitem__(self, i): print('hour', i, flush=True); return i\n")  # fmt: skip
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(package.parent)!r})\n"
        + IMPORTS
        + "import greeting\nif __name__ == '__main__':\n"
        + "    print(list(DataLoader(greeting.Hours(), batch_size=None, num_workers=1)))\n"
    )
    assert python(str(script), "ours").stdout == "good morning\nhour 0\nhour 1\n[0, 1]\n"


def test_a_worker_of_a_deterministic_program_is_so_too_and_imports_no_compiler(tmp_path):
    """torch.use_deterministic_algorithms does, in torch 2.13, which took seconds of each worker of ultralytics."""
    (tmp_path / "train.py").write_text(
        IMPORTS
        + textwrap.dedent("""
        class D(Dataset):
            def __len__(self): return 2
            def __getitem__(self, i):
                return (torch.are_deterministic_algorithms_enabled(),
                        torch.is_deterministic_algorithms_warn_only_enabled(), "torch._inductor" in sys.modules)
        if __name__ == "__main__":
            torch.use_deterministic_algorithms(True, warn_only=True)
            print(list(DataLoader(D(), batch_size=None, num_workers=2)))
        """)
    )
    done = python("train.py", "ours", cwd=tmp_path)
    assert done.stdout.strip() == str([[True, True, False]] * 2)  # the loader makes lists of tuples


def test_workers_of_a_program_that_became_somebody_else(tmp_path):
    """Niceness and groups that it has taken since its server was started."""
    script = tmp_path / "train.py"
    script.write_text(
        IMPORTS
        + textwrap.dedent(
            """
            class Who(Dataset):
                def __len__(self): return 1
                def __getitem__(self, i): return os.getgroups(), os.nice(0)
            if __name__ == "__main__":
                list(DataLoader(Who(), batch_size=None, num_workers=1))
                os.nice(5)
                if os.getuid() == 0: os.setgroups([4, 27])
                print(list(DataLoader(Who(), batch_size=None, num_workers=1)))
            """
        )
    )
    assert python(str(script), "ours").stdout == python(str(script)).stdout


@pytest.mark.parametrize("method", ["auto", "spawn"])
def test_workers_of_a_program_without_output(tmp_path, method):
    """As a daemon has it: stdout and stderr closed. And a worker's children have the streams where they are open."""
    script = tmp_path / "train.py"
    script.write_text(
        IMPORTS.replace('"auto"', f'"{method}"')
        + textwrap.dedent(
            """
            import subprocess
            class Echo(Dataset):
                def __len__(self): return 1
                def __getitem__(self, i): return subprocess.run(["sh", "-c", "echo said"]).returncode
            if __name__ == "__main__":
                found = list(DataLoader(Echo(), batch_size=None, num_workers=1))
                open("found", "w").write(repr(found))
            """
        )
    )
    done = python(str(script), "ours", cwd=tmp_path)
    assert done.stdout == "said\n" and (tmp_path / "found").read_text() == "[0]"
    (tmp_path / "found").unlink()
    closed = subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, script, "ours"], cwd=tmp_path, env=clean_environ()
    )
    assert closed.wait(120) == 0 and (tmp_path / "found").exists()


def test_a_server_outlives_the_loaders_that_it_is_replaced_for(tmp_path):
    """An import that touches the GPU while other workers run: theirs go on."""
    device = f"/dev/nvidia-rocm-patch-test-{os.getpid()}"
    try:
        with open(device, "w"):
            pass
    except OSError as error:
        pytest.skip(f"cannot stage a device: {error}")
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "opens.py").write_text(
        f"import os\nopened = os.open({device!r}, os.O_RDONLY)\n"
        "class Opened:\n    def __len__(self): return 2\n    def __getitem__(self, i): return i\n"
    )
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
        + IMPORTS
        + textwrap.dedent(
            """
            class Slow(Dataset):
                def __len__(self): return 30
                def __getitem__(self, i): time.sleep(0.02); return i
            if __name__ == "__main__":
                for batch in DataLoader(Slow(), batch_size=None, num_workers=2):
                    if batch == 5:
                        import opens
                        print(list(DataLoader(opens.Opened(), batch_size=None, num_workers=1)))
                print("finished", batch, rocm_patch.patch_status()["dataloader"].details[-1])
            """
        )
    )
    try:
        shown = python(str(script), "ours").stdout
    finally:
        Path(device).unlink()
    assert shown.startswith("[0, 1]\nfinished 29 ") and "come from the fork server" in shown


def test_a_forked_child_that_leaves_takes_nothing_along(tmp_path):
    """With plain torch it ends its parent's workers when it exits."""
    script = tmp_path / "train.py"
    script.write_text(
        IMPORTS
        + textwrap.dedent(
            """
            if __name__ == "__main__":
                for (batch,) in DataLoader(TensorDataset(torch.arange(8)), num_workers=2):
                    print(int(batch))
                    child = os.fork()
                    if child == 0: sys.exit(0)
                    os.waitpid(child, 0)
            """
        )
    )
    done = python("-W", "ignore", str(script), "ours")
    assert (done.stdout.split(), done.stderr) == ([str(n) for n in range(8)], "")

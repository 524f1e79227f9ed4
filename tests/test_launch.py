"""`rocm-patch run`: real programs in real processes, with and without us."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from conftest import ROOT, clean_environ, python, rocm_patch
from rocm_patch.machine.build import find_build

KIND = find_build().kind
RUN = ("run", "-q", "--backend", "cpu")
# Prints the strategies that served a convolution in this process: [] where nothing is patched.
SERVED = (
    "import torch; torch.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))\n"
    "import sys; api = sys.modules.get('rocm_patch.overrides.aten')\n"
    "served = [r.strategy.name for d in (api.ACTIVE.values() if api else ()) for r in d.routes.taken()]\n"
)


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def test_a_plain_script_is_patched(script):
    path = script(SERVED + "print(served)")
    assert python(path).stdout == "[]\n"
    assert rocm_patch(*RUN, path).stdout == "['depthwise']\n"


def test_one_line_says_what_is_on_and_q_silences_it(script):
    path = script("")
    said = rocm_patch("run", "--backend", "cpu", path).stderr
    assert said == (
        "rocm-patch: convolutions bypass on cpu (backend cpu asked for); loader workers from a fork server; "
        "4 variables set\n"
    )
    assert rocm_patch(*RUN, path).stderr == ""
    off = rocm_patch("run", path).stderr
    assert "convolutions native" in off and f"is a {KIND} build" in off and "loaders as they are" in off


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_programs(script, code):
    path = script(f"import sys, torch; sys.exit({code})")
    assert rocm_patch(*RUN, path, check=False).returncode == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_program_gives_128_plus_the_signal(script, number):
    path = script(f"import os; os.kill(os.getpid(), {int(number)})")
    done = subprocess.run(
        ["sh", "-c", '"$@"; echo "code $?"', "sh", sys.executable, "-m", "rocm_patch", *RUN, path],
        env=clean_environ(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"code {128 + number}\n" in done.stdout


def test_signals_reach_the_program_itself(script):
    path = script(
        """
        import signal, sys, time
        signal.signal(signal.SIGINT, lambda *_: sys.exit(42))
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "rocm_patch", *RUN, path], env=clean_environ(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 42


SEEN = """
import __main__, json, os, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": globals().get("__file__"),
    "main": __main__.__dict__.get("__spec__") and __main__.__spec__.name, "stdin": sys.stdin.read(),
    "executable": os.path.realpath(sys.executable), "flags": str(sys.flags),
}))
"""


def test_the_program_sees_what_it_would_see_without_us(script, tmp_path):
    path = script(SEEN)
    script("", "package/__init__.py")
    script(SEEN, "package/__main__.py")
    script(SEEN, "module.py")
    forms = [
        (path, "a", "-q", "--backend=none", "--", "b"),
        ("-m", "module", "-m", "x"),
        ("-m", "package", "--help"),
        ("-c", SEEN, "-c"),
        (str(tmp_path / "package"), "1"),
    ]
    for form in forms:
        options = {"input": "from stdin", "cwd": tmp_path}
        assert rocm_patch(*RUN, *form, **options).stdout == python(*form, **options).stdout
    assert rocm_patch(*RUN, "-", "x", input="import sys; print(sys.argv)").stdout == "['-', 'x']\n"


def test_children_of_every_kind_are_patched(script):
    path = script(
        f"""
        import multiprocessing, os, subprocess, sys
        CODE = {SERVED + "print(served, flush=True)"!r}
        if __name__ == "__main__":
            subprocess.run([sys.executable, "-c", CODE], check=True)
            subprocess.run("exec python -c \\"$CODE\\"", shell=True, env={{**os.environ, "CODE": CODE}}, check=True)
            for method in ("spawn", "forkserver", "fork"):
                child = multiprocessing.get_context(method).Process(target=exec, args=(CODE, {{}}))
                child.start(); child.join(); assert child.exitcode == 0
        """
    )
    done = rocm_patch(*RUN, path, PATH=os.path.dirname(sys.executable) + ":" + os.environ["PATH"])  # noqa: PTH120
    assert done.stdout == "['depthwise']\n" * 5


def test_isolated_children_start_unchanged(script):
    path = script(
        f"""
        import subprocess, sys
        subprocess.run([sys.executable, "-I", "-c", {SERVED + "print(served)"!r}], check=True)
        """
    )
    assert rocm_patch(*RUN, path).stdout == "[]\n"


def test_a_command_is_run_and_its_python_children_are_patched(script):
    path = script(SERVED + "print(served)")
    shell = script(f'#!/bin/sh\nexec {sys.executable} {path} "$@"\n', "start.sh")
    os.chmod(shell, 0o755)  # noqa: PTH101
    assert rocm_patch(*RUN, "--", shell).stdout == "['depthwise']\n"
    assert rocm_patch(*RUN, "--", sys.executable, path).stdout == "['depthwise']\n"
    assert rocm_patch(*RUN, "--", "sh", "-c", "exit 9", check=False).returncode == 9


@pytest.mark.skipif(
    torch.__version__.startswith("1.") and sys.version_info >= (3, 11),
    reason="torchrun of torch 1.13 does not start on Python 3.11: AttributeError in elastic's to_map",
)
def test_torchrun_trains_with_every_rank_patched(script):
    path = script(
        """
        import torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(),
                                                            torch.nn.Linear(2 * 36, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        images = torch.ones(4, 1, 8, 8) * (dist.get_rank() + 1)
        for _ in range(3):
            loss = model(images).pow(2).mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        import rocm_patch
        report = rocm_patch.bypass_report()
        weights = [p.detach().clone() for p in model.parameters()]
        other = [w.clone() for w in weights]
        for w in other:
            dist.broadcast(w, 0)
        same = all(torch.equal(a, b) for a, b in zip(weights, other))
        import os, pathlib
        pathlib.Path(os.environ["OUT"], str(dist.get_rank())).write_text(f"{'im2col' in report} {same} {loss:.6f}")
        # torch 2.13 itself aborts at exit now and then after gloo ("terminate called", 6 of 40 runs without us).
        dist.barrier()
        os._exit(0)
        """
    )
    out = os.path.dirname(path)  # noqa: PTH120
    command = ["--", sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", str(20000 + os.getpid() % 20000), path]  # fmt: skip
    rocm_patch(*RUN, *command, OUT=out)
    for rank in ("0", "1"):
        with open(os.path.join(out, rank)) as file:  # noqa: PTH118
            assert file.read().startswith("True True ")


def test_loaders_start_in_our_way_and_python_keeps_its_start_method(script):
    path = script(
        """
        import multiprocessing
        from torch.utils.data import DataLoader
        loader = DataLoader([1, 2], num_workers=1)
        context = loader.multiprocessing_context
        print(context and context.get_start_method(), loader.persistent_workers,
              multiprocessing.get_start_method(allow_none=True))
        """
    )
    assert rocm_patch(*RUN, path).stdout == "None False None\n"
    assert rocm_patch(*RUN, "--start-method", "auto", path).stdout == "None False None\n"
    assert rocm_patch(*RUN, "--start-method", "forkserver", path).stdout == "forkserver False forkserver\n"
    assert rocm_patch("run", "-q", "--start-method", "spawn", path).stdout == "spawn False spawn\n"


UNGUARDED = """
import os, torch
from torch.utils.data import DataLoader, Dataset
class Parents(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.tensor(float(i)), os.getppid()
batches = list(DataLoader(Parents(), batch_size=2, num_workers=2))
print("total", sum(values.sum().item() for values, _ in batches))
print({"forked" if parent == os.getpid() else "served" for _, parents in batches for parent in parents.tolist()})
"""


def test_an_unguarded_script_that_works_without_us_works_with_us(script):
    path = script(UNGUARDED)
    assert python(path).stdout == "total 28.0\n{'forked'}\n"
    done = rocm_patch(*RUN, path)
    assert done.stdout == "total 28.0\n{'served'}\n" and done.stderr == ""
    assert rocm_patch(*RUN, "--start-method", "fork", path).stdout == "total 28.0\n{'forked'}\n"
    # Spawned workers are children of the program too.
    assert rocm_patch(*RUN, "--start-method", "spawn", path).stdout == "total 28.0\n{'forked'}\n"


def test_a_loader_that_cannot_be_pickled_works_with_us(script):
    path = script(
        """
        import threading
        from torch.utils.data import DataLoader, Dataset
        class Locked(Dataset):
            def __init__(self): self.lock = threading.Lock()
            def __len__(self): return 8
            def __getitem__(self, i): return i
        if __name__ == "__main__":
            loader = DataLoader(Locked(), num_workers=2)
            for epoch in range(2):
                print(sum(loader).item())
        """
    )
    assert python(path).stdout == "28\n28\n"
    done = rocm_patch(*RUN, path)
    assert done.stdout == "28\n28\n"
    assert "the workers of a loader over Locked are forked: dataset.lock: lock (_thread.lock)" in done.stderr
    assert done.stderr.count("hint:") == 1


def test_code_from_the_command_line_has_workers(script):
    assert rocm_patch(*RUN, "-c", UNGUARDED).stdout == "total 28.0\n{'served'}\n"


def test_variables_reach_the_program_and_the_users_win(script):
    path = script("import os; print(os.environ.get('HSA_XNACK'), os.environ.get('HSA_USE_SVM'))")
    assert rocm_patch(*RUN, path).stdout == "0 0\n"
    assert rocm_patch(*RUN, path, HSA_XNACK="1").stdout == "1 0\n"
    assert rocm_patch(*RUN, "--unset", "HSA_XNACK", path, HSA_XNACK="1").stdout == "None 0\n"
    assert rocm_patch(*RUN, "--profile", "none", path).stdout == "None None\n"


def test_switched_off_is_a_plain_run(script):
    path = script(SERVED + "import os; print(served, os.environ.get('HSA_XNACK'), os.environ.get('PYTHONPATH'))")
    done = rocm_patch("run", "--backend", "cpu", path, ROCM_PATCH="0")
    assert done.stdout == "[] None None\n" and "plain run" in done.stderr
    # Switched off inside the program, for its children.
    path = script(
        f"""
        import os, subprocess, sys
        os.environ["ROCM_PATCH"] = "0"
        subprocess.run([sys.executable, "-c", {SERVED + "print(served)"!r}], check=True)
        """
    )
    assert rocm_patch(*RUN, path).stdout == "[]\n"


def test_an_existing_sitecustomize_is_chained(script, tmp_path):
    script(
        "import sys; sys.marked = True; import sitecustomize; sys.itself = sitecustomize.__file__",
        "site/sitecustomize.py",
    )
    path = script("import sys; print(sys.marked, sys.itself, len(sys.modules['sitecustomize'].__file__))")
    site = str(tmp_path / "site")
    assert rocm_patch(*RUN, path, PYTHONPATH=site).stdout == python(path, PYTHONPATH=site).stdout


def test_a_broken_sitecustomize_is_pythons_affair(script, tmp_path):
    script("raise ValueError('mine')", "site/sitecustomize.py")
    path = script(SERVED + "print(served)")
    plain = python(path, PYTHONPATH=str(tmp_path / "site"))
    patched = rocm_patch("run", "-q", "--backend", "cpu", path, PYTHONPATH=str(tmp_path / "site"))
    assert "ValueError: mine" in plain.stderr
    assert patched.stdout == "['depthwise']\n"
    # Once for the launcher's own Python, which has no hook, and once for the program's.
    own, ours = patched.stderr[: len(plain.stderr)], patched.stderr[len(plain.stderr) :]
    assert own == plain.stderr and ours.endswith(plain.stderr)
    assert ours.startswith(f"rocm-patch: {tmp_path}/site/sitecustomize.py fails") and ours.count("hint: ") == 1


def test_without_a_sitecustomize_none_is_left_behind(script):
    path = script("import sys; print('sitecustomize' in sys.modules, [p for p in sys.path if 'rocm_patch' in p])")
    plain, patched = python(path).stdout, rocm_patch(*RUN, path).stdout
    assert patched == plain


def test_a_python_without_rocm_patch_is_patched_by_the_launchers_own(script, tmp_path):
    """As with pipx: ours has no torch, the program's Python has no rocm_patch."""
    environment = tmp_path / "venv"
    python("-m", "venv", "--without-pip", str(environment))
    site = next(environment.glob("lib/python3.*/site-packages"))
    folder = os.path.dirname(os.path.dirname(torch.__file__))  # noqa: PTH120
    rows = [entry for entry in sys.path if entry.endswith("-packages")]
    # Every package of this interpreter but ours: rocm_patch is an editable install, found through its .pth file.
    (site / "rest.pth").write_text("\n".join(dict.fromkeys([*rows, folder])))
    path = script(SERVED + "print(served, sys.modules['rocm_patch'].__file__ if served else None)")
    done = rocm_patch(*RUN, path, VIRTUAL_ENV=str(environment))
    assert done.stdout == f"['depthwise'] {ROOT / 'src/rocm_patch/__init__.py'}\n"
    plain = subprocess.run(
        [str(environment / "bin/python"), "-c", "import rocm_patch"], env=clean_environ(), check=False
    )
    assert plain.returncode == 1


BAD = [
    (("run",), "nothing to run"),
    (("run", "--backend", "cpu"), "nothing to run"),
    (("run", "no_such.py"), "no such file"),
    (("run", "."), "folder without a __main__.py"),
    (("run", "--"), "nothing to run"),
    (("run", "--", "no-such-command"), "no such command"),
    (("run", "-m"), "nothing to run"),
    (("run", "--backend", "vulkan", "x.py"), "unknown backend 'vulkan'"),
    (("run", "--conv", "fast", "x.py"), "unknown conv 'fast'"),
    (("run", "--profile", "gaming", "x.py"), "unknown profile 'gaming'"),
    (("run", "--start-method", "vfork", "x.py"), "unknown start method 'vfork'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_usage_errors(arguments, message, tmp_path):
    (tmp_path / "x.py").touch()
    done = rocm_patch(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("rocm-patch: error: ") and message in done.stderr
    assert done.stderr.count("hint: ") == 1 and done.stdout == ""


def test_a_syntax_error_is_named_once_and_exits_as_python_does(script):
    path = script("print('never')\nthis is no python\n")
    done = rocm_patch(*RUN, path, check=False)
    assert done.returncode == python(path, check=False).returncode == 1
    assert "invalid syntax (line 2)" in done.stderr and "hint: " in done.stderr and done.stdout == ""


def test_a_bad_variable_does_not_stop_a_program_below_us(script):
    path = script(
        f"""
        import os, subprocess, sys
        os.environ["ROCM_PATCH_BACKEND"] = "vulkan"
        subprocess.run([sys.executable, "-c", {SERVED + "print(served)"!r}], check=True)
        """
    )
    done = rocm_patch(*RUN, path)
    assert done.stdout == "[]\n" and "unknown backend 'vulkan'" in done.stderr and "hint:" in done.stderr


def test_torch_that_cannot_be_imported_fails_as_without_us(script, tmp_path):
    script("raise ImportError('libamdhip64.so.5: cannot open shared object file')", "fake/torch/__init__.py")
    path = script("import torch")
    plain = python(path, PYTHONPATH=str(tmp_path / "fake"), check=False)
    patched = rocm_patch(*RUN, path, PYTHONPATH=str(tmp_path / "fake"), check=False)
    assert plain.returncode == patched.returncode == 1
    assert plain.stderr.splitlines()[-1] == patched.stderr.splitlines()[-1]


def test_finding_torch_without_importing_it_changes_nothing(script):
    path = script(
        """
        import importlib.util, sys
        spec = importlib.util.find_spec("torch")
        print(spec.name, type(spec.loader).__name__, "torch" in sys.modules)
        import torch
        print(torch.__loader__.get_filename() == torch.__file__, "exec_module" in vars(torch.__loader__))
        """
    )
    assert rocm_patch(*RUN, path).stdout == python(path).stdout == "torch SourceFileLoader False\nTrue False\n"


def test_faults_travel_to_the_program(script):
    path = script("import torch; torch.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))")
    done = rocm_patch("run", "-q", "--backend", "cpu", "--conv", "guarded", path, ROCM_PATCH_FAULT="error:forward")
    assert "native convolution failed: miopenStatusUnknownError" in done.stderr
    assert "rocm_patch" not in python(path).stderr

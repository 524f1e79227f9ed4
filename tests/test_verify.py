"""`rocm-patch verify`: real boxes in real processes, broken torch included, and nothing left running."""

import json
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import psutil
import pytest
import torch

from builds import torch_folder
from conftest import MACHINES, ROOT, clean_environ, python, rocm_patch
from rocm_patch.errors import UsageError
from rocm_patch.settings import from_environ
from rocm_patch.tools import verify
from rocm_patch.tools.boxes import BOXES

NAMES = (
    "start method is spawn", "environment variables set", "torch imports", "GPU available", "SafeConv2d works",
    "DataLoader with 0 workers", "DataLoader with 4 workers", "training loop completes",
    "no initialisation error in workers", "bypass in use",
)  # fmt: skip
MARK = "VERIFY_TEST_MARK"


@pytest.fixture
def no_gpu(tmp_path):
    """The environment of a machine without a GPU, whatever this one has; marked, so that its processes are found."""
    root = tmp_path / "root"
    root.mkdir()
    return {
        "ROCM_PATCH_SYSFS_ROOT": str(root), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1",
        MARK: uuid.uuid4().hex,
    }  # fmt: skip


def run(environ, **options):
    environ = clean_environ(**environ)
    return {box.box: box for box in verify.run(from_environ(environ), environ, **options)}


def states(boxes):
    return {name: box.state for name, box in boxes.items()}


def survivors(environ):
    """Processes of this test that still run after a while."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == environ[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.cmdline())
            except psutil.Error:
                continue
        if not found:
            return []
        time.sleep(0.05)
    return found


def test_ten_boxes_without_a_gpu(no_gpu):
    done = rocm_patch("verify", "--json", "--strict", check=False, **no_gpu)
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert all(set(box) == {"box", "state", "detail", "seconds"} for box in document["boxes"])
    assert tuple(box["box"] for box in document["boxes"]) == NAMES == tuple(BOXES)
    found = {box["box"]: box["state"] for box in document["boxes"]}
    not_run = {"GPU available", "no initialisation error in workers", "bypass in use"}
    assert found == {name: "not run" if name in not_run else "ticked" for name in NAMES}
    assert all(box["detail"] and "\n" not in box["detail"] for box in document["boxes"])
    details = {box["box"]: box["detail"] for box in document["boxes"]}
    assert torch.__version__ in details["torch imports"]
    assert "4 workers started by spawn" in details["DataLoader with 4 workers"]
    assert "rocm-patch verify --backend cpu" in details["bypass in use"]
    assert done.returncode == 1  # by --strict
    assert survivors(no_gpu) == []


def test_with_the_backend_forced_to_the_cpu_the_bypass_is_counted(no_gpu):
    done = rocm_patch("verify", "--backend", "cpu", **no_gpu)
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    for line, name in zip(lines, NAMES, strict=True):
        state = "not run" if name in ("GPU available", "no initialisation error in workers") else "ticked"
        assert line.startswith(f"{state:<8} {name}: ")
    assert "6 of 6 calls bypassed, 0 native (im2col, pointwise), under the policy bypass" in lines[-1]
    assert survivors(no_gpu) == []


def test_a_fault_in_native_convolutions_fails_what_uses_them(no_gpu):
    environ = {
        **no_gpu,
        "ROCM_PATCH_BACKEND": "cpu",
        "ROCM_PATCH_FAULT": "error:forward",
        "ROCM_PATCH_CONV": "native",
    }
    boxes = run(environ, only=("SafeConv2d works", "training loop completes", "bypass in use"))
    assert list(states(boxes).values()) == ["ticked", "failed", "not run"]
    assert boxes["training loop completes"].detail == "RuntimeError: miopenStatusUnknownError"
    assert "policy native" in boxes["bypass in use"].detail


def test_under_the_policy_guarded_native_and_bypassed_calls_are_told_apart(no_gpu):
    environ = {**no_gpu, "ROCM_PATCH_BACKEND": "cpu", "ROCM_PATCH_CONV": "guarded"}
    environ["ROCM_PATCH_FAULT"] = "error:forward:after=1"
    box = run(environ, only=("bypass in use",))["bypass in use"]
    assert box.state == "ticked"
    assert "1 of 6 calls bypassed, 5 native (native, pointwise), under the policy guarded" in box.detail


BROKEN = {
    "raises": ("raise ImportError('libamdhip64.so.5: cannot open\\nshared object file')",
               "ImportError: libamdhip64.so.5: cannot open ... shared object file"),
    "exits": ("sys.stderr.write('first\\nsecond\\n\\nlast'); sys.exit(3)",
              "ended with exit code 3; first | second | last"),
    "exits early without a word": ("os._exit(0)", "ended without an answer"),
    "is killed": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "is not torch": ("", "AttributeError: module 'torch' has no attribute '__version__'"),
    "hangs, with a child": ("subprocess.Popen(['sleep', '300']); time.sleep(300)", "no answer within 3 s"),
    "answers nonsense": ("open(sys.argv[3], 'w').write('{\"state\": \"ticked\"}'); os._exit(0)",
                         "gave an answer that cannot be read"),
    "crashes at exit": ("__version__ = '9'; atexit.register(os.kill, os.getpid(), signal.SIGABRT)",
                        "killed by SIGABRT; after it answered: ticked, torch 9 from "),
    "hangs at exit": ("__version__ = '9'; atexit.register(time.sleep, 300)",
                      "did not end within 3 s; after it answered: ticked, torch 9 from "),
}  # fmt: skip


def fake_torch(tmp_path, code):
    folder = tmp_path / "path" / "torch"
    folder.mkdir(parents=True)
    chatter = 'print(\'{"state": "ticked", "detail": "a lie"}\', flush=True)\n'
    imports = "import atexit, os, signal, subprocess, sys, time\n"
    (folder / "__init__.py").write_text(chatter + imports + textwrap.dedent(code))
    return {"PYTHONPATH": str(tmp_path / "path")}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_torch_fails_its_box_and_leaves_nothing_running(broken, no_gpu, tmp_path):
    code, detail = BROKEN[broken]
    seen = []
    boxes = run({**no_gpu, **fake_torch(tmp_path, code)}, timeout=3 if "hangs" in broken else 60, on_box=seen.append)
    assert seen == list(boxes.values())
    assert list(states(boxes).values()) == ["ticked", "ticked", "failed", *["not run"] * 7]
    assert boxes["torch imports"].detail.startswith(detail)
    assert boxes["bypass in use"].detail == "torch does not import here"
    assert survivors(no_gpu) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_verify_itself_is_ended(number, no_gpu, tmp_path):
    (tmp_path / "go").touch()
    started = tmp_path / "started"
    environ = fake_torch(tmp_path, f"open({str(started)!r}, 'w'); time.sleep(300)")
    code = "from rocm_patch.tools import verify; verify.run(verify.Settings())"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=clean_environ(**no_gpu, **environ), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    assert survivors(no_gpu) == []


def bare_environment(tmp_path, *entries):
    """A virtual environment that has only what lies in the given folders."""
    folder = tmp_path / "venv"
    python("-m", "venv", "--without-pip", str(folder))
    site = next(folder.glob("lib/python3.*/site-packages"))
    (site / "rest.pth").write_text("\n".join(entries))
    return folder


def test_without_torch_the_first_two_boxes_tick(no_gpu, tmp_path):
    folder = bare_environment(tmp_path, str(ROOT / "src"))
    code = (
        "import json, sys; from rocm_patch.settings import from_environ; from rocm_patch.tools import verify\n"
        "print(json.dumps(verify.document(verify.run(from_environ())))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [str(folder / "bin/python"), "-c", code], env=clean_environ(**no_gpu, VIRTUAL_ENV=str(folder)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    boxes = json.loads(done.stdout)["boxes"]
    assert [box["state"] for box in boxes] == ["ticked", "ticked", "failed", *["not run"] * 7]
    assert boxes[2]["detail"] == f"{folder}/bin/python has no torch"


def test_a_program_python_without_rocm_patch(no_gpu, tmp_path):
    """As with pipx: the boxes and their spawned children take rocm_patch from here."""
    entries = [entry for entry in sys.path if entry.endswith("-packages")]
    folder = bare_environment(tmp_path, *entries)
    environ = {**no_gpu, "VIRTUAL_ENV": str(folder), "ROCM_PATCH_BACKEND": "cpu"}
    plain = subprocess.run([str(folder / "bin/python"), "-c", "import rocm_patch"], capture_output=True, cwd="/")
    assert b"No module named 'rocm_patch'" in plain.stderr
    only = ("start method is spawn", "DataLoader with 4 workers")
    boxes = run(environ, only=only)
    assert states(boxes) == dict.fromkeys(only, "ticked"), boxes
    assert "started by spawn" in boxes["DataLoader with 4 workers"].detail


def test_an_amd_card_that_torch_does_not_see_is_a_failure(no_gpu, tmp_path):
    node = tmp_path / "root/sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True)
    (node / "properties").write_text("simd_count 72\nsimd_per_cu 2\ngfx_target_version 100100\nvendor_id 4098\n")
    (tmp_path / "root/dev").mkdir()
    (tmp_path / "root/dev/kfd").touch()
    boxes = run({**no_gpu, "HSA_XNACK": "1"}, only=("environment variables set", "GPU available"))
    assert boxes["GPU available"].state == "failed"
    assert "gfx1010; next: rocm-patch doctor" in boxes["GPU available"].detail
    variables = boxes["environment variables set"]
    assert variables.state == "ticked"
    assert variables.detail == "2 as planned; HSA_XNACK=1 is the user's own, 0 was planned"


def test_the_plan_is_judged_by_what_the_launch_has_found(no_gpu, tmp_path):
    """Here it hides the processor's GPU by a variable that, once set, would change the plan itself."""
    site = torch_folder(tmp_path, "2.4.1+rocm6.1", "6.1.40091", targets=("gfx900", "gfx1030", "gfx1100")).parent
    card = {"ROCM_PATCH_SYSFS_ROOT": str(MACHINES / "raphael_and_rx_7600"), "PYTHONPATH": str(site)}
    environ = {**no_gpu, **card, "ROCM_PATCH_CACHE_DIR": str(tmp_path)}
    del environ["HIP_VISIBLE_DEVICES"]
    (box,) = run(environ, only=NAMES[1:2]).values()
    assert (box.state, box.detail) == ("ticked", "2 as planned")


def test_a_variable_that_does_not_reach_the_program_is_a_failure(no_gpu, tmp_path):
    """A sitecustomize of the user's own runs before every program."""
    (tmp_path / "sitecustomize.py").write_text("import os; del os.environ['HSA_XNACK']")
    (box,) = run({**no_gpu, "PYTHONPATH": str(tmp_path)}, only=NAMES[1:2]).values()
    assert (box.state, box.detail) == ("failed", "planned, but not so in the program's environment: HSA_XNACK")
    (box,) = run({**no_gpu, "ROCM_PATCH_PROFILE": "none"}, only=NAMES[1:2]).values()
    assert (box.state, box.detail) == ("ticked", "profile none asks for none")


def test_switched_off_or_with_another_start_method_boxes_say_so(no_gpu):
    first_two = NAMES[:2]
    boxes = run({**no_gpu, "ROCM_PATCH": "0"}, only=first_two)
    assert [(box.state, box.detail) for box in boxes.values()] == [("not run", "switched off by ROCM_PATCH=0")] * 2
    box = run({**no_gpu, "ROCM_PATCH_START_METHOD": "fork"}, only=first_two[:1])[first_two[0]]
    assert box.state == "not run" and "start method fork was asked for" in box.detail


def test_a_timeout_must_leave_time():
    with pytest.raises(UsageError, match="leaves no time"):
        verify.run(from_environ({}), timeout=0)


def test_the_boxes_can_fail():
    """Each box meets the thing that it is there to find."""
    code = """
    import multiprocessing
    from rocm_patch import enable_miopen_bypass
    from rocm_patch.tools.boxes import BOXES, Failed, Samples

    def failure(name):
        try:
            print("ticked:", BOXES[name]())
        except Failed as error:
            print(error)

    plain = multiprocessing.Process
    multiprocessing.Process = multiprocessing.get_context("fork").Process
    failure("start method is spawn")
    multiprocessing.Process = plain

    import torch
    from rocm_patch.conv import NATIVE
    from rocm_patch.dispatch import Route
    from rocm_patch.trust.choose import Choice, Chooser

    run = Route.run
    Route.run = lambda self, *operands: run(self, *operands) * 1.001
    failure("SafeConv2d works")
    Route.run = run
    Samples.__len__ = lambda self: 31
    failure("DataLoader with 0 workers")
    Samples.__len__ = lambda self: 32
    Samples.__getitem__ = lambda self, index: (torch.zeros(3, 8, 8), index, 1, 0)
    failure("DataLoader with 0 workers")
    torch.optim.Adam.step = lambda self: None
    failure("training loop completes")
    enable_miopen_bypass(backend="cpu")
    Chooser.bypass = lambda self, spec, why: Choice(NATIVE, why)
    failure("bypass in use")
    """
    lines = python("-c", textwrap.dedent(code), ROCM_PATCH_BACKEND="cpu").stdout.splitlines()
    expected = [
        "a child process has its parent's modules: it was forked", "forward of one tap, float32 is wrong: ",
        "not every sample arrived once in epoch 1: ", "arrived with wrong values", "the loss fell from ",
        "0 of 6 calls bypassed, 6 native (native), under the policy bypass",
    ]  # fmt: skip
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line and "ticked" not in line

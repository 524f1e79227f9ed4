"""`rocm-patch probe`: what it finds to prove, what it keeps, and how it ends."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from conftest import clean_environ, python, rocm_patch
from rocm_patch.conv.of_model import specs_of_model
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.trust.store import Store

MODEL = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1, stride=2))

def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3)
        def forward(self, a, b):
            return self.conv(a) + self.conv(b)
    return Two()

linear = nn.Linear(2, 2)
"""


def probe(tmp_path, *arguments, check=True, **environ):
    """(exit code, rows by (direction, strategy, label), stderr)."""
    (tmp_path / "nets.py").write_text(MODEL)
    done = python(
        "-m", "rocm_patch", "probe", "--backend", "cpu", "--json", *arguments, cwd=tmp_path, check=False,
        ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"), **environ,
    )  # fmt: skip
    if not done.stdout:
        return done.returncode, None, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1 and document["device"] == "cpu"
    return done.returncode, document["rows"], done.stderr


def networks():
    return [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2)),
            (2, 3, 9, 9),
        ),
        (nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.ConvTranspose1d(3, 2, 4, stride=2)), (2, 2, 11)),
        (nn.Conv3d(2, 3, (1, 2, 3), bias=False), (1, 2, 4, 5, 6)),
    ]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_a_models_specs_are_those_that_the_dispatcher_meets(index, channels_last):
    import rocm_patch as package

    model, shape = networks()[index]
    x = torch.randn(shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last and last is not None:
        x = x.contiguous(memory_format=last)
        model = model.to(memory_format=last)
    found = specs_of_model(model, [shape], "float32", "cpu", channels_last)
    package.enable_miopen_bypass(backend="cpu")
    model(x.requires_grad_()).sum().backward()
    met = {route.spec for route in ACTIVE["CPU"].routes.taken()}
    # The gradient that reaches the last layer may be laid out in another way than its forward.
    assert {spec for spec in met if spec.direction == "forward"} <= set(found)
    assert met <= set(found) and len(found) == 3 * len([m for m in model.modules() if hasattr(m, "stride")])
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_model_is_proven_once(tmp_path):
    code, rows, _ = probe(tmp_path, "nets:small", "--input", "2x3x8x8")
    assert code == 0 and {row["kind"] for row in rows} == {"ok"} and all(row["is_new"] for row in rows)
    # Two convolutions in three directions: natively, and in the ways that are likely to be fast.
    assert {row["strategy"] for row in rows} >= {"native", "im2col", "pointwise"}
    assert sum(row["strategy"] == "native" for row in rows) == 2 * 3 and len(rows) >= 2 * 3 * 2
    assert all(row["seconds"] > 0 and row["error"] < 1e-4 for row in rows)
    code, again, _ = probe(tmp_path, "nets:small", "--input", "2x3x8x8")
    assert code == 0 and not any(row["is_new"] for row in again)
    code, forced, _ = probe(tmp_path, "nets:small", "--input", "2x3x8x8", "--again")
    assert code == 0 and all(row["is_new"] for row in forced)


def test_backward_is_told_apart_from_forward(tmp_path):
    """What fails is remembered, is the exit code, and is what a program then avoids."""
    code, rows, said = probe(tmp_path, "nets:small", "--input", "2x3x8x8", ROCM_PATCH_FAULT="segfault:grad_weight")
    assert code == 1
    kinds = {(row["direction"], row["strategy"]): row["kind"] for row in rows}
    assert kinds.pop(("grad_weight", "native")) == "crash" and set(kinds.values()) == {"ok"}
    assert "crash native grad_weight" in said
    bad = [row for row in Store(tmp_path / "cache").rows() if row.verdict.is_bad]
    assert len(bad) == 2 and all("SIGSEGV" in row.verdict.evidence for row in bad)
    # A crash on this machine: the program's own convolution, not probed, is tried apart from it; the probed are not.
    program = (
        "import torch, nets\n"
        "nets.small()(torch.randn(2, 3, 8, 8)).sum().backward()\n"
        "import sys\n"
        "routes = sys.modules['rocm_patch.overrides.aten'].ACTIVE['CPU'].routes\n"
        "print(sorted({(r.spec.direction, r.strategy.name) for r in routes.taken()}), routes.fault.met)"
    )
    done = rocm_patch(
        "run", "--backend", "cpu", "--conv", "guarded", "-c", program, cwd=tmp_path,
        ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"), ROCM_PATCH_FAULT="segfault:grad_weight",
    )  # fmt: skip
    served = "[('forward', 'native'), ('grad_input', 'native'), ('grad_weight', 'im2col')"
    assert done.stdout.startswith(served) and done.stdout.endswith(" 0\n")


def test_two_inputs_and_half_types(tmp_path):
    code, rows, _ = probe(
        tmp_path,
        "nets:two_inputs",
        "--input",
        "1x2x9",
        "--input",
        "1x2x9",
        "--dtype",
        "bfloat16",
        "--dtype",
        "float64",
    )
    assert len(rows) >= 2 * 3 * 2 and {row["label"].split()[-2] for row in rows} == {"bfloat16", "float64"}
    bad = {(row["direction"], row["strategy"], row["label"].split()[-2]) for row in rows if row["kind"] != "ok"}
    # torch 1.13's transposed convolution in bfloat16 raises or is wrong on the CPU.
    is_old = torch.__version__.startswith("1.")
    assert bad == ({("grad_input", "native", "bfloat16")} if is_old else set()) and code == is_old


def test_a_scripts_convolutions_are_found_and_its_output_kept_apart(tmp_path):
    (tmp_path / "train.py").write_text(
        "import sys, time, torch, nets\n"
        "print('hello from', sys.argv[1])\n"
        "net = nets.small()\n"
        "while True:\n"
        "    net(torch.randn(2, 3, 8, 8)).sum().backward(); time.sleep(0.1)\n"
    )
    code, rows, said = probe(tmp_path, "--seconds", "12", "train.py", "--", "me")
    assert code == 0 and "hello from me" in said
    assert {row["direction"] for row in rows} == {"forward", "grad_input", "grad_weight"}


def test_an_interrupted_probe_goes_on(tmp_path):
    command = [sys.executable, "-m", "rocm_patch", "probe", "--suite", "--backend", "cpu"]
    environ = clean_environ(ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"))
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(Store(tmp_path / "cache").rows()) < 5 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    kept = len(Store(tmp_path / "cache").rows())
    assert kept >= 5
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(Store(tmp_path / "cache").rows()) <= kept and time.monotonic() < deadline:
        time.sleep(0.2)
    process.kill()
    process.wait()
    rows = Store(tmp_path / "cache").rows()
    assert len(rows) > kept and len({(row.spec, row.strategy) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to probe"),
        (["nets:small", "--suite"], "two things at once"),
        (["nets:small"], "the inputs of nets:small are not known"),
        (["nets:none", "--input", "1x3x8x8"], "cannot make the model 'nets:none'"),
        (["no_module:x", "--input", "1x3x8x8"], "cannot make the model"),
        (["nets:small", "--input", "1x2x8x8"], "does not take inputs of 1x2x8x8"),
        (["nets:small", "--input", "eight"], "not the shape of an input"),
        (["nets:linear", "--input", "2x2"], "no convolution"),
        (["nets:small", "--input", "1x3x8x8", "--dtype", "int8"], "unknown type 'int8'"),
        (["missing.py"], "no such file"),
        (["empty.py", "--seconds", "20"], "made no convolution"),
    ],
)
def test_what_cannot_be_probed_is_said_with_a_hint(tmp_path, arguments, message):
    (tmp_path / "empty.py").write_text("print('nothing')\n")
    code, rows, said = probe(tmp_path, *arguments)
    assert code == 2 and rows is None
    assert message in said and "hint:" in said and "Traceback" not in said


def test_the_table_names_what_failed(tmp_path):
    (tmp_path / "nets.py").write_text(MODEL)
    done = python(
        "-m", "rocm_patch", "probe", "nets:small", "--input", "2x3x8x8", "--backend", "cpu", cwd=tmp_path,
        check=False, ROCM_PATCH_CACHE_DIR=str(tmp_path / "cache"), ROCM_PATCH_FAULT="nan:forward",
    )  # fmt: skip
    assert done.returncode == 1
    assert "forward      native     2 wrong" in done.stdout and " proven, 0 of them before; 2 failed" in done.stdout
    assert "wrong    native     forward 2x3x8x8 by 4x3x3x3" in done.stdout


def test_specs_survive_json():
    for spec in specs_of_model(networks()[1][0], [(2, 2, 11)], "float16", "cpu", False):
        assert ConvSpec.from_json(spec.to_json(), "cpu") == spec
    with pytest.raises(ValueError, match="not a convolution"):
        ConvSpec.from_json("[1]")
    with pytest.raises(ValueError):
        ConvSpec.from_json("{")

"""enable_all_patches and its parts: what they change, what they say, and the way back."""

import logging
import multiprocessing
import os

import pytest

import rocm_patch
from conftest import PATCHED_VARIABLES, ROOT, python
from rocm_patch.errors import TorchMissingError, UsageError
from rocm_patch.machine.build import find_build

NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # `import torch` raises ModuleNotFoundError then


@pytest.fixture(autouse=True)
def _start_method_stays():
    before = multiprocessing.get_start_method(allow_none=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_all_patches_read_as_a_mapping_and_print_as_a_table():
    status = rocm_patch.enable_all_patches(backend="cpu")
    assert list(status) == ["multiprocessing", "environment", "dataloader", "miopen_bypass"]
    assert all(status.values()) and len(status) == 4
    assert status["dataloader"].applied and "fork server" in status["dataloader"].why
    lines = str(status).splitlines()
    assert len(lines) == 4 and all("applied" in line for line in lines)
    assert multiprocessing.get_start_method() == "spawn"
    assert str(rocm_patch.patch_status()) == str(status)


def test_disabling_restores_the_very_objects():
    import torch
    from torch.utils.data import DataLoader

    init, forward = DataLoader.__init__, torch.nn.Conv2d._conv_forward
    environ, start_method = dict(os.environ), multiprocessing.get_start_method(allow_none=True)
    rocm_patch.enable_all_patches(backend="cpu")
    rocm_patch.patch_torch_nn()
    assert DataLoader.__init__ is not init
    status = rocm_patch.disable_all_patches()
    assert not any(status.values())
    assert DataLoader.__init__ is init and torch.nn.Conv2d._conv_forward is forward
    assert dict(os.environ) == environ
    assert multiprocessing.get_start_method(allow_none=True) == start_method
    assert not any(rocm_patch.disable_all_patches().values())


def test_everything_is_idempotent(caplog):
    from torch.utils.data import DataLoader

    rocm_patch.enable_all_patches(backend="cpu")
    init, status = DataLoader.__init__, str(rocm_patch.patch_status())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rocm_patch"):
        rocm_patch.enable_all_patches(backend="cpu")
    assert DataLoader.__init__ is init and str(rocm_patch.patch_status()) == status
    assert not caplog.records


def test_other_arguments_warn_and_take_effect_and_the_first_original_survives(caplog):
    from torch.utils.data import DataLoader

    init = DataLoader.__init__
    rocm_patch.enable_all_patches(backend="cpu")
    caplog.clear()
    rocm_patch.enable_all_patches(backend="cpu", conv="im2col", start_method="forkserver", profile="none")
    assert len(caplog.records) == 4
    status = rocm_patch.patch_status()
    assert "im2col" in status["miopen_bypass"].why and "forkserver" in status["dataloader"].why
    assert multiprocessing.get_start_method() == "forkserver"
    assert not status["environment"] and "HSA_XNACK" not in os.environ
    rocm_patch.disable_all_patches()
    assert DataLoader.__init__ is init


@pytest.mark.parametrize(
    "arguments",
    [{"backend": "vulkan"}, {"conv": "fast"}, {"start_method": "vfork"}, {"profile": "gaming"},
     {"miopen_strategy": "best"}],
)  # fmt: skip
def test_an_unknown_argument_applies_nothing(arguments):
    environ = dict(os.environ)
    with pytest.raises(UsageError, match="unknown .*\nhint: "):
        rocm_patch.enable_all_patches(**arguments)
    assert not any(rocm_patch.patch_status().values()) and dict(os.environ) == environ


def test_an_unknown_variable_is_named(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_BACKEND", "vulkan")
    with pytest.raises(UsageError, match="unknown backend 'vulkan'.*\nhint: .*ROCM_PATCH_BACKEND"):
        rocm_patch.enable_all_patches()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("ROCM_PATCH", "0")
    status = rocm_patch.enable_all_patches(backend="cpu")
    assert not any(status.values())
    assert all("ROCM_PATCH=0" in entry.why for entry in status.values())
    assert rocm_patch.setup_environment() == () and not rocm_patch.patch_dataloader()
    assert not rocm_patch.enable_miopen_bypass(backend="cpu")


def test_without_torch_nothing_is_applied_and_one_warning_says_so():
    code = (
        "import os, multiprocessing; before = dict(os.environ)\n"
        "import rocm_patch\n"
        "status = rocm_patch.enable_all_patches()\n"
        "assert not any(status.values()), status\n"
        "assert dict(os.environ) == before\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None\n"
        "print(status)\n"
    )
    done = python("-S", "-c", code, PYTHONPATH=str(ROOT / "src"))  # -S: no site-packages, so no torch
    assert done.stdout.count("torch is not installed") == 4
    assert done.stderr.count("hint:") == 1 and "no patch was applied" in done.stderr


@pytest.mark.parametrize("call", ["patch_dataloader()", "enable_miopen_bypass()"])
def test_a_patch_that_needs_torch_says_so(call):
    code = NO_TORCH + (
        "import rocm_patch\n"
        "try:\n"
        f"    rocm_patch.{call}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "assert not any(rocm_patch.patch_status().values())\n"
    )
    done = python("-c", code)
    assert "torch cannot be imported" in done.stdout and "hint:" in done.stdout
    assert issubclass(TorchMissingError, ImportError)


def test_setup_multiprocessing_before_torch_is_silent_and_true():
    code = (
        "import multiprocessing, warnings; warnings.simplefilter('error')\n"
        "from rocm_patch import setup_multiprocessing\n"
        "assert setup_multiprocessing() is True and multiprocessing.get_start_method() == 'spawn'\n"
        "assert setup_multiprocessing() is True\n"
    )
    done = python("-c", code)
    assert done.stderr == ""


def test_setup_multiprocessing_after_torch_warns_and_takes_effect():
    import torch  # noqa: F401

    with pytest.warns(RuntimeWarning, match="torch is already imported(.|\n)*hint:") as caught:
        assert rocm_patch.setup_multiprocessing() is True
    assert caught[0].filename == __file__
    assert multiprocessing.get_start_method() == "spawn"


def test_a_start_method_that_the_program_set_later_is_left_alone():
    rocm_patch.enable_all_patches(backend="cpu")
    multiprocessing.set_start_method("forkserver", force=True)
    rocm_patch.disable_all_patches()
    assert multiprocessing.get_start_method() == "forkserver"


def test_setup_environment_reports_each_variable_and_the_users_value_wins(monkeypatch):
    monkeypatch.setenv("HSA_XNACK", "1")
    changes = rocm_patch.setup_environment()
    assert [change.name for change in changes] == list(PATCHED_VARIABLES)
    assert os.environ["HSA_OVERRIDE_GFX_VERSION"] == "10.3.0" and os.environ["HSA_XNACK"] == "1"
    kept = changes[-1]
    assert not kept.changes and kept.found == "1" and "HSA_XNACK=1 kept" in str(kept)
    assert all(change.why and change.source for change in changes)
    rocm_patch.disable_all_patches()
    assert os.environ["HSA_XNACK"] == "1" and "HSA_USE_SVM" not in os.environ


def test_a_variable_that_the_program_changed_is_left_alone(monkeypatch):
    rocm_patch.setup_environment()
    monkeypatch.setenv("HSA_USE_SVM", "1")
    rocm_patch.disable_all_patches()
    assert os.environ["HSA_USE_SVM"] == "1"


def test_without_an_amd_card_the_bypass_is_off_unless_asked_for(monkeypatch):
    entry = rocm_patch.enable_miopen_bypass()
    assert not entry and f"{find_build().kind} build" in entry.why
    assert entry.why == rocm_patch.patch_status()["miopen_bypass"].why
    assert not rocm_patch.enable_miopen_bypass(backend="hip")
    monkeypatch.setenv("ROCM_PATCH_BACKEND", "cpu")
    monkeypatch.setenv("ROCM_PATCH_CONV", "im2col")
    assert "im2col on cpu" in rocm_patch.enable_miopen_bypass().why


def test_the_log_variable_speaks_on_stderr():
    code = (
        "import rocm_patch, torch; rocm_patch.enable_miopen_bypass(backend='cpu')\n"
        "torch.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2))\n"
    )
    done = python("-c", code, ROCM_PATCH_LOG="info")
    assert done.stderr.strip() == "rocm-patch: forward 1x1x3x3 by 1x1x2x2 float32 cpu -> depthwise (policy bypass)"
    assert python("-c", code).stderr == ""


def test_print_bypass_report(capsys):
    import torch
    from torch import nn

    rocm_patch.enable_miopen_bypass(backend="cpu")
    for _ in range(3):
        torch.conv2d(torch.ones(1, 1, 19, 23), torch.ones(1, 1, 2, 2))
    rocm_patch.print_bypass_report(nn.Sequential(nn.Conv2d(1, 1, 1)))
    out = capsys.readouterr().out
    assert "0 layers are Safe ones, 1 convolution layers were left" in out
    assert "3  depthwise  forward 1x1x19x23 by 1x1x2x2 float32 cpu (policy bypass)" in out

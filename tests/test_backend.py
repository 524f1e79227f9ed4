"""Where the convolution override is on: the design's table."""

import shutil
from pathlib import Path

import pytest

from conftest import MACHINES
from rocm_patch.machine.backend import decide
from rocm_patch.machine.build import TorchBuild
from rocm_patch.machine.hardware import read_machine
from rocm_patch.settings import Settings

HIP = TorchBuild(Path("/nowhere/torch"), "2.6.0+rocm6.1", "6.1", None)
CPU = TorchBuild(Path("/nowhere/torch"), "2.13.0+cpu", None, None)
CUDA = TorchBuild(Path("/nowhere/torch"), "2.11.0+cu130", None, "13.0")


@pytest.mark.parametrize(
    ("machine", "build", "settings", "expected"),
    [
        ("rx_5600_xt", HIP, {}, ("hip", "bypass")),
        ("two_cards", HIP, {}, ("hip", "bypass")),
        ("rx_7900_xtx", HIP, {}, ("hip", "guarded")),
        ("cpu_node_only", HIP, {}, ("hip", "guarded")),
        ("wsl", HIP, {}, ("hip", "guarded")),
        ("cpu_only", HIP, {}, (None, "native")),
        ("rx_5600_xt", CPU, {}, (None, "native")),
        ("cpu_only", CUDA, {}, (None, "native")),
        ("cpu_only", CUDA, {"backend": "cuda"}, ("cuda", "bypass")),
        ("cpu_only", CPU, {"backend": "cpu"}, ("cpu", "bypass")),
        ("cpu_only", CPU, {"backend": "cpu", "conv": "guarded"}, ("cpu", "guarded")),
        ("cpu_only", CPU, {"backend": "cuda"}, (None, "native")),
        ("rx_7900_xtx", HIP, {"backend": "cpu"}, ("cpu", "bypass")),
        ("rx_7900_xtx", HIP, {"backend": "hip"}, ("hip", "guarded")),
        ("rx_5600_xt", HIP, {"conv": "native"}, ("hip", "native")),
        ("rx_7900_xtx", HIP, {"conv": "im2col"}, ("hip", "bypass")),
        ("rx_5600_xt", HIP, {"enabled": False}, (None, "native")),
        ("rx_5600_xt", None, {}, (None, "native")),
    ],
)
def test_where_the_override_is_on(machine, build, settings, expected):
    activation = decide(read_machine(str(MACHINES / machine)), build, Settings(**settings))
    assert (activation.backend, activation.policy) == expected
    assert activation.why
    assert activation.dispatch_key == {"hip": "CUDA", "cuda": "CUDA", "cpu": "CPU", None: None}[expected[0]]


def test_types_whose_native_convolutions_are_known_to_crash():
    # https://github.com/Comfy-Org/ComfyUI/pull/15615: float16 convolutions segfault inside MIOpen on gfx103x.
    rdna2 = read_machine(str(MACHINES / "rx_6700_xt"))
    assert decide(rdna2, HIP, Settings()).bypass_dtypes == ("float16",)
    assert decide(rdna2, HIP, Settings(conv="guarded")).bypass_dtypes == ("float16",)
    assert decide(rdna2, CPU, Settings(backend="cpu")).bypass_dtypes == ()
    assert decide(read_machine(str(MACHINES / "rx_7900_xtx")), HIP, Settings()).bypass_dtypes == ()


def test_an_integrated_gpu_beside_a_card_decides_nothing(tmp_path):
    shutil.copytree(MACHINES / "raphael_and_rx_7600", tmp_path, dirs_exist_ok=True, symlinks=True)
    assert decide(read_machine(str(tmp_path)), HIP, Settings()).bypass_dtypes == ()
    # Where the card is hidden, the integrated one is what programs see: RDNA2, whose float16 crashes.
    shown = decide(read_machine(str(tmp_path)), HIP, Settings(), {"HIP_VISIBLE_DEVICES": "0"})
    assert shown.bypass_dtypes == ("float16",)


def test_a_hidden_rdna1_card_decides_nothing():
    machine = read_machine(str(MACHINES / "two_cards"))
    assert decide(machine, HIP, Settings(), {"HIP_VISIBLE_DEVICES": "1"}).policy == "guarded"
    assert decide(machine, HIP, Settings(), {"HIP_VISIBLE_DEVICES": "0"}).policy == "bypass"

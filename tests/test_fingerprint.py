"""What a verdict holds for: each fact that changes how a convolution runs changes the fingerprint, no other does."""

import dataclasses
import os

import pytest

from builds import torch_folder
from conftest import MACHINES, python
from rocm_patch.machine.build import read_build
from rocm_patch.machine.hardware import read_machine
from rocm_patch.trust.fingerprint import Fingerprint, fingerprint

pytestmark = pytest.mark.torch_free

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"


def machine(name):
    return read_machine(str(MACHINES / name), home="/")


@pytest.fixture
def hip(tmp_path):
    return read_build(torch_folder(tmp_path / "hip", "1.13.1+rocm5.2", hip="5.2.21151", targets=["gfx1030"]))


def test_a_card_by_its_real_name_with_all_that_drives_it(hip):
    found = fingerprint("hip", 0, machine("rx_5600_xt"), hip, {OVERRIDE: "10.3.0"}, "AMD Radeon Graphics")
    there = machine("rx_5600_xt")
    assert found == Fingerprint("gfx1010", "10.3.0", "1.13.1+rocm5.2", "hip 5.2.21151", there.driver, there.kernel)
    assert there.driver and there.kernel
    text = str(found)
    assert "\n" not in text and all(part in text for part in ("gfx1010", "10.3.0", "1.13.1+rocm5.2", there.kernel))


def test_each_fact_changes_it(hip, tmp_path):
    there = machine("rx_5600_xt")
    first = fingerprint("hip", 0, there, hip, {})
    newer = read_build(torch_folder(tmp_path / "newer", "1.13.1+rocm5.2", hip="5.2.99999"))
    other = read_build(torch_folder(tmp_path / "other", "2.0.0+rocm5.2", hip="5.2.21151"))
    changed = [
        fingerprint("hip", 0, there, other, {}),
        fingerprint("hip", 0, there, newer, {}),
        fingerprint("hip", 0, dataclasses.replace(there, driver="6.8.5"), hip, {}),
        fingerprint("hip", 0, dataclasses.replace(there, kernel="7.0"), hip, {}),
        fingerprint("hip", 0, there, hip, {OVERRIDE: "10.3.0"}),
        fingerprint("hip", 0, machine("rx_6700_xt"), hip, {}),
        fingerprint("cpu", 0, there, hip, {}),
    ]
    assert len({entry.id for entry in (first, *changed)}) == len(changed) + 1
    assert fingerprint("hip", 0, machine("rx_5600_xt"), hip, {"PATH": "x"}, "whatever") == first


def test_the_index_counts_what_the_process_sees(hip):
    two = machine("two_cards")

    def device(index, **environ):
        return fingerprint("hip", index, two, None, environ).device

    assert [device(0), device(1), device(2)] == ["gfx1010", "gfx1100", "unknown"]
    assert device(0, HIP_VISIBLE_DEVICES="1") == "gfx1100" and device(1, HIP_VISIBLE_DEVICES="1") == "unknown"
    assert device(0, ROCR_VISIBLE_DEVICES="1,0") == "gfx1100" and device(1, ROCR_VISIBLE_DEVICES="1,0") == "gfx1010"
    assert device(-1) == "unknown"


def test_a_chip_that_the_build_leaves_out_is_not_counted(hip):
    """gfx1100 is newer than ROCm 5.2, which lists it under an override alone."""
    two = machine("two_cards")
    turned = dataclasses.replace(two, gpus=two.gpus[::-1])
    assert fingerprint("hip", 0, turned, hip, {}).device == "gfx1010"
    assert fingerprint("hip", 0, turned, hip, {OVERRIDE: "10.3.0"}).device == "gfx1100"


def test_the_override_of_a_node_comes_before_the_general_one():
    two = machine("two_cards")
    nodes = [gpu.thunk_node for gpu in two.gpus]
    environ = {OVERRIDE: "11.0.0", f"{OVERRIDE}_{nodes[0]}": "10.3.0"}
    assert [fingerprint("hip", index, two, None, environ).override for index in (0, 1)] == ["10.3.0", "11.0.0"]
    assert fingerprint("hip", 1, two, None, {f"{OVERRIDE}_{nodes[0]}": "10.3.0"}).override == ""


def test_a_machine_without_topology(hip):
    found = fingerprint("hip", 0, machine("wsl"), hip, {OVERRIDE: "10.3.0"})
    assert found.device == "unknown" and found.override == "10.3.0" and found.runtime == "hip 5.2.21151"
    named = fingerprint("hip", 0, machine("wsl"), hip, {}, "AMD Radeon RX 7900 XTX")
    assert named.device == "unknown AMD Radeon RX 7900 XTX"


def test_nvidia_and_the_processor(tmp_path):
    build = read_build(torch_folder(tmp_path, "2.13.0+cu130", cuda="13.0"))
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("580.95.05\n")
    there = machine("nvidia")
    found = fingerprint("cuda", 3, there, build, {OVERRIDE: "10.3.0"}, "NVIDIA H200", root=str(tmp_path))
    assert found == Fingerprint("NVIDIA H200", "", "2.13.0+cu130", "cuda 13.0", "580.95.05", there.kernel)
    assert fingerprint("cpu", 0, there, build, {OVERRIDE: "10.3.0"}) == Fingerprint(
        "cpu", "", "2.13.0+cu130", "", "", there.kernel
    )
    assert fingerprint("cpu", 0, there, None, {}).torch == ""


def test_this_machine():
    found = fingerprint("cpu", 0, read_machine(), None, os.environ)
    assert found.kernel == os.uname().release


def test_as_text_and_back():
    one = Fingerprint("gfx1010", "10.3.0", "1.13.1", "hip 5.2", "in-tree", "6.8 \udcff grün")
    assert Fingerprint.from_json(one.to_json()) == one and Fingerprint.from_json(one.to_json()).id == one.id
    assert len(one.id) == 16 and int(one.id, 16) >= 0
    # What is in one field is not the same in another.
    assert dataclasses.replace(one, override="", torch="10.3.01.13.1").id != one.id
    for text in (
        "",
        "[]",
        "{}",
        "null",
        '{"device": 1}',
        one.to_json()[:-1],
        one.to_json().replace("kernel", "core"),
    ):
        with pytest.raises(ValueError):
            Fingerprint.from_json(text)


def test_it_starts_without_torch():
    python(
        "-c", "import sys, rocm_patch.trust.store, rocm_patch.trust.fingerprint; assert 'torch' not in sys.modules"
    )

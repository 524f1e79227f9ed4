"""The environment plan: what each card gets with a native and with a foreign build, and what the user's own do."""

import os
import shutil
import stat
import subprocess
import venv
import zipfile

import pytest

from builds import torch_build
from conftest import MACHINES, PATCHED_VARIABLES
from rocm_patch.machine.environment import apply, plan
from rocm_patch.machine.fit import native_torch_command
from rocm_patch.machine.hardware import read_machine
from rocm_patch.settings import Settings

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
DOCUMENT = {"MIOPEN_DEBUG_CONV_IMPLICIT_GEMM": "1", OVERRIDE: "10.3.0", "HSA_USE_SVM": "0", "HSA_XNACK": "0"}
THREE = {name: value for name, value in DOCUMENT.items() if name != OVERRIDE}
# The arch lists of pytorch.org's wheels: pytorch/builder@release/1.13 and release/2.4 manywheel/build_docker.sh.
LIST_1_13 = ("gfx900", "gfx906", "gfx908", "gfx90a", "gfx1030")
LIST_2_4 = (*LIST_1_13, "gfx942", "gfx1100")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_CACHE_DIR", str(tmp_path / "cache"))


def one_gpu(root, number, *, simds=72, node=1, home=None):
    """A machine with a processor, and a card of that `gfx_target_version` as its last node."""
    cpu = root / "sys/class/kfd/kfd/topology/nodes/0"
    cpu.mkdir(parents=True, exist_ok=True)
    (cpu / "properties").write_text("cpu_cores_count 16\nsimd_count 0\ngfx_target_version 0\nvendor_id 0\n")
    add_gpu(root, number, simds=simds, node=node)
    (root / "dev").mkdir(exist_ok=True)
    (root / "dev/kfd").touch()
    return read_machine(str(root), home)


def add_gpu(root, number, *, simds=72, node=1):
    folder = root / f"sys/class/kfd/kfd/topology/nodes/{node}"
    folder.mkdir(parents=True)
    fields = {"simd_count": simds, "simd_per_cu": 2, "gfx_target_version": number, "vendor_id": 4098, "device_id": 1}
    (folder / "properties").write_text("".join(f"{name} {value}\n" for name, value in fields.items()))


def planned(machine, build, environ=None, **settings):
    return {c.name: c.value for c in plan(machine, build, Settings(**settings), environ or {}).changes if c.changes}


OLD, MIDDLE = ("1.13.1+rocm5.2", "5.2.21151", LIST_1_13), ("2.4.1+rocm6.1", "6.1.40091", LIST_2_4)
NAVI_1X = (
    "https://github.com/pytorch/pytorch/issues/106728: 10.3.0 works up to torch 1.13.1+rocm5.2, faults from 2.0 on"
)
NAVI_2X = "https://llvm.org/docs/AMDGPUUsage.html: gfx10-3-generic, code of gfx1030 to gfx1036 is one instruction set"
NAVI_3X = "https://github.com/lllyasviel/Fooocus/issues/1288, https://github.com/ROCm/legacy-rocm-build/issues/2500"
RENOIR = "https://github.com/ROCm/hip/issues/3282"
RAVEN = "https://github.com/HardAndHeavy/comfyui-rocm-docker/issues/3"
PHOENIX = "https://github.com/ROCm/TheRock/issues/1184: 11.0.0 page-faults, 11.0.2 locks the machine up"
STRIX = "https://github.com/ROCm/legacy-rocm-build/issues/5824: 11.0.0 faults on the first tensor"
NO_NEIGHBOUR = "no chip of the same instruction set is in any wheel (AMDGPUUsage, processor table)"
UNREPORTED = "no report of a working override was found"
# What a build without code for the card gets. Written from the sources beside each row, not from the catalog.
FOREIGN = [
    ("gfx803", 80003, OLD, {}, NO_NEIGHBOUR),
    ("gfx900", 90000, ("2.10.0+rocm7.2", "7.2", ("gfx1100",)), {}, NO_NEIGHBOUR),
    ("gfx902", 90002, OLD, {OVERRIDE: "9.0.0", "HSA_ENABLE_SDMA": "0"}, RAVEN),
    ("gfx906", 90006, ("2.12.0+rocm7.14", "7.14", ("gfx90a",)), {}, NO_NEIGHBOUR),
    ("gfx90c", 90012, MIDDLE, {OVERRIDE: "9.0.0"}, RENOIR),
    ("gfx908", 90008, ("2.6.0+rocm6.1", "6.1", ("gfx1100",)), {}, NO_NEIGHBOUR),
    ("gfx90a", 90010, ("2.6.0+rocm6.1", "6.1", ("gfx1100",)), {}, NO_NEIGHBOUR),
    ("gfx942", 90402, OLD, {}, NO_NEIGHBOUR),
    ("gfx950", 90500, MIDDLE, {}, NO_NEIGHBOUR),
    ("gfx1010", 100100, OLD, DOCUMENT, NAVI_1X),
    ("gfx1010", 100100, ("1.12.1+rocm5.1.1", "5.1.20531", LIST_1_13), DOCUMENT, NAVI_1X),
    ("gfx1010", 100100, MIDDLE, THREE, NAVI_1X),
    ("gfx1010", 100100, ("1.13.1+rocm5.3", "5.3.22061", LIST_1_13), THREE, NAVI_1X),
    ("gfx1011", 100101, OLD, DOCUMENT, NAVI_1X),
    ("gfx1012", 100102, OLD, DOCUMENT, NAVI_1X),
    ("gfx1012", 100102, MIDDLE, THREE, NAVI_1X),
    ("gfx1013", 100103, OLD, THREE, UNREPORTED),
    ("gfx1030", 100300, ("2.6.0+rocm6.1", "6.1", ("gfx1100",)), {}, NO_NEIGHBOUR),
    ("gfx1031", 100301, MIDDLE, {OVERRIDE: "10.3.0"}, NAVI_2X),
    ("gfx1032", 100302, MIDDLE, {OVERRIDE: "10.3.0"}, NAVI_2X),
    ("gfx1033", 100303, MIDDLE, {OVERRIDE: "10.3.0"}, NAVI_2X),
    ("gfx1034", 100304, MIDDLE, {OVERRIDE: "10.3.0"}, NAVI_2X),
    ("gfx1035", 100305, MIDDLE, {OVERRIDE: "10.3.0"}, NAVI_2X),
    ("gfx1036", 100306, MIDDLE, {OVERRIDE: "10.3.0"}, NAVI_2X),
    ("gfx1036", 100306, ("2.6.0+rocm6.1", "6.1", ("gfx1100",)), {}, "10.3.0 needs code for gfx1030 in the build"),
    ("gfx1100", 110000, OLD, {}, NO_NEIGHBOUR),
    ("gfx1101", 110001, MIDDLE, {OVERRIDE: "11.0.0"}, NAVI_3X),
    ("gfx1102", 110002, MIDDLE, {OVERRIDE: "11.0.0"}, NAVI_3X),
    ("gfx1103", 110003, MIDDLE, {}, PHOENIX),
    ("gfx1150", 110500, MIDDLE, {}, UNREPORTED),
    ("gfx1151", 110501, MIDDLE, {}, STRIX),
    ("gfx1152", 110502, MIDDLE, {}, UNREPORTED),
    ("gfx1153", 110503, MIDDLE, {}, UNREPORTED),
    ("gfx1200", 120000, MIDDLE, {}, NO_NEIGHBOUR),
    ("gfx1201", 120001, MIDDLE, {}, NO_NEIGHBOUR),
]


@pytest.mark.parametrize(("gfx", "number", "build", "expected", "source"), FOREIGN)
def test_a_build_without_code_for_the_card(tmp_path, gfx, number, build, expected, source):
    version, hip, targets = build
    machine = one_gpu(tmp_path, number)
    found = plan(machine, torch_build(tmp_path, version, hip, targets=targets), Settings(), {})
    assert {change.name: change.value for change in found.changes} == expected, source
    assert all(change.why and change.source for change in found.changes)
    # Where nothing is known to work, the user hears it, with a command.
    told = [notice for notice in found.notices if gfx in notice.summary and notice.fix and notice.source]
    assert bool(told) == (OVERRIDE not in expected)


@pytest.mark.parametrize(("gfx", "number"), sorted({(row[0], row[1]) for row in FOREIGN}))
@pytest.mark.parametrize(("version", "hip"), [("1.13.1+rocm5.2", "5.2"), ("2.12.0+rocm7.14", "7.14")])
def test_a_native_build_gets_nothing(tmp_path, gfx, number, version, hip):
    found = plan(one_gpu(tmp_path, number), torch_build(tmp_path, version, hip, targets=[gfx]), Settings(), {})
    assert found.changes == ()
    # ROCm 5.2 has never heard of RDNA3 and the Raphael (ROCR-Runtime isa.cpp at rocm-5.2.0).
    is_too_old = hip == "5.2" and number >= 100306 and gfx not in ("gfx1152", "gfx1153")  # of these it is not known
    assert bool(found.notices) == is_too_old


def test_at_least_25_archs_from_gfx803_to_gfx1201():
    assert len({row[0] for row in FOREIGN}) >= 25


def test_a_generic_target_is_native(tmp_path):
    machine = one_gpu(tmp_path, 100100)
    assert planned(machine, torch_build(tmp_path, "2.8.0", "6.4", targets=["gfx10-1-generic"])) == {}
    assert (
        planned(machine, torch_build(tmp_path / "b", "1.13.1+rocm5.2", "5.2", targets=["gfx10-3-generic"]))
        == DOCUMENT
    )


def test_a_build_whose_code_cannot_be_read(tmp_path):
    machine = one_gpu(tmp_path, 100302)
    # pytorch.org's wheels are known not to have it; of another build nothing is known, so nothing is set.
    assert planned(machine, torch_build(tmp_path / "a", "2.6.0+rocm6.1", "6.1")) == {OVERRIDE: "10.3.0"}
    assert planned(machine, torch_build(tmp_path / "b", "2.6.0", "6.1")) == {}
    assert planned(one_gpu(tmp_path / "c", 100300), torch_build(tmp_path / "d", "2.6.0+rocm6.1", "6.1")) == {}


def test_a_card_that_nobody_knows_is_left_alone(tmp_path):
    found = plan(
        one_gpu(tmp_path, 130000), torch_build(tmp_path, "2.6.0+rocm6.1", "6.1", targets=LIST_2_4), Settings(), {}
    )
    assert found.changes == () and found.notices == ()


def test_without_any_amd_gpu_the_documents_four_are_set(tmp_path):
    machine = read_machine(str(tmp_path))
    assert planned(machine, torch_build(tmp_path, "2.13.0+cpu")) == DOCUMENT
    assert planned(machine, None) == DOCUMENT
    assert planned(machine, None, profile="none") == planned(machine, None, enabled=False) == {}
    card = one_gpu(tmp_path / "card", 110000)
    assert planned(card, None, profile="document") == DOCUMENT


def test_rdna1_with_a_build_that_is_not_for_amd(tmp_path):
    machine = read_machine(str(MACHINES / "rx_5600_xt"))
    assert planned(machine, torch_build(tmp_path, "2.13.0+cu130", cuda="13.0")) == THREE
    assert planned(machine, None) == THREE


def test_wsl_gets_nothing(tmp_path):
    build = torch_build(tmp_path, "2.6.0+rocm6.1", "6.1", targets=LIST_2_4)
    assert planned(read_machine(str(MACHINES / "wsl")), build) == {}


def test_each_variable_says_what_the_facts_say(tmp_path):
    build = torch_build(tmp_path, "1.13.1+rocm5.2", "5.2", targets=LIST_1_13)
    found = {c.name: c for c in plan(read_machine(str(MACHINES / "rx_5600_xt")), build, Settings(), {}).changes}
    assert (
        "default" in found["MIOPEN_DEBUG_CONV_IMPLICIT_GEMM"].why
        and "nothing" in found["MIOPEN_DEBUG_CONV_IMPLICIT_GEMM"].why
    )
    assert "6.1" in found["HSA_USE_SVM"].why
    assert "gfx1030" in found[OVERRIDE].why


# Two GPUs in one machine.


def two_gpus(root, first, second, *, first_simds=72, second_simds=72):
    add_gpu(root, first, simds=first_simds, node=1)
    return one_gpu(root, second, simds=second_simds, node=2)


@pytest.mark.parametrize(
    ("name", "version", "hip", "targets", "expected"),
    [
        # The card first, the integrated one without code: hidden, and the override holds for the card's node alone.
        (
            "rx_6600_and_raphael",
            "2.9.0+rocm6.4",
            "6.4",
            LIST_2_4,
            {"HIP_VISIBLE_DEVICES": "0", f"{OVERRIDE}_1": "10.3.0"},
        ),
        ("rx_6600_and_raphael", "2.4.1+rocm6.1", "6.1", LIST_2_4, {"HIP_VISIBLE_DEVICES": "0", OVERRIDE: "10.3.0"}),
        # The integrated one first, the card native: it is hidden, nothing is overridden.
        ("raphael_and_rx_7600", "2.13.0+rocm7.2", "7.2", ("gfx1030", "gfx1102"), {"HIP_VISIBLE_DEVICES": "1"}),
        ("raphael_and_rx_7600", "2.13.0+rocm7.2", "7.2", ("gfx1036", "gfx1102"), {"HIP_VISIBLE_DEVICES": "1"}),
        ("raphael_and_rx_7600", "2.4.1+rocm6.1", "6.1", LIST_2_4, {"HIP_VISIBLE_DEVICES": "1", OVERRIDE: "11.0.0"}),
        # Both native and the card first: nothing to do.
        ("rx_6600_and_raphael", "2.12.0+rocm7.14", "7.14", ("gfx1032", "gfx1036"), {}),
        # An integrated GPU alone is somebody's only one.
        ("granite_ridge", "2.4.1+rocm6.1", "6.1", LIST_2_4, {OVERRIDE: "10.3.0"}),
        # RX 5600 XT beside a 7900 XTX: no override from ROCm 5.3 on, so programs are shown the one that works.
        ("two_cards", "2.9.0+rocm6.4", "6.4", LIST_2_4, {"HIP_VISIBLE_DEVICES": "1"}),
    ],
)
def test_mixed_machines(tmp_path, name, version, hip, targets, expected):
    build = torch_build(tmp_path, version, hip, targets=targets)
    assert planned(read_machine(str(MACHINES / name)), build) == expected


def test_two_cards_that_need_different_overrides(tmp_path):
    machine = two_gpus(tmp_path, 100302, 110002, second_simds=64)
    new = torch_build(tmp_path / "new", "2.9.0+rocm6.3", "6.3.1", targets=LIST_2_4)
    assert planned(machine, new) == {f"{OVERRIDE}_1": "10.3.0", f"{OVERRIDE}_2": "11.0.0"}
    # Before ROCm 6.3 there is one override for all: the larger card has it, the other is hidden.
    old = torch_build(tmp_path / "old", "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    assert planned(machine, old) == {"HIP_VISIBLE_DEVICES": "0", OVERRIDE: "10.3.0"}


def test_a_native_card_beside_one_that_needs_an_override(tmp_path):
    machine = two_gpus(tmp_path, 110000, 100302, first_simds=192)
    new = torch_build(tmp_path / "new", "2.9.0+rocm6.3", "6.3.1", targets=LIST_2_4)
    assert planned(machine, new) == {f"{OVERRIDE}_2": "10.3.0"}
    old = torch_build(tmp_path / "old", "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    assert planned(machine, old) == {"HIP_VISIBLE_DEVICES": "0"}


def test_two_alike_cards_share_the_override(tmp_path):
    build = torch_build(tmp_path, "2.9.0+rocm6.3", "6.3.1", targets=LIST_2_4)
    assert planned(two_gpus(tmp_path, 100302, 100301), build) == {OVERRIDE: "10.3.0"}


def test_a_native_card_lives_with_an_override_to_itself(tmp_path):
    # RX 6800 and RX 6700 XT on ROCm 6.1: 10.3.0 is what the 6800 is.
    machine = two_gpus(tmp_path, 100300, 100301, first_simds=120)
    build = torch_build(tmp_path, "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    assert planned(machine, build) == {OVERRIDE: "10.3.0"}


def test_a_chip_that_rocm_does_not_know_has_no_number(tmp_path):
    # gfx1036 is in ROCR-Runtime's isa.cpp from rocm-5.3.0 on: on 5.2 the RX 6800 is HIP's first and only device.
    machine = two_gpus(tmp_path, 100306, 100300, first_simds=4)
    assert planned(machine, torch_build(tmp_path / "a", "1.13.1+rocm5.2", "5.2", targets=LIST_1_13)) == {}
    newer = torch_build(tmp_path / "b", "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    assert planned(machine, newer) == {"HIP_VISIBLE_DEVICES": "1"}
    found = plan(
        one_gpu(tmp_path / "c", 110000), torch_build(tmp_path / "d", "x", "5.2", targets=["gfx1100"]), Settings(), {}
    )
    assert found.changes == () and "5.3 is the first" in found.notices[0].summary


def test_a_users_override_hides_no_card(tmp_path):
    machine = two_gpus(tmp_path, 100301, 110000, second_simds=192)
    build = torch_build(tmp_path, "2.9.0+rocm6.4", "6.4", targets=LIST_2_4)
    found = plan(machine, build, Settings(), {OVERRIDE: "10.3.0"})
    assert [change.name for change in found.changes if change.changes] == []
    assert [notice.name for notice in found.notices] == [OVERRIDE]


def test_a_container_that_has_one_of_two_gpus(tmp_path):
    shutil.copytree(MACHINES / "raphael_and_rx_7600", tmp_path, dirs_exist_ok=True, symlinks=True)
    (tmp_path / "dev/dri/renderD128").unlink()
    build = torch_build(tmp_path / "torch", "2.9.0+rocm6.4", "6.4", targets=LIST_2_4)
    # libhsakmt does not see the other, so HIP's only device is the card, and its node is the first after the CPU's.
    assert planned(read_machine(str(tmp_path)), build) == {f"{OVERRIDE}_1": "11.0.0"}


@pytest.mark.parametrize("name", sorted(path.name for path in MACHINES.iterdir() if path.is_dir()))
@pytest.mark.parametrize(
    ("version", "hip"), [("1.13.1+rocm5.2", "5.2"), ("2.4.1+rocm6.1", "6.1"), ("2.9.0+rocm6.4", "6.4")]
)
def test_the_plan_has_nothing_to_say_against_itself(tmp_path, name, version, hip):
    machine = read_machine(str(MACHINES / name))
    build = torch_build(tmp_path, version, hip, targets=LIST_2_4)
    environ = {}
    first = plan(machine, build, Settings(), environ)
    apply(first.changes, environ)
    second = plan(machine, build, Settings(), environ)
    assert [change for change in second.changes if change.changes] == []
    assert set(second.notices) <= set(first.notices)


def test_an_empty_list_is_none_given_to_hip(tmp_path):
    machine = read_machine(str(MACHINES / "raphael_and_rx_7600"))
    build = torch_build(tmp_path, "2.13.0+rocm7.2", "7.2", targets=["gfx1102"])
    assert planned(machine, build, {"HIP_VISIBLE_DEVICES": ""}) == {"HIP_VISIBLE_DEVICES": "1"}
    assert planned(machine, build, {"ROCR_VISIBLE_DEVICES": ""}) == {}


def test_what_the_user_shows_and_hides_is_the_users(tmp_path):
    machine = read_machine(str(MACHINES / "raphael_and_rx_7600"))
    build = torch_build(tmp_path, "2.13.0+rocm7.2", "7.2", targets=["gfx1102"])
    for environ in ({"HIP_VISIBLE_DEVICES": "1"}, {"ROCR_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "1"},
                    {"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}):  # fmt: skip
        found = plan(machine, build, Settings(), environ)
        assert found.changes == () and found.notices == ()


# What the user has set.


def test_the_users_value_wins(tmp_path):
    environ = {OVERRIDE: "10.1.0"}
    build = torch_build(tmp_path, "1.13.1+rocm5.2", "5.2", targets=LIST_1_13)
    found = plan(read_machine(str(MACHINES / "rx_5600_xt")), build, Settings(), environ)
    apply(found.changes, environ)
    assert environ == {**DOCUMENT, OVERRIDE: "10.1.0"}
    assert [c.found for c in found.changes if c.name == OVERRIDE] == ["10.1.0"]


@pytest.mark.parametrize(
    ("name", "version", "targets", "environ", "said", "level"),
    [
        ("rx_7900_xtx", "6.1", LIST_2_4, {OVERRIDE: "10.3.0"}, "not needed", "warning"),
        ("radeon_780m", "6.1", LIST_2_4, {OVERRIDE: "11.0.0"}, "crash", "failure"),
        ("radeon_780m", "6.1", LIST_2_4, {OVERRIDE: "11.0.2"}, "crash", "failure"),
        ("strix_halo", "6.1", LIST_2_4, {OVERRIDE: "11.0.0"}, "crash", "failure"),
        ("rx_9070", "6.4", ["gfx1201"], {OVERRIDE: "11.0.0"}, "crash", "failure"),
        ("rx_5600_xt", "6.1", LIST_2_4, {OVERRIDE: "10.3.0"}, "1.13.1", "warning"),
        ("rx_6700_xt", "6.1", LIST_2_4, {OVERRIDE: "11.0.0"}, "10.3.0 is what users report", "warning"),
        ("rx_6700_xt", "6.1", LIST_2_4, {OVERRIDE: "gfx1030"}, "malformed", "warning"),
        ("rx_6700_xt", "6.1", LIST_2_4, {OVERRIDE: "64.0.0"}, "malformed", "warning"),
        ("two_cards", "6.4", LIST_2_4, {f"{OVERRIDE}_2": "10.3.0"}, "not needed", "warning"),
        ("rx_7900_xtx", "6.1", LIST_2_4, {"HIP_VISIBLE_DEVICES": "1"}, "0 stay visible", "warning"),
        ("two_cards", "6.1", LIST_2_4, {"HIP_VISIBLE_DEVICES": "1,5,0"}, "1 stay visible", "warning"),
        (
            "two_cards",
            "6.1",
            LIST_2_4,
            {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0,1"},
            "1 stay visible",
            "warning",
        ),
        ("rx_7900_xtx", "6.1", LIST_2_4, {"CUDA_VISIBLE_DEVICES": "-1"}, "", None),
        (
            "two_cards",
            "6.1",
            LIST_2_4,
            {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"},
            "leaves",
            "warning",
        ),
        ("rx_7900_xtx", "6.1", LIST_2_4, {"MIOPEN_FIND_MODE": "QUICK"}, "does not know this value", "warning"),
        ("rx_7900_xtx", "6.1", LIST_2_4, {"AMD_SERIALIZE_KERNEL": "3"}, "", "warning"),
        ("rx_7900_xtx", "6.4", LIST_2_4, {"HSA_OVERRIDE_GFX_VERSION_1": "11.0.0"}, "", None),
        ("rx_6700_xt", "6.1", LIST_2_4, {OVERRIDE: "10.3.0"}, "", None),
        ("rx_7900_xtx", "6.1", LIST_2_4, {"HSA_USE_SVM": "0", "PATH": "/bin", "HIP_VISIBLE_DEVICES": "0"}, "", None),
    ],
)
def test_findings_on_the_users_own_variables(tmp_path, name, version, targets, environ, said, level):
    machine = read_machine(str(MACHINES / name))
    build = torch_build(tmp_path, f"2.6.0+rocm{version}", version, targets=targets)
    found = [n for n in plan(machine, build, Settings(), environ).notices if n.name != "native_code"]
    if level is None:
        assert found == []
    else:
        (notice,) = found
        assert said in notice.why + notice.summary and notice.level == level
        assert notice.name in environ and notice.fix and notice.source


def test_a_value_that_is_the_default_is_said_and_no_warning(tmp_path):
    build = torch_build(tmp_path, "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    machine = read_machine(str(MACHINES / "rx_7900_xtx"))
    (notice,) = plan(machine, build, Settings(), {"MIOPEN_DEBUG_CONV_WINOGRAD": "1"}).notices
    assert notice.level == "ok" and "changes nothing" in notice.summary
    assert plan(machine, build, Settings(), {"MIOPEN_DEBUG_CONV_WINOGRAD": "0"}).notices == ()


def test_a_variable_that_this_rocm_does_not_know(tmp_path):
    machine = read_machine(str(MACHINES / "two_cards"))
    build = torch_build(tmp_path, "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    (notice,) = [
        n
        for n in plan(machine, build, Settings(), {f"{OVERRIDE}_1": "10.3.0"}).notices
        if "does nothing" in n.summary
    ]
    assert "6.3" in notice.why


# MIOpen's folders.


def test_miopens_files_leave_a_network_home(tmp_path):
    build = torch_build(tmp_path, "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    one_gpu(tmp_path, 110000)
    (tmp_path / "proc").mkdir()
    mounts = tmp_path / "proc/mounts"
    (tmp_path / "home/ann").mkdir(parents=True)
    mounts.write_text("/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n")
    found = plan(read_machine(str(tmp_path), "/home/ann"), build, Settings(), {})
    assert [change.name for change in found.changes] == ["MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR"]
    assert all(change.value.startswith(f"/var/tmp/rocm-patch-{os.getuid()}/") for change in found.changes)
    assert "nfs4" in found.changes[0].why
    mounts.write_text("/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb1 /home/ann ext4 rw 0 0\n")
    assert planned(read_machine(str(tmp_path), "/home/ann"), build) == {}


def test_miopens_files_leave_a_home_that_cannot_be_written(tmp_path):
    build = torch_build(tmp_path, "2.4.1+rocm6.1", "6.1", targets=LIST_2_4)
    one_gpu(tmp_path, 110000)
    (tmp_path / "home").touch()  # a file: nobody can make a folder below it, root included
    found = planned(read_machine(str(tmp_path), "/home/ann"), build)
    assert set(found) == {"MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR"}


def test_a_folder_is_made_for_this_user_alone(tmp_path, caplog):
    from rocm_patch.machine.environment import EnvChange

    def change(base):
        return EnvChange("MIOPEN_USER_DB_PATH", str(base / "miopen" / "db"), "", "", None, True)

    environ = {}
    apply([change(tmp_path / "ours")], environ)
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o700
    assert environ == {"MIOPEN_USER_DB_PATH": str(tmp_path / "ours/miopen/db")}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "file").touch()
    for other in ("theirs", "link", "file"):
        environ = {}
        apply([change(tmp_path / other)], environ)
        assert environ == {} and "stay at home" in caplog.text
        caplog.clear()


def test_the_documents_variables_are_the_ones_that_tests_keep_out_of_the_environment():
    assert set(DOCUMENT) == set(PATCHED_VARIABLES)


def test_the_command_for_a_native_torch():
    # https://pytorch.org/get-started/previous-versions/, .ci/docker/manywheel/build.sh at v2.13.0 and on main,
    # https://github.com/ROCm/TheRock/blob/main/RELEASES.md
    first = "python -m pip uninstall -y torch torchvision torchaudio && python -m pip install "
    official = "torchvision --index-url https://download.pytorch.org/whl/"
    amds = (
        '--index-url https://repo.amd.com/rocm/whl-multi-arch/ "torch[device-gfx1010]" "torchvision[device-gfx1010]"'
    )
    assert native_torch_command("gfx1100") == f"{first}torch {official}rocm7.14"
    assert native_torch_command("gfx900") == f"{first}'torch==2.13.*' {official}rocm7.2"
    assert native_torch_command("gfx1010") == first + amds
    # 9.0.0 makes it pass for gfx900.
    assert native_torch_command("gfx90c") == native_torch_command("gfx900")
    assert native_torch_command("gfx803").endswith(
        "PYTORCH_ROCM_ARCH=gfx803 python -m pip install --no-build-isolation ."
    )


def test_pip_replaces_a_build_of_the_same_version(tmp_path):
    """The command as it is, with an index of ours in the place of pytorch.org's and a torch that is none."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    index = tmp_path / "index"
    for folder, version in (("old", "2.14.0+cpu"), ("new", "2.14.0+rocm7.14")):
        (tmp_path / folder).mkdir()
        for package in ("torch", "torchvision"):
            name = f"{package}-{version}-py3-none-any.whl"
            with zipfile.ZipFile(tmp_path / folder / name, "w") as wheel:
                info = f"{package}-{version}.dist-info"
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
            if folder == "new":
                (index / package).mkdir(parents=True)
                (index / package / name).write_bytes((tmp_path / folder / name).read_bytes())
                (index / package / "index.html").write_text(f'<a href="{name}">{name}</a>')
    environ = {**os.environ, "PATH": f"{environment}/bin:{os.environ['PATH']}", "PIP_CONFIG_FILE": "/dev/null"}
    python = str(environment / "bin/python")
    old = [str(path) for path in (tmp_path / "old").iterdir()]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *old], check=True, env=environ)
    command = native_torch_command("gfx1100").replace("https://download.pytorch.org/whl/rocm7.14", index.as_uri())
    assert command.count("file://") == 1
    subprocess.run(["bash", "-c", command], check=True, env=environ, capture_output=True)
    frozen = subprocess.run(
        [python, "-m", "pip", "freeze"], check=True, env=environ, capture_output=True, text=True
    ).stdout
    assert "torch==2.14.0+rocm7.14" in frozen and "+cpu" not in frozen

"""Hardware, build and environment plan, from files: sysfs trees and torch folders as they lie on real machines."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocm_patch.machine.backend import decide
from rocm_patch.machine.build import TorchBuild, find_build, read_build, version_numbers
from rocm_patch.machine.environment import apply, plan
from rocm_patch.machine.hardware import gfx_name, read_machine
from rocm_patch.settings import Settings

DOCUMENT = {
    "MIOPEN_DEBUG_CONV_IMPLICIT_GEMM": "1",
    "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
    "HSA_USE_SVM": "0",
    "HSA_XNACK": "0",
}
# Of an RX 5700 XT, the fields that are published (simd_count 80, gfx_target_version 100100, device 0x731f); an
# RX 5600 XT is the same chip with 72.
RX_5600_XT = {"simd_count": 72, "simd_per_cu": 2, "gfx_target_version": 100100, "vendor_id": 4098,
              "device_id": 29471, "drm_render_minor": 128}  # fmt: skip
# ROCm/k8s-device-plugin testdata and tinygrad's mock, see the field list there.
RX_7900_XTX = {**RX_5600_XT, "simd_count": 192, "gfx_target_version": 110000, "device_id": 29772}
RENOIR = {**RX_5600_XT, "simd_count": 28, "simd_per_cu": 4, "gfx_target_version": 90012, "device_id": 5686}
CPU_NODE = {"cpu_cores_count": 16, "simd_count": 0, "gfx_target_version": 0, "vendor_id": 0}


def tree(root, *nodes, kfd=True):
    """A folder that stands for `/`, with these topology nodes."""
    for number, node in enumerate(nodes):
        folder = root / "sys/class/kfd/kfd/topology/nodes" / str(number)
        folder.mkdir(parents=True)
        text = node if isinstance(node, str) else "".join(f"{k} {v}\n" for k, v in node.items())
        (folder / "properties").write_text(text)
    if kfd:
        (root / "dev").mkdir(exist_ok=True)
        (root / "dev/kfd").touch()
    return read_machine(str(root))


def build(version="1.13.1+rocm5.2", hip="5.2.21151-afdc89f8", cuda=None, folder="/nowhere/torch"):
    from pathlib import Path

    return TorchBuild(Path(folder), version, hip, cuda)


@pytest.mark.parametrize(
    ("number", "name"),
    [(100100, "gfx1010"), (90012, "gfx90c"), (90010, "gfx90a"), (90402, "gfx942"), (110501, "gfx1151"),
     (80003, "gfx803"), (120001, "gfx1201"), (100306, "gfx1036"), (90500, "gfx950")],
)  # fmt: skip
def test_gfx_names(number, name):
    assert gfx_name(number) == name


def test_gpus_are_read_and_cpus_are_not(tmp_path):
    machine = tree(tmp_path, CPU_NODE, RX_5600_XT, RENOIR)
    assert [(g.node, g.gfx, g.compute_units) for g in machine.gpus] == [(1, "gfx1010", 36), (2, "gfx90c", 7)]
    assert machine.has_rdna1 and machine.kfd and machine.gpus[0].render_minor == 128


def test_a_broken_node_does_not_lose_the_others(tmp_path):
    tree(tmp_path, "\x00\xff garbage", RX_5600_XT, "gfx_target_version many\n", "")
    (tmp_path / "sys/class/kfd/kfd/topology/nodes/9").mkdir()
    assert [gpu.gfx for gpu in read_machine(str(tmp_path)).gpus] == ["gfx1010"]


def test_no_driver_at_all(tmp_path):
    machine = read_machine(str(tmp_path))
    assert machine.gpus == () and not machine.can_have_amd_gpu


@given(content=st.binary(max_size=200))
def test_reading_never_raises(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("root")
    folder = root / "sys/class/kfd/kfd/topology/nodes/1"
    folder.mkdir(parents=True)
    (folder / "properties").write_bytes(content)
    read_machine(str(root))
    shutil.rmtree(root)


def planned(machine, build, environ=None, **settings):
    return {c.name: c.value for c in plan(machine, build, Settings(**settings), environ or {}).changes if c.changes}


def test_without_any_amd_gpu_the_documents_four_are_set(tmp_path):
    machine = read_machine(str(tmp_path))
    assert planned(machine, build("2.13.0+cpu", None)) == DOCUMENT
    assert planned(machine, None) == DOCUMENT
    assert planned(machine, build(), profile="none") == {}


def test_rdna1_on_the_documents_build_gets_the_four(tmp_path):
    machine = tree(tmp_path, CPU_NODE, RX_5600_XT)
    assert planned(machine, build()) == DOCUMENT
    assert planned(machine, build("1.12.1+rocm5.1.1", "5.1.20531")) == DOCUMENT


@pytest.mark.parametrize(
    ("version", "hip", "cuda"),
    [("2.6.0+rocm6.1", "6.1.40091", None), ("1.13.1+rocm5.3", "5.3.22061", None), ("2.13.0+cpu", None, None),
     ("2.13.0+cu130", None, "13.0")],
)  # fmt: skip
def test_rdna1_on_another_build_gets_no_override_and_a_notice(tmp_path, version, hip, cuda):
    found = plan(tree(tmp_path, RX_5600_XT), build(version, hip, cuda), Settings(), {})
    assert "HSA_OVERRIDE_GFX_VERSION" not in {change.name for change in found.changes}
    assert len(found.changes) == 3
    assert len(found.notices) == 1 and version in found.notices[0] and "hint: install" in found.notices[0]


def torch_folder(root, version, hip, device_code=b""):
    folder = root / "site-packages" / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
        f"cuda: Optional[str] = None\nhip: Optional[str] = {hip!r}\n"
    )
    (folder / "lib/libtorch_hip.so").write_bytes(b"\x7fELF" + bytes(5000) + device_code)
    return folder


def test_a_native_build_gets_no_override(tmp_path):
    machine = tree(tmp_path, RX_5600_XT)
    code = b"__CLANG_OFFLOAD_BUNDLE__hipv4-amdgcn-amd-amdhsa--gfx1010\x00"
    native = read_build(torch_folder(tmp_path, "1.13.1+rocm5.2", "5.2.21151", code))
    assert native.kind == "hip" and native.carries("gfx1010") and not native.carries("gfx101")
    found = plan(machine, native, Settings(), {})
    assert len(found.changes) == 3 and not found.notices
    foreign = read_build(torch_folder(tmp_path / "b", "1.13.1+rocm5.2", "5.2.21151", code.replace(b"1010", b"1030")))
    assert not foreign.carries("gfx1010")
    assert planned(machine, foreign) == DOCUMENT


def test_amds_device_package_is_native_code(tmp_path):
    folder = torch_folder(tmp_path, "2.10.0+rocm7.14", "7.14")
    assert not read_build(folder).carries("gfx1010")
    (folder.parent / "amd_torch_device_gfx1010-2.10.0.dist-info").mkdir()
    assert read_build(folder).carries("gfx1010") and not read_build(folder).carries("gfx1012")


def test_other_amd_cards_get_no_variable(tmp_path):
    assert planned(tree(tmp_path, RX_7900_XTX), build("2.6.0+rocm6.1", "6.1")) == {}
    assert planned(read_machine(str(tmp_path)), build(), profile="document") == DOCUMENT


def test_the_users_value_wins(tmp_path):
    environ = {"HSA_OVERRIDE_GFX_VERSION": "10.1.0"}
    machine = tree(tmp_path, RX_5600_XT)
    found = plan(machine, build(), Settings(), environ)
    apply(found.changes, environ)
    assert environ == {**DOCUMENT, "HSA_OVERRIDE_GFX_VERSION": "10.1.0"}
    assert [c.found for c in found.changes if c.name == "HSA_OVERRIDE_GFX_VERSION"] == ["10.1.0"]


def test_the_installed_torch_is_found_without_importing_it():
    import torch

    found = find_build()
    assert found.version == torch.__version__ or torch.__version__.startswith(found.version)
    assert (found.hip, found.cuda) == (torch.version.hip, torch.version.cuda)


def test_a_folder_that_is_no_torch(tmp_path):
    assert read_build(tmp_path) is None


def test_version_numbers():
    assert version_numbers("5.2.21151-afdc89f8") == (5, 2, 21151)
    assert version_numbers("1.13.1+rocm5.2") == (1, 13, 1)
    assert version_numbers(None) == version_numbers("unknown") == ()


HIP, CPU = build("2.6.0+rocm6.1", "6.1"), build("2.13.0+cpu", None)
CUDA = build("2.11.0+cu130", None, "13.0")


@pytest.mark.parametrize(
    ("nodes", "kfd", "torch_build", "settings", "expected"),
    [
        ([RX_5600_XT], True, HIP, {}, ("hip", "bypass")),
        ([RENOIR, RX_5600_XT], True, build(), {}, ("hip", "bypass")),
        ([RX_7900_XTX], True, HIP, {}, ("hip", "guarded")),
        ([], True, HIP, {}, ("hip", "guarded")),
        ([], False, HIP, {}, (None, "native")),
        ([RX_5600_XT], True, CPU, {}, (None, "native")),
        ([], False, CUDA, {}, (None, "native")),
        ([], False, CUDA, {"backend": "cuda"}, ("cuda", "bypass")),
        ([], False, CPU, {"backend": "cpu"}, ("cpu", "bypass")),
        ([], False, CPU, {"backend": "cpu", "conv": "guarded"}, ("cpu", "guarded")),
        ([], False, CPU, {"backend": "cuda"}, (None, "native")),
        ([RX_7900_XTX], True, HIP, {"backend": "cpu"}, ("cpu", "bypass")),
        ([RX_5600_XT], True, HIP, {"conv": "native"}, ("hip", "native")),
        ([RX_7900_XTX], True, HIP, {"conv": "im2col"}, ("hip", "bypass")),
        ([RX_5600_XT], True, HIP, {"enabled": False}, (None, "native")),
        ([RX_5600_XT], True, None, {}, (None, "native")),
    ],
)
def test_where_the_override_is_on(tmp_path, nodes, kfd, torch_build, settings, expected):
    activation = decide(tree(tmp_path, *nodes, kfd=kfd), torch_build, Settings(**settings))
    assert (activation.backend, activation.policy) == expected
    assert activation.why
    assert activation.dispatch_key == {"hip": "CUDA", "cuda": "CUDA", "cpu": "CPU", None: None}[expected[0]]


def test_wsl_is_guarded(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert decide(read_machine(str(tmp_path)), HIP, Settings()).policy == "guarded"
    assert planned(read_machine(str(tmp_path)), HIP) == {}

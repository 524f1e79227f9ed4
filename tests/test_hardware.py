"""Hardware from sysfs trees: real machines, broken ones, and whatever bytes Hypothesis thinks of."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MACHINES, clean_environ
from rocm_patch.machine.hardware import gfx_name, read_machine


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (100100, "gfx1010"),
        (90012, "gfx90c"),
        (90010, "gfx90a"),
        (90402, "gfx942"),
        (110501, "gfx1151"),
        (80003, "gfx803"),
        (120001, "gfx1201"),
        (100306, "gfx1036"),
        (90500, "gfx950"),
    ],
)
def test_gfx_names(number, name):
    assert gfx_name(number) == name


GIB = 2**30
# Folder to (node, gfx, compute units, GiB of memory, integrated, PCI address, atomics, render minor) of each GPU.
EXPECTED = {
    "rx_7900_xtx": [(1, "gfx1100", 96, 0, False, "0000:86:00.0", None, 128)],
    "mi210": [(2, "gfx90a", 104, 0, False, "0000:63:00.0", None, 128)],
    "mi300x_cpx": [(10, "gfx942", 38, 0, False, "0000:27:00.0", None, 136)],
    "mi100": [(1, "gfx908", 120, 0, False, "0000:23:00.0", None, 128)],
    "rx_9070": [(1, "gfx1201", 64, 0, False, "0000:84:00.0", None, 128)],
    "vega10_old_kernel": [(1, "gfx900", 64, 16.0, False, "0000:19:00.0", True, 128)],
    "rx_580": [(1, "gfx803", 36, 8.0, False, "0000:01:00.0", False, 128)],
    "rx_5700_xt": [(1, "gfx1010", 40, 8.0, False, "0000:03:00.0", True, 128)],
    "rx_5600_xt": [(1, "gfx1010", 36, 6.0, False, "0000:03:00.0", True, 128)],
    "rx_6700_xt": [(1, "gfx1031", 40, 12.0, False, "0000:03:00.0", True, 128)],
    "rx_6600_and_raphael": [
        (1, "gfx1032", 28, 8.0, False, "0000:03:00.0", True, 128),
        (2, "gfx1036", 2, 0.5, True, "0000:10:00.0", True, 129),
    ],
    "raphael_and_rx_7600": [
        (1, "gfx1036", 2, 15.3, True, "0000:7a:00.0", True, 128),
        (2, "gfx1102", 32, 8.0, False, "0000:03:00.0", True, 129),
    ],
    "granite_ridge": [(1, "gfx1036", 2, 2.0, True, "0000:10:00.0", True, 128)],
    "radeon_780m": [(1, "gfx1103", 12, 32.0, True, "0000:c6:00.0", True, 128)],
    "radeon_890m": [(1, "gfx1150", 16, 32.0, True, "0000:c5:00.0", True, 128)],
    "strix_halo": [(1, "gfx1151", 40, 32.0, True, "0000:c5:00.0", True, 128)],
    "cezanne": [(0, "gfx90c", 8, 0.5, True, "0000:04:00.0", None, 128)],
    "two_cards": [
        (1, "gfx1010", 36, 6.0, False, "0000:03:00.0", True, 128),
        (2, "gfx1100", 96, 24.0, False, "0000:86:00.0", True, 128),
    ],
    "broken": [
        (6, "gfx1300", 96, 0, False, "0000:86:00.0", None, 128),
        (7, "gfx1010", 36, 0, False, "0000:03:00.0", None, 128),
    ],
    "cpu_only": [], "cpu_node_only": [], "no_driver": [], "nvidia": [], "wsl": [],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_machines(name):
    machine = read_machine(str(MACHINES / name))
    found = [
        (gpu.node, gpu.gfx, gpu.compute_units, round(gpu.vram_bytes / GIB, 1), gpu.integrated, gpu.pci_address,
         gpu.pcie_atomics, gpu.render_minor)
        for gpu in machine.gpus
    ]  # fmt: skip
    assert found == EXPECTED[name]
    assert machine.kfd == (name not in ("cpu_only", "no_driver", "nvidia", "wsl"))
    assert machine.dxg == (name == "wsl")
    assert machine.has_nvidia == (name == "nvidia")
    assert all(gpu.name for gpu in machine.gpus)


def test_every_tree_is_expected_to_be_something():
    assert {path.name for path in MACHINES.iterdir() if path.is_dir()} == set(EXPECTED)


def test_a_broken_node_is_named_and_loses_no_other():
    machine = read_machine(str(MACHINES / "broken"))
    assert machine.unread == (2, 3, 4, 8)
    assert machine.gpus[-1].generation == "RDNA1" and machine.gpus[0].name == "unknown AMD GPU"


def test_a_card_without_its_driver_is_seen_on_the_bus():
    (device,) = read_machine(str(MACHINES / "no_driver")).unlisted
    assert (device.address, device.device_id, device.driver) == ("0000:03:00.0", 0x73DF, "")
    assert read_machine(str(MACHINES / "nvidia")).unlisted == ()


def test_a_card_that_the_compute_driver_skips(tmp_path):
    shutil.copytree(MACHINES / "rx_5600_xt", tmp_path, dirs_exist_ok=True, symlinks=True)
    shutil.rmtree(tmp_path / "sys/class/kfd/kfd/topology/nodes/1")
    machine = read_machine(str(tmp_path))
    assert machine.gpus == () and machine.unlisted[0].driver == "amdgpu"


def test_names_come_from_pci_ids_where_they_are_installed(tmp_path):
    shutil.copytree(MACHINES / "rx_6600_and_raphael", tmp_path, dirs_exist_ok=True, symlinks=True)
    card, integrated = read_machine(str(tmp_path)).gpus
    assert "RX 6600" in card.name and integrated.name.startswith("Raphael")
    listed = tmp_path / "usr/share/misc/pci.ids"
    listed.parent.mkdir(parents=True)
    listed.write_text(
        "# a comment\n1001  Kolter\n\t73ff  Not this one\n1002  Advanced Micro Devices, Inc. [AMD/ATI]\n"
        "\t73fe  Other\n\t\t1002 0001  A subsystem\n# between\n\t73ff  Navi 23 [Radeon RX 6600/6600 XT/6600M]\n"
        "1003  Another\n\t164e  Not this one\n"
    )
    names = [gpu.name for gpu in read_machine(str(tmp_path)).gpus]
    assert names[0] == "Navi 23 [Radeon RX 6600/6600 XT/6600M]"
    assert names[1].startswith("Raphael")


@pytest.mark.parametrize(
    ("path", "content", "kind"),
    [
        (".dockerenv", "", "docker"),
        ("run/.containerenv", "", "podman"),
        ("run/systemd/container", "systemd-nspawn", "systemd-nspawn"),
        ("var/run/secrets/kubernetes.io/token", "", "kubernetes"),
        ("proc/1/cgroup", "12:pids:/docker/3f2a\n", "docker"),
        ("proc/1/cgroup", "0::/system.slice/containerd.service\n", "containerd"),
        ("proc/1/cgroup", "0::/init.scope\n", ""),
    ],
)
def test_containers(tmp_path, path, content, kind):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(content)
    assert read_machine(str(tmp_path)).container == kind


def test_driver_and_kernel(tmp_path):
    machine = read_machine(str(MACHINES / "rx_7900_xtx"))
    assert (machine.kernel, machine.driver, machine.container) == ("6.8.0-45-generic", "in-tree", "")
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.8.5\n")
    assert read_machine(str(tmp_path)).driver == "6.8.5"


def test_a_file_that_this_user_may_not_read(tmp_path):
    shutil.copytree(MACHINES / "two_cards", tmp_path, dirs_exist_ok=True, symlinks=True)
    masked = tmp_path / "sys/class/kfd/kfd/topology/nodes/1/properties"
    if os.getuid() == 0:  # root reads everything: a folder in its place cannot be read by anybody
        masked.unlink()
        masked.mkdir()
    else:
        masked.chmod(0)
    machine = read_machine(str(tmp_path))
    assert [gpu.gfx for gpu in machine.gpus] == ["gfx1100"] and machine.unread == (1,)


def test_a_partitioned_card(tmp_path):
    """Newer drivers put the partition's number into the function; each partition has its own heap."""
    shutil.copytree(MACHINES / "mi300x_cpx", tmp_path, dirs_exist_ok=True, symlinks=True)
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    whole = (nodes / "10/properties").read_text()
    device = tmp_path / "sys/bus/pci/devices/0000:27:00.0"
    (device / "drm/renderD136").mkdir(parents=True)
    for name, text in (
        ("vendor", "0x1002"),
        ("device", "0x74a1"),
        ("class", "0x120000"),
        ("mem_info_vram_total", 192 * GIB),
    ):
        (device / name).write_text(f"{text}\n")
    for number in (10, 11):
        (nodes / f"{number}/mem_banks/0").mkdir(parents=True)
        (nodes / f"{number}/mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {48 * GIB}\n")
        location = 0x2700 | number - 10
        (nodes / f"{number}/properties").write_text(whole.replace("location_id 9984", f"location_id {location}"))
    machine = read_machine(str(tmp_path))
    assert [gpu.vram_bytes // GIB for gpu in machine.gpus] == [48, 48] and machine.unlisted == ()


@pytest.mark.parametrize("home", ["/home/ann/below", "not/absolute", "", "/nowhere"])
def test_homes_of_every_kind(tmp_path, home):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/ann").touch()
    assert read_machine(str(tmp_path), home).home.path
    code = "from rocm_patch.machine.hardware import read_machine; print(read_machine().home.path)"
    environ = {name: value for name, value in clean_environ().items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("/")


def test_a_home_that_is_a_link_onto_the_network(tmp_path):
    (tmp_path / "nfs/ann").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/ann").symlink_to("../nfs/ann")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/mounts").write_text("/dev/sda1 / ext4 rw 0 0\nserver:/x /nfs nfs4 rw 0 0\n")
    home = read_machine(str(tmp_path), "/home/ann").home
    assert home.is_network and home.mount_point == "/nfs" and home.is_writable


def test_links_without_atomics(tmp_path):
    shutil.copytree(MACHINES / "rx_5600_xt", tmp_path, dirs_exist_ok=True, symlinks=True)
    link = tmp_path / "sys/class/kfd/kfd/topology/nodes/1/io_links/0/properties"
    for flags, kind, expected in ((1, 2, True), (1 | 4, 2, False), (1 | 8, 2, False), (1 | 4, 11, None)):
        link.write_text(f"type {kind}\nnode_from 1\nnode_to 0\nflags {flags}\n")
        assert read_machine(str(tmp_path)).gpus[0].pcie_atomics is expected


FILES = [
    path.relative_to(MACHINES / "rx_6600_and_raphael")
    for path in sorted((MACHINES / "rx_6600_and_raphael").rglob("*"))
    if path.is_file()
]


@given(
    damage=st.lists(
        st.tuples(
            st.sampled_from(FILES),
            st.sampled_from(["cut", "bytes", "gone", "folder", "link"]),
            st.binary(max_size=300),
        ),
        max_size=8,
    ),
    where=st.integers(0, 700),
)
@settings(max_examples=150, deadline=None)
def test_reading_never_raises_and_whole_nodes_stay(tmp_path_factory, damage, where):
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(MACHINES / "rx_6600_and_raphael", root, dirs_exist_ok=True, symlinks=True)
    touched = set()
    for file, how, content in damage:
        path = Path(root / file)
        touched.add(str(file).split("/")[6] if "nodes" in str(file) else "")
        if path.is_dir() and not path.is_symlink():
            continue
        before = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)
        if how == "cut":
            path.write_bytes(before[:where])
        elif how == "bytes":
            path.write_bytes(before[:where] + content + before[where:])
        elif how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(path.name)  # a loop
    machine = read_machine(str(root))
    for node, gfx in (("1", "gfx1032"), ("2", "gfx1036")):
        if node not in touched:
            assert gfx in [gpu.gfx for gpu in machine.gpus]
    shutil.rmtree(root)

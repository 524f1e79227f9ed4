"""`rocm-patch scan`: its answers, what it remembers, and who makes use of it."""

import json
import os
import shutil
import sqlite3
import struct
import time
from pathlib import Path

import pytest

from builds import bundle_of
from code_objects import triton
from conftest import MACHINES, python, rocm_patch
from rocm_patch.machine import fit
from rocm_patch.machine.build import read_build
from rocm_patch.machine.scan import hazards, places, scanning
from rocm_patch.machine.scan.files import Part
from rocm_patch.machine.scan.kept import Kept
from rocm_patch.machine.scan.scanning import Question, scan
from rocm_patch.settings import Settings
from rocm_patch.tools import scan as tool

pytestmark = pytest.mark.torch_free
NAVI10 = Question("gfx1010", "10.3.0")


def by_name(found):
    return {library.name: library for library in found.libraries}


def answers(found):
    return {library.name: library.answer(found.question) for library in found.libraries}


def test_an_answer_for_each_library(old_torch, own_environ):
    found = scan([old_torch], Question("gfx1010"), own_environ)
    said = answers(found)
    assert {name: answer.kind for name, answer in said.items()} == {
        "libtorch_hip.so": "override", "rocBLAS kernels": "native", "MIOpen databases": "override",
    }  # fmt: skip
    assert said["libtorch_hip.so"].words == "only through HSA_OVERRIDE_GFX_VERSION=10.3.0, as gfx1030"
    assert said["rocBLAS kernels"].words == "native"
    assert by_name(found)["rocBLAS kernels"].files == 2
    assert not by_name(found)["MIOpen databases"].has_code
    other = answers(scan([old_torch], Question("gfx1100"), own_environ))
    assert other["libtorch_hip.so"].kind == "none"


def test_under_an_override_only_the_other_chips_code_is_loaded(old_torch, own_environ):
    said = answers(scan([old_torch], NAVI10, own_environ))
    assert said["libtorch_hip.so"].words == "code for gfx1030 under HSA_OVERRIDE_GFX_VERSION=10.3.0"
    assert said["rocBLAS kernels"].words.endswith("; without it gfx1010")
    (old_torch / "lib/rocblas/library/Kernels.so-000-gfx1030.hsaco").unlink()
    answer = answers(scan([old_torch], NAVI10, own_environ))["rocBLAS kernels"]
    assert answer.kind == "none"
    assert answer.words.endswith("which asks for gfx1030; without it native, gfx1010")


def test_generic_targets_are_native(tmp_path, own_environ):
    code = bytearray(triton()["gfx1010"])
    struct.pack_into("<I", code, 0x30, 0x52)
    (tmp_path / "x.hsaco").write_bytes(code)
    found = scan([tmp_path / "x.hsaco"], Question("gfx1012"), own_environ)
    assert answers(found)["x.hsaco"].words == "native, by gfx10-1-generic"
    assert found.libraries[0].harm(found.question).clean == 1


def test_the_code_that_the_answer_is_about_is_examined(old_torch, own_environ):
    found = by_name(scan([old_torch], NAVI10, own_environ))
    assert found["libtorch_hip.so"].harm(NAVI10).with_bug == 1
    assert found["rocBLAS kernels"].harm(NAVI10).examined == 1
    # Without an override the card's own code, and where there is none that of the override that would be needed.
    native = Question("gfx1010")
    found = by_name(scan([old_torch], native, own_environ))
    harm = found["rocBLAS kernels"].harm(native)
    assert (harm.examined, harm.clean) == (1, 1)
    assert found["libtorch_hip.so"].harm(native).with_bug == 1
    # Cards that no rule concerns have nothing against them.
    other = Question("gfx1031", "10.3.0")
    assert by_name(scan([old_torch], other, own_environ))["libtorch_hip.so"].harm(other).clean == 1


def test_what_was_read_is_remembered_until_it_changes(old_torch, own_environ):
    seen = []

    def total():
        seen.clear()
        found = scan([old_torch], NAVI10, own_environ, progress=lambda done, total: seen.append(done))
        return by_name(found)["libtorch_hip.so"].harm(NAVI10).with_bug, bool(seen)

    assert total() == (1, True)
    assert total() == (1, False)
    library = old_torch / "lib/libtorch_hip.so"
    library.write_bytes(bundle_of({"gfx1030": triton()["gfx1030"], "gfx1010": triton()["gfx1010"]}))
    assert total() == (1, True)
    assert total() == (1, False)
    scan([old_torch], NAVI10, own_environ, progress=lambda done, total: seen.append(done), again=True)
    assert seen
    library.unlink()
    assert "libtorch_hip.so" not in by_name(scan([old_torch], NAVI10, own_environ))


def test_an_unusable_memory_is_one_warning(old_torch, own_environ, tmp_path, caplog):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "scan.sqlite3").write_bytes(b"no database " * 100)
    found = by_name(scan([old_torch], NAVI10, own_environ))
    assert found["libtorch_hip.so"].harm(NAVI10).with_bug == 1
    assert len([record for record in caplog.records if "not remembered" in record.message]) == 1
    shutil.rmtree(folder)
    folder.write_text("a file where a folder should be")
    caplog.clear()
    assert by_name(scan([old_torch], NAVI10, own_environ))["libtorch_hip.so"].harm(NAVI10).with_bug == 1
    assert len(caplog.records) == 1


def test_a_scan_that_is_killed_while_it_writes_loses_nothing(old_torch, own_environ, tmp_path):
    """SQLite's own promise, tried: killed in the transaction, the next scan reads what was there before."""
    scan([old_torch], NAVI10, own_environ)
    code = (
        "import os, signal\n"
        "from rocm_patch.machine.scan.kept import Kept\n"
        "memory = Kept(os.environ, 'gfx1010', 'gfx1030')\n"
        "database = memory._open(is_to_write=True)\n"
        "database.execute('BEGIN IMMEDIATE')\n"
        "database.execute('DELETE FROM file')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert python("-c", code, check=False, ROCM_PATCH_CACHE_DIR=own_environ["ROCM_PATCH_CACHE_DIR"]).returncode == -9
    seen = []
    scan([old_torch], NAVI10, own_environ, progress=lambda done, total: seen.append(done))
    assert seen == []


def test_processes_side_by_side_find_the_same(tmp_path, own_environ):
    code = {"gfx1030": triton()["gfx1030"] + bytes(6 << 20), "gfx1010": triton()["gfx1010"]}
    for number in range(3):
        (tmp_path / f"lib{number}.so").write_bytes(bundle_of(code))
    where = sorted(tmp_path.glob("lib*.so"))
    alone = tool.document(scan(where, NAVI10, own_environ, again=True, jobs=1))
    together = tool.document(scan(where, NAVI10, own_environ, again=True, jobs=2))
    assert alone == together and len(alone["libraries"]) == 3


class Deadly(scanning._Task):
    """A task over which the process that receives it dies."""

    def __reduce__(self):
        return (os.abort, ())


def test_a_worker_that_dies_takes_nothing_along(tmp_path):
    path = tmp_path / "x.hsaco"
    path.write_bytes(triton()["gfx1030"])
    part = (Part("object", 0, 16 << 20),)
    tasks = [kind(path, part, "gfx1010", ("gfx1030",)) for kind in (scanning._Task, Deadly, scanning._Task)]
    found = [(type(task) is Deadly, content) for task, content in scanning._run(tasks, 2)]
    assert sorted(is_deadly for is_deadly, _ in found) == [False, False, True]
    for is_deadly, content in found:
        assert bool(content.notes) == is_deadly and bool(content.targets) != is_deadly


def test_files_that_change_or_cannot_be_read(tmp_path, own_environ):
    (tmp_path / "gone.so").symlink_to(tmp_path / "nowhere")
    (tmp_path / "twice.hsaco").write_bytes(triton()["gfx1030"])
    os.link(tmp_path / "twice.hsaco", tmp_path / "again.hsaco")
    (tmp_path / "folder.so").mkdir()
    (tmp_path / "link.hsaco").symlink_to(tmp_path / "twice.hsaco")
    (tmp_path / "spoilt.co").write_bytes(b"__CLANG_OFFLOAD_BUNDLE__" + bytes(100))
    os.mkfifo(tmp_path / "pipe.so")
    found = by_name(scan([tmp_path], NAVI10, own_environ))
    assert sum(library.has_code for library in found.values()) == 1
    assert found["spoilt.co"].content.notes == ["a spoilt bundle"]


def test_where_it_looks(old_torch, tmp_path, own_environ):
    rocm = tmp_path / "opt/rocm-6.2.0/lib"
    rocm.mkdir(parents=True)
    (rocm / "librocsparse.so.1").write_bytes(bundle_of({"gfx1030": triton()["gfx1030"]}))
    cache = tmp_path / "home/.triton/cache/ABC"
    cache.mkdir(parents=True)
    (cache / "kernel.hsaco").write_bytes(triton()["gfx1010"])
    apart = old_torch.parent / "amd_torch_device_gfx1010/.kpack"
    apart.mkdir(parents=True)
    (apart / "x.co").write_bytes(triton()["gfx1010"])
    own_environ["HOME"] = "/home"
    found = by_name(scan(places.default_places(old_torch, own_environ, str(tmp_path)), NAVI10, own_environ))
    assert {"librocsparse.so.1", "Triton's cache", "x.co", "libtorch_hip.so", "rocBLAS kernels"} <= set(found)


# The command.


def test_the_command(old_torch, own_environ):
    options = ("--card", "gfx1010", "--override", "10.3.0")
    shown = rocm_patch("scan", old_torch, *options, **own_environ).stdout.splitlines()
    assert shown[0] == "card gfx1010, HSA_OVERRIDE_GFX_VERSION=10.3.0, under which code for gfx1030 is loaded"
    assert "libtorch_hip.so: code for gfx1030 under HSA_OVERRIDE_GFX_VERSION=10.3.0" in shown
    assert any(line.strip().startswith("wrong values possible: ") for line in shown)
    assert "2 with GPU code: 2 by another chip's code" in shown
    assert "2 of their 2 kernels and functions have something against them on gfx1010" in shown
    shown = rocm_patch(
        "scan", old_torch, "--card", "gfx1010", "--override", "none", **own_environ
    ).stdout.splitlines()
    assert shown[0] == "card gfx1010, no override"
    assert "rocBLAS kernels: native" in shown
    assert "2 with GPU code: 1 native, 1 by another chip's code" in shown
    document = json.loads(rocm_patch("scan", old_torch, *options, "--json", **own_environ).stdout)
    assert document["schema_version"] == 1 and document["reported"] == "gfx1030"
    rows = {row["name"]: row for row in document["libraries"]}
    assert rows["libtorch_hip.so"]["answer"] == "override"
    assert rows["libtorch_hip.so"]["targets"]["gfx1030"]["kernels"] == 1
    harm = rows["libtorch_hip.so"]["hazards"]
    assert (harm["examined"], harm["with_bug"], harm["clean"]) == (1, 1, 0)
    assert harm["kernels"][0]["name"] == "reduce"
    assert {row["id"] for row in document["rules"]} >= set(harm["places"])


def test_strict_is_for_code_that_can_be_loaded_and_is_clean(old_torch, own_environ, tmp_path):
    rocblas = old_torch / "lib/rocblas/library"
    (tmp_path / "empty").mkdir()
    for where, override, code in (
        (old_torch, "10.3.0", 1), (old_torch, "none", 1), (rocblas, "none", 0), (rocblas, "10.3.0", 1),
        (rocblas / "Kernels.so-000-gfx1010.hsaco", "10.3.0", 1), (tmp_path / "empty", "none", 1),
    ):  # fmt: skip
        options = ("--card", "gfx1010", "--override", override, "--strict")
        assert rocm_patch("scan", where, *options, check=False, **own_environ).returncode == code, (where, override)


def test_the_command_names_every_kernel(tmp_path, own_environ):
    library = tmp_path / "rocblas/library"
    library.mkdir(parents=True)
    for number in range(5):
        (library / f"{number}.hsaco").write_bytes(triton()["gfx1030"].replace(b"reduce", b"reduc%d" % number))
    options = (library, "--card", "gfx1010", "--override", "10.3.0")
    few = rocm_patch("scan", *options, **own_environ).stdout
    assert few.count("      reduc") == 0 and "hint: --kernels names them" in few
    assert rocm_patch("scan", *options, "--kernels", **own_environ).stdout.count("      reduc") == 5


def test_the_command_without_a_card_lists_what_there_is(old_torch, own_environ):
    shown = rocm_patch("scan", old_torch, ROCM_PATCH_SYSFS_ROOT=str(MACHINES / "cpu_only"), **own_environ).stdout
    assert shown.startswith("no AMD GPU here and none named")
    assert "rocBLAS kernels: gfx1010, gfx1030" in shown


def test_bad_arguments(old_torch, own_environ, tmp_path):
    for arguments, said in (
        (("/nowhere",), "no such file or folder"),
        ((str(old_torch), "--card", "gfx9999"), "unknown card"),
        ((str(old_torch), "--override", "x"), "is no override"),
    ):
        done = rocm_patch("scan", *arguments, check=False, **own_environ)
        assert done.returncode == 2 and said in done.stderr and "hint:" in done.stderr


def test_the_override_that_is_in_force_counts(old_torch, own_environ):
    settings = Settings(sysfs_root=str(MACHINES / "rx_5600_xt"))
    build = read_build(old_torch)
    assert tool.question_of(settings, own_environ, build) == Question("gfx1010", "10.3.0")
    assert tool.question_of(settings, {**own_environ, fit.OVERRIDE: "10.1.0"}, build) == Question("gfx1010", "10.1.0")
    assert tool.question_of(settings, own_environ, build, override="none") == Question("gfx1010", "")
    assert tool.question_of(settings, own_environ, build, card="gfx1031") == Question("gfx1031", "10.3.0")
    assert tool.question_of(Settings(sysfs_root=str(MACHINES / "cpu_only")), own_environ, None) == Question()


def test_what_is_kept_of_changed_files_does_not_count(old_torch, own_environ):
    scan([old_torch], NAVI10, own_environ)
    kept = Kept(own_environ, "gfx1010", "gfx1030")
    library = old_torch / "lib/libtorch_hip.so"
    assert (kept.harm([old_torch], "gfx1030").examined, kept.harm([library], "gfx1030").harmful) == (2, 1)
    assert (kept.harm([old_torch], "gfx1010").examined, kept.harm([old_torch], "gfx1010").harmful) == (1, 0)
    os.utime(library, (1, 1))
    assert kept.harm([library], "gfx1030") is None
    assert kept.harm([Path("/nowhere")], "gfx1030") is None
    with sqlite3.connect(Path(own_environ["ROCM_PATCH_CACHE_DIR"]) / "scan.sqlite3") as database:
        database.execute("UPDATE file SET content = 'spoilt'")
    assert kept.read(old_torch / "lib/rocblas/library/Kernels.so-000-gfx1030.hsaco", "x") is None
    kept.close()


def test_worst_kernels_come_first():
    rows = [
        hazards.Kernel("b", {"inst-prefetch": 9}), hazards.Kernel("a", {"gfx10-dot": 1}),
        hazards.Kernel("c", {"inst-prefetch": 1, "flat-offset": 1}),
    ]  # fmt: skip
    assert [kernel.name for kernel in sorted(rows, key=lambda kernel: kernel.rank)] == ["a", "c", "b"]


def test_names_that_are_no_text(tmp_path, own_environ):
    folder = tmp_path / "here"
    folder.mkdir()
    name = os.fsencode(folder) + b"/lib\xff\xe9.hsaco"
    with open(name, "wb") as file:
        file.write(triton()["gfx1030"])
    shown = rocm_patch("scan", folder, "--card", "gfx1010", "--override", "10.3.0", **own_environ)
    assert "code for gfx1030 under HSA_OVERRIDE_GFX_VERSION=10.3.0" in shown.stdout
    seen = []
    scan([folder], NAVI10, own_environ, progress=lambda done, total: seen.append(done))
    assert seen == []


def test_a_python_without_some_compressions():
    code = (
        "import sys\nfor name in ('_lzma', '_bz2'): sys.modules[name] = None\n"
        "import rocm_patch.machine.build, rocm_patch.launch.run, rocm_patch.machine.scan.scanning\n"
    )
    python("-c", code)


def test_nobody_waits_for_a_scan_that_writes(old_torch, own_environ):
    scan([old_torch], NAVI10, own_environ)
    path = Path(own_environ["ROCM_PATCH_CACHE_DIR"]) / "scan.sqlite3"
    before = path.stat().st_mtime_ns
    kept = Kept(own_environ, "gfx1010", "gfx1030")
    assert kept.harm([old_torch], "gfx1030") is not None
    kept.close()
    assert path.stat().st_mtime_ns == before  # reading has written nothing
    with sqlite3.connect(path, isolation_level=None) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        assert Kept(own_environ, "gfx1010", "gfx1030").harm([old_torch], "gfx1030") is None
        assert time.monotonic() - started < 5
        writer.execute("ROLLBACK")


def test_what_could_not_be_read_is_tried_again(tmp_path, own_environ):
    path = tmp_path / "here.co"
    path.write_bytes(b"CCOB" + struct.pack("<HHQQQ", 3, 1, 64, 64, 0) + bytes(32))
    for _ in range(2):
        seen = []
        scan([path], NAVI10, own_environ, progress=lambda done, total, seen=seen: seen.append(done))
        assert seen


def test_files_of_one_library_for_several_chips(tmp_path, own_environ):
    for target in ("gfx1010", "gfx1030"):
        (tmp_path / f"torch_{target}.hsaco").write_bytes(triton()[target])
    (library,) = scan([tmp_path], Question("gfx1010"), own_environ).libraries
    assert (library.name, library.files, library.answer(Question("gfx1010")).kind) == (
        "torch_gfx*.hsaco",
        2,
        "native",
    )

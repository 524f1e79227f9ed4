"""The torch build from its files: kind, versions, device code, AMD's data files."""

import gzip
import json
import os
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builds import bundle, torch_build, torch_folder
from code_objects import compressed
from conftest import ROOT
from rocm_patch.machine.build import find_build, find_libraries, read_build, version_numbers
from rocm_patch.machine.device_code import cached_targets_of, targets_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def library(tmp_path):
    """A library that hipcc has made."""
    path = tmp_path / "libtwo.so"
    path.write_bytes(gzip.decompress((ROOT / "tests/data/libtwo.so.gz").read_bytes()))
    return path


def test_a_real_hip_library(library):
    assert targets_of(library) == {"gfx1010", "gfx1030", "gfx90a"}


def test_a_library_without_section_headers(library):
    content = bytearray(library.read_bytes())
    content[0x28:0x30] = bytes(8)  # where the section table would be
    content[0x3C:0x40] = bytes(4)
    library.write_bytes(content)
    assert targets_of(library) == {"gfx1010", "gfx1030", "gfx90a"}


def test_no_device_code(tmp_path):
    import torch

    assert targets_of(next((tmp_path.__class__(torch.__file__).parent / "lib").glob("libc10.so"))) == frozenset()
    (tmp_path / "empty.so").touch()
    assert targets_of(tmp_path / "empty.so") == frozenset()
    with pytest.raises(FileNotFoundError):
        targets_of(tmp_path / "missing.so")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_compressed_bundles(tmp_path, version):
    path = tmp_path / "lib.so"
    path.write_bytes(
        compressed(bundle("gfx1100"), version) + bundle("gfx1030:xnack-") + compressed(bundle("gfx1201"), version)
    )
    assert targets_of(path) == {"gfx1100", "gfx1030", "gfx1201"}


def test_a_compression_that_this_python_cannot_read(tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"CCOB" + struct.pack("<HHQQQ", 3, 1, 96, 64, 0) + b"\x28\xb5\x2f\xfd" + bytes(60))
    assert targets_of(path) == frozenset()


def elf(sections, flags=0):
    """The smallest 64-bit ELF file with these sections."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in [*sections, ".shstrtab"])
    body, headers, name_at = b"\0" * 64, [], 1
    for name, content in [*sections.items(), (".shstrtab", names)]:
        headers.append(struct.pack("<IIQQQQIIQQ", name_at, 1, flags, 0, len(body), len(content), 0, 0, 1, 0))
        body, name_at = body + content, name_at + len(name) + 1
    head = b"\x7fELF\x02\x01\x01".ljust(0x28, b"\0") + struct.pack("<Q", len(body))
    head = head.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, len(headers), len(headers) - 1)
    return head + body[64:] + b"".join(headers)


def test_the_list_that_torch_was_built_for_stands_in_where_code_is_compressed(tmp_path):
    listed = b"other text\0gfx900 gfx906 gfx1030 gfx1100\0gfx90a\0more"
    (tmp_path / "libtorch_python.so").write_bytes(elf({".rodata": listed, ".data": b"gfx803 gfx701\0"}))
    assert targets_of(tmp_path / "libtorch_python.so") == {"gfx900", "gfx906", "gfx1030", "gfx1100"}


@given(
    content=st.binary(max_size=400), head=st.sampled_from([b"", b"CCOB\x02\x00\x00\x00", b"__CLANG_OFFLOAD_BUNDLE__"])
)
def test_reading_code_never_raises(tmp_path_factory, content, head):
    path = tmp_path_factory.mktemp("code") / "lib.so"
    path.write_bytes(head + content)
    targets_of(path)
    path.write_bytes(elf({".hip_fatbin": head + content, ".rodata": content}))
    targets_of(path)


def test_several_gigabytes_in_two_seconds(tmp_path):
    path = tmp_path / "libtorch_hip.so"
    count, each = 600, 8 << 20  # a ROCm build has a bundle for each of its kernels' source files
    with path.open("wb") as file:
        for place in range(count):
            file.seek(place * each)
            head = bundle("gfx900", "gfx1030", "gfx1100", code=each // 3 - 4096)
            file.write(head[:4096])
        file.truncate(count * each)  # sparse: what is not read costs nothing on disk either
    started = time.perf_counter()
    assert targets_of(path) == {"gfx900", "gfx1030", "gfx1100"}
    assert time.perf_counter() - started < 2


def test_targets_are_remembered_by_the_files_identity(tmp_path, library):
    store = tmp_path / "cache" / "device_code.json"
    assert cached_targets_of(library) == {"gfx1010", "gfx1030", "gfx90a"}
    (kept,) = json.loads(store.read_text())
    store.write_text(json.dumps({kept: ["gfx42"]}))
    assert cached_targets_of(library) == {"gfx42"}
    os.utime(library, ns=(1, 1))
    assert cached_targets_of(library) == {"gfx1010", "gfx1030", "gfx90a"}
    assert len(json.loads(store.read_text())) == 1  # the entry of the file that was is gone
    for spoilt in (b"\xff\xfe", b"[1, 2]", b'{"a": 5}', b'{"a"'):
        store.write_bytes(spoilt)
        assert cached_targets_of(library) == {"gfx1010", "gfx1030", "gfx90a"}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, library, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROCM_PATCH_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert cached_targets_of(library) == {"gfx1010", "gfx1030", "gfx90a"}


@pytest.mark.parametrize(
    ("targets", "gfx", "carried"),
    [
        (["gfx1010"], "gfx1010", True),
        (["gfx1010"], "gfx101", False),
        (["gfx1030"], "gfx1031", False),
        (["gfx10-1-generic"], "gfx1010", True),
        (["gfx10-1-generic"], "gfx1030", False),
        (["gfx10-3-generic"], "gfx1036", True),
        (["gfx11-generic"], "gfx1151", True),
        (["gfx12-generic"], "gfx1201", True),
        (["gfx9-generic"], "gfx90c", True),
        (["gfx9-generic"], "gfx90a", False),
        (["gfx9-4-generic"], "gfx942", True),
        (["gfx90a:sramecc+:xnack-"], "gfx90a", True),
        ([], "gfx1010", None),
    ],
)
def test_native_code(tmp_path, targets, gfx, carried):
    # Generic targets as LLVM lists them: https://llvm.org/docs/AMDGPUUsage.html#amdgpu-generic-processor-table
    assert torch_build(tmp_path, "2.6.0+rocm6.1", "6.1", targets=targets).carries(gfx) is carried


def test_amds_device_package_is_native_code(tmp_path):
    folder = torch_folder(tmp_path, "2.12.0+rocm7.14.0", "7.14")
    assert read_build(folder).carries("gfx1010") is None
    (folder.parent / "amd_torch_device_gfx1010-2.12.0+rocm7.14.0.dist-info").mkdir()
    assert read_build(folder).carries("gfx1010") and not read_build(folder).carries("gfx1012")


def test_other_builds_carry_nothing(tmp_path):
    build = torch_build(tmp_path, "2.13.0+cu130", cuda="13.0")
    assert build.kind == "cuda" and build.carries("gfx1030") is False
    assert torch_build(tmp_path / "b", "2.13.0+cpu").kind == "cpu"


def test_data_files_of_rocblas_and_miopen(tmp_path):
    rocblas = [
        "TensileLibrary_gfx1030.co",
        "TensileLibrary_gfx900.co",
        "Kernels.so-000-gfx906-xnack-.hsaco",
        "README",
    ]
    folder = torch_folder(
        tmp_path, "1.13.1+rocm5.2", "5.2", rocblas=rocblas, miopen=["gfx1030_36.db", "gfx900_64.fdb.txt"]
    )
    found = find_libraries(read_build(folder), str(tmp_path))
    assert found.rocblas == {"gfx1030", "gfx900", "gfx906"} and found.rocblas_folder.endswith("lib/rocblas/library")
    assert found.miopen == ("gfx1030_36.db", "gfx900_64.fdb.txt")
    system = tmp_path / "opt/rocm-6.1.0/lib/rocblas/library"
    system.mkdir(parents=True)
    (system / "TensileLibrary_lazy_gfx1100.dat").touch()
    assert find_libraries(None, str(tmp_path)).rocblas == {"gfx1100"}
    assert find_libraries(read_build(folder), str(tmp_path)).rocblas == {"gfx1030", "gfx900", "gfx906"}


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

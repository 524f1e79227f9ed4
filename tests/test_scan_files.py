"""Where code lies: bundles, libraries, archives, and counts that are exact."""

import bz2
import lzma
import sqlite3
import struct
from contextlib import closing

import pytest

from builds import bundle, bundle_of
from code_objects import HIP_TARGETS, SOURCE, compressed, hip, hipcc, needs_hipcc, plain, triton
from rocm_patch.machine.scan import elf, files, inventory

pytestmark = pytest.mark.torch_free
HIP_KERNELS = 4  # prefetched_loop, dot_product, add, calls


def read(path):
    return inventory.read(path, files.parts(path), "", ())


def counts(path):
    """Target to (pieces, kernels, bytes)."""
    content = read(path)
    assert content.notes == []
    return {target: (found.objects, found.kernels, found.bytes) for target, found in content.targets.items()}


def expected(*targets):
    return {target: (1, HIP_KERNELS, len(hip(target))) for target in targets}


@needs_hipcc
def test_kernels_and_functions_of_a_code_object():
    found = elf.read_code_object(hip("gfx1030"))
    assert (found.target, found.kernels) == ("gfx1030", HIP_KERNELS)
    kinds = {function.name: function.is_kernel for function in found.functions}
    assert kinds == {"prefetched_loop": True, "dot_product": True, "add": True, "calls": True, "_Z5apartf": False}
    assert all(function.size > 20 and function.is_wave32 for function in found.functions)
    assert elf.length_at(bytes(8) + hip("gfx1030") + bytes(100), 8, 108 + len(hip("gfx1030"))) == len(hip("gfx1030"))


@needs_hipcc
@pytest.mark.parametrize("target", HIP_TARGETS)
def test_bare(tmp_path, target):
    (tmp_path / "x.hsaco").write_bytes(hip(target))
    assert counts(tmp_path / "x.hsaco") == expected(target)


@needs_hipcc
def test_bundled(tmp_path):
    (tmp_path / "x.co").write_bytes(plain(*HIP_TARGETS))
    assert counts(tmp_path / "x.co") == expected(*HIP_TARGETS)


@needs_hipcc
@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_compressed(tmp_path, version, method):
    (tmp_path / "x.co").write_bytes(compressed(plain("gfx900", "gfx1030"), version, method))
    assert counts(tmp_path / "x.co") == expected("gfx900", "gfx1030")


@needs_hipcc
def test_inside_a_shared_library(tmp_path):
    targets = ("gfx900", "gfx906", "gfx1010", "gfx1030")
    for name in ("one", "two"):
        (tmp_path / f"{name}.hip").write_text(f"#define apart apart_{name}\n{SOURCE.read_text()}")
        chosen = [f"--offload-arch={target}" for target in targets]
        renamed = [f"-D{kernel}={kernel}_{name}" for kernel in ("prefetched_loop", "dot_product", "add", "calls")]
        made = tmp_path / f"{name}.o"
        hipcc("-O3", "-fPIC", "-c", *renamed, tmp_path / f"{name}.hip", "-o", made, *chosen)
    library = tmp_path / "libboth.so.1"
    hipcc("-shared", "-o", library, tmp_path / "one.o", tmp_path / "two.o")
    found = counts(library)
    assert {target: found[target][:2] for target in found} == dict.fromkeys(targets, (2, 2 * HIP_KERNELS))
    # One object file holds the half of it, and an archive of both the whole.
    assert {t: n[:2] for t, n in counts(tmp_path / "one.o").items()} == dict.fromkeys(targets, (1, HIP_KERNELS))


def test_triton_and_features_of_a_target(tmp_path):
    for target, code in triton().items():
        (tmp_path / f"{target}.hsaco").write_bytes(code)
        assert counts(tmp_path / f"{target}.hsaco") == {target: (1, 1, len(code))}
    code = triton()["gfx1100"]
    (tmp_path / "x.co").write_bytes(bundle_of({"gfx1100": code, "gfx90a:xnack-": b"BC\xc0\xde not machine code"}))
    assert counts(tmp_path / "x.co") == {"gfx1100": (1, 1, len(code)), "gfx90a": (1, 0, 21)}


def test_code_that_is_for_any_chip(tmp_path):
    head = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", 1)
    name = b"hip-spirv64-amd-amdhsa--amdgcnspirv"
    whole = head + struct.pack("<QQQ", 4096, 8, len(name)) + name
    (tmp_path / "x.co").write_bytes(whole.ljust(4096, b"\0") + bytes(8))
    assert counts(tmp_path / "x.co") == {"amdgcnspirv": (1, 0, 8)}


def test_bundles_and_bare_code_in_any_data_of_a_library(tmp_path):
    from test_build import elf as elf_with

    code = triton()["gfx1030"]
    content = (
        b"text" + code + bytes(5) + bundle_of({"gfx1100": triton()["gfx1100"]}) + b"__CLANG_OFFLOAD_BUNDLE__ too"
    )
    library = tmp_path / "libx.so"
    library.write_bytes(elf_with({".rodata": content, ".hip_fatbin": bundle("gfx900")}, flags=2))
    assert {t: n[0] for t, n in counts(library).items()} == {"gfx1030": 1, "gfx1100": 1, "gfx900": 1}
    assert counts(library)["gfx1030"] == (1, 1, len(code))


def test_an_offload_binary(tmp_path):
    from test_build import elf as elf_with

    code = triton()["gfx1030"]
    whole = b"\x10\xff\x10\xad" + struct.pack("<IQQQ", 1, 72 + len(code), 32, 40)
    whole += struct.pack("<HHIQQQQ", 1, 4, 0, 0, 0, 72, len(code)) + code
    library = tmp_path / "libx.so"
    library.write_bytes(elf_with({".llvm.offloading": whole * 2}))
    assert counts(library) == {"gfx1030": (2, 2, 2 * len(code))}


def kern_db(path, *blobs):
    """A database as MIOpen's kern_db.hpp makes it."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE kern_db (id INTEGER PRIMARY KEY ASC, kernel_name TEXT NOT NULL, kernel_args TEXT NOT NULL, "
            "kernel_blob BLOB NOT NULL, kernel_hash TEXT NOT NULL, uncompressed_size INT NOT NULL)"
        )
        for number, blob in enumerate(blobs):
            database.execute(
                "INSERT INTO kern_db VALUES (?, ?, ?, ?, ?, ?)", (number, "a.o", "-mcpu=gfx1030", blob, "hash", 1)
            )


def test_miopens_kernels(tmp_path):
    code = triton()["gfx1030"]
    kern_db(tmp_path / "gfx1030_36.kdb", bz2.compress(code), code, bz2.compress(bundle_of({"gfx1030": code})))
    assert counts(tmp_path / "gfx1030_36.kdb") == {"gfx1030": (3, 3, 3 * len(code))}


def test_rocffts_kernels(tmp_path):
    code = triton()["gfx1100"]
    with closing(sqlite3.connect(tmp_path / "rocfft_kernel_cache.db")) as database, database:
        database.execute("CREATE TABLE cache_v1 (kernel_name TEXT, arch TEXT, hip_version INTEGER, code BLOB)")
        database.execute("INSERT INTO cache_v1 VALUES ('fft', 'gfx1100', 1, ?)", (code,))
    assert counts(tmp_path / "rocfft_kernel_cache.db") == {"gfx1100": (1, 1, len(code))}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gfx1030_36.HIP.fdb.txt", "gfx1030"), ("gfx90878.HIP.fdb.txt", "gfx908"), ("gfx110136.db.txt", "gfx1101"),
        ("gfx1030_18.HIP.2_17_0_abc.ufdb.txt", "gfx1030"),
    ],
)  # fmt: skip
def test_miopens_records(tmp_path, name, target):
    (tmp_path / name).write_text("64-7-7-3x3=ConvWinograd:1,2,3\n1-1-1=Gemm:1,2,3\n")
    found = read(tmp_path / name)
    assert {t: (n.objects, n.records) for t, n in found.targets.items()} == {target: (0, 2)}


def aotriton(*images):
    directory, body = b"", b""
    for number, image in enumerate(images):
        name = f"kernel{number}\0".encode()
        directory += struct.pack("<IIIII", 0, 128, len(body), len(image), len(name)) + name
        body += image
    whole = directory + body
    head = b"AKS2" + struct.pack("<III", len(whole), len(images), len(directory))
    return head + lzma.compress(whole)


def test_aotriton(tmp_path):
    import zipfile

    code = triton()["gfx1100"]
    (tmp_path / "x.aks2").write_bytes(aotriton(code, b"", code))
    assert counts(tmp_path / "x.aks2") == {"gfx1100": (2, 2, 2 * len(code))}
    with zipfile.ZipFile(tmp_path / "flash.zip", "w") as archive:
        archive.writestr("a.aks2", aotriton(code))
        archive.writestr("other.txt", b"text")
    assert counts(tmp_path / "flash.zip") == {"gfx1100": (1, 1, len(code))}


def kpack(code, scheme):
    """A file as TheRock's kpack.py makes it: header, code, table of contents in msgpack."""
    import msgpack

    from rocm_patch.machine.scan.compression import zstd_module

    table = {"format_version": 1, "gfx_arches": list(code), "compression_scheme": scheme}
    toc = {
        target: {"type": "hsaco", "ordinal": n, "original_size": len(c)} for n, (target, c) in enumerate(code.items())
    }
    table["toc"] = {"lib/libtorch_hip.so#0": toc}
    body, place = b"", 64
    if scheme == "none":
        table["blobs"] = []
        for content in code.values():
            table["blobs"].append({"offset": place + len(body), "size": len(content)})
            body += content
    else:
        frames = [zstd_module().compress(content) for content in code.values()]
        body = struct.pack("<I", len(frames)) + b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
        table |= {"zstd_offset": place, "zstd_size": len(body)}
    head = b"KPAK" + struct.pack("<IQ", 1, place + len(body))
    return head.ljust(place, b"\0") + body + msgpack.packb(table)


@pytest.mark.parametrize("scheme", ["none", "zstd-per-kernel"])
def test_code_that_amds_wheels_keep_apart(tmp_path, scheme):
    code = {target: triton()[target] for target in ("gfx1010", "gfx1030")}
    (tmp_path / "torch_gfx1010.kpack").write_bytes(kpack(code, scheme))
    assert counts(tmp_path / "torch_gfx1010.kpack") == {t: (1, 1, len(c)) for t, c in code.items()}


def test_files_that_have_nothing_to_do_with_gpus(tmp_path):
    for name, content in {"a.txt": b"text " * 10, "b.so": b"\x7fELF", "c": b"", "d.db": b"SQLite format 3\0"}.items():
        (tmp_path / name).write_bytes(content)
    assert files.parts(tmp_path / "a.txt") == files.parts(tmp_path / "b.so") == files.parts(tmp_path / "c") == []
    with closing(sqlite3.connect(tmp_path / "other.db")) as database, database:
        database.execute("CREATE TABLE users (name TEXT)")
    assert counts(tmp_path / "other.db") == {}
    with pytest.raises(FileNotFoundError):
        files.parts(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("x.co", b"__CLANG_OFFLOAD_BUNDLE__" + bytes(100), "spoilt bundle"),
        ("x.co", compressed(bundle("gfx1030"))[:60], "a compressed bundle"),
        ("x.co", b"CCOB" + struct.pack("<HHQQQ", 3, 1, 64, 64, 0) + bytes(32), "zstd"),
        ("x.kdb", b"SQLite format 3\0" + bytes(100), "spoilt database"),
        ("x.aks2", b"AKS2" + struct.pack("<III", 100, 1, 50) + bytes(40), "cut off"),
        ("x.kpack", b"KPAK" + struct.pack("<IQ", 1, 1 << 40) + bytes(40), "kpack"),
        ("x.kpack", b"KPAK" + struct.pack("<IQ", 1, 16) + b"\x93\x01\x02\x03", "kpack"),
        ("x.zip", b"PK\3\4" + bytes(40), "spoilt archive"),
    ],
)
def test_spoilt_files_are_named(tmp_path, name, content, note):
    (tmp_path / name).write_bytes(content)
    try:
        notes = read(tmp_path / name).notes
    except ValueError as error:
        notes = [str(error)]
    assert any(note in text for text in notes), notes


def test_files_that_are_cut_off_count_with_what_is_there(tmp_path):
    code = triton()["gfx1030"]
    whole = {"x.hsaco": code, "y.co": bundle_of({"gfx1030": code, "gfx1010": triton()["gfx1010"]})}
    whole["z.co"] = compressed(whole["y.co"], 3)
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content.rstrip(b"\0")[: len(content) * (3 if name == "z.co" else 6) // 10])
        found = read(tmp_path / name)
        assert any("cut off" in note or "no bundle" in note for note in found.notes), (name, found)


def test_a_spoilt_archive_is_named(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.aks2", aotriton(triton()["gfx1100"]))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[60:80] = b"\xff" * 20
    (tmp_path / "x.zip").write_bytes(content)
    assert read(tmp_path / "x.zip").targets == {}  # AOTriton's are stored, not deflated


def test_a_file_that_claims_the_same_code_many_times(tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "_MOST_BYTES", 1 << 24)
    code = triton()["gfx1030"]
    names = [b"hipv4-amdgcn-amd-amdhsa--gfx1030"] * 20
    head = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(names))
    head += b"".join(struct.pack("<QQQ", 65536, 1 << 20, len(name)) + name for name in names)
    with (tmp_path / "x.co").open("wb") as file:
        file.write(head.ljust(65536, b"\0") + code)
        file.truncate(65536 + (1 << 20))
    assert any("more than 16 MiB" in note for note in read(tmp_path / "x.co").notes)


def test_a_bomb_costs_no_more_than_is_allowed(tmp_path, monkeypatch):
    from rocm_patch.machine.scan import bundles

    monkeypatch.setattr(bundles, "LARGEST", 1 << 20)
    (tmp_path / "x.co").write_bytes(compressed(plain_zeros(64 << 20)))
    assert "holds more than 1 MiB" in read(tmp_path / "x.co").notes[0]


def plain_zeros(size):
    return bundle_of({"gfx1030": bytes(size)})

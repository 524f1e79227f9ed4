"""The catalog holds what its records ask for, its files agree with each other, and its facts with their sources.

The expected values below were written from the sources beside them, not read back from the catalog.
"""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rocm_patch.machine import catalog
from rocm_patch.machine.catalog import Arch, CatalogError, Hazard, KnownIssue, Release, Row, Variable, read_rows

ROOT = Path(__file__).parents[1]
FOLDER = Path(catalog.__file__).parent
FILES = {"archs": ("arch", Arch), "variables": ("variable", Variable), "releases": ("release", Release),
         "issues": ("issue", KnownIssue), "hazards": ("hazard", Hazard)}  # fmt: skip
ROWS = [(f"{name}:{number}", row) for name in FILES for number, row in enumerate(getattr(catalog, name)(), start=1)]
ARCHS = {row.gfx: row for row in catalog.archs()}
TOPOLOGY = "ROCm/rocm-systems@04c92c1e:projects/rocr-runtime/libhsakmt/src/topology.c"
BUILDER = "pytorch/builder@release/{}:manywheel/build_docker.sh"


def numbers(version):
    return tuple(int(part) for part in version.split("."))


def every_row():
    return pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[place for place, _ in ROWS])


def every_arch():
    return pytest.mark.parametrize("row", list(ARCHS.values()), ids=list(ARCHS))


# Every file.


def test_every_file_of_the_catalog_is_read():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(FILES)
    for name, (table, kind) in FILES.items():
        assert read_rows(FOLDER / f"{name}.toml", table, kind) == getattr(catalog, name)()


def test_nothing_known_was_lost():
    assert len(catalog.archs()) >= 30 and len(catalog.variables()) >= 51 and len(catalog.releases()) >= 16


@pytest.mark.parametrize(("name", "key"), [("archs", "gfx"), ("archs", "version"), ("variables", "name"),
                                           ("releases", "torch"), ("issues", "id"), ("hazards", "id")])  # fmt: skip
def test_names_are_unique(name, key):
    found = [getattr(row, key) for row in getattr(catalog, name)()]
    assert sorted(found, key=str) == sorted(set(found), key=str)


SOURCE = re.compile(
    r"https?://[^\s/]+\.[^\s/]+/\S+"  # an address
    r"|[\w.-]+/[\w.-]+@[\w./-]+:\S+"  # repository@ref:path
    r"|(?:pytorch v\d+\.\d+\.\d+|torch \d+\.\d+\.\d+ wheel):\S+"
    r"|(?:measured|compiled)[: ].{20,}"  # what was done here, and with what
    r"|docs/\w[\w.]*\.md"  # a page of this repository
)


@every_row()
def test_every_row_names_its_sources(row):
    assert row.sources and len(set(row.sources)) == len(row.sources)
    for source in row.sources:
        assert SOURCE.fullmatch(source), source
        assert not source.startswith("docs/") or (ROOT / source).is_file()


@pytest.mark.parametrize("source", ["https://llvm.org", "see the forum", "ROCm/MIOpen:src/db.cpp", "docs/absent page",
                                    "pytorch 2.13:c10", "measured", "ROCT commit cf49", ""])  # fmt: skip
def test_what_is_not_a_source(source):
    assert not SOURCE.fullmatch(source)


@every_row()
def test_words_are_plain(row):
    for field in fields(row):
        value = getattr(row, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and field.name not in ("symptoms", "fix"):
                assert text == text.strip() and "  " not in text and "\n" not in text and "\u2014" not in text
                assert len(text) <= 420, f"{field.name} is too long to be shown"


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind) in FILES.items()])
def test_the_page_names_every_field(name, kind):
    page = (ROOT / "docs/CATALOG.md").read_text(encoding="utf-8")
    section = page.split(f"\n## `{name}.toml`", 1)[1].split("\n## ", 1)[0]
    common = page.split("\n## Fields that every row has", 1)[1].split("\n## ", 1)[0]
    shared = {field.name for field in fields(Row)}
    documented = set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE))
    assert documented == {field.name for field in fields(kind)} - shared
    assert set(re.findall(r"^\| `(\w+)`", common, flags=re.MULTILINE)) == shared


def test_the_pages_example_is_a_row(tmp_path):
    page = (ROOT / "docs/CATALOG.md").read_text(encoding="utf-8")
    example = re.search(r"```toml\n(\[\[arch\]\]\n.*?)```", page, flags=re.DOTALL)
    (tmp_path / "archs.toml").write_text(example[1])
    (row,) = read_rows(tmp_path / "archs.toml", "arch", Arch)
    assert row == ARCHS[row.gfx]


# The loader refuses what does not fit.

GOOD = {"torch": '"2.6"', "rocm": '["6.1"]', "python": '["3.9", "3.13"]', "numpy": '""', "archs": '["gfx900"]',
        "sources": '["https://example.org/x"]', "verified": "true"}  # fmt: skip


def written(folder, **changes):
    row = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    good = "[[release]]\n" + "".join(f"{name} = {value}\n" for name, value in GOOD.items())
    path = folder / "releases.toml"
    path.write_text(good + "[[release]]\n" + "".join(f"{name} = {value}\n" for name, value in row.items()))
    return path


def test_a_good_row_is_read_into_tuples(tmp_path):
    _, row = read_rows(written(tmp_path, note='"seen"'), "release", Release)
    assert row == Release(torch="2.6", rocm=("6.1",), python=("3.9", "3.13"), numpy="", archs=("gfx900",),
                          note="seen", sources=("https://example.org/x",), verified=True)  # fmt: skip


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_refused(tmp_path, field):
    with pytest.raises(CatalogError, match=rf"releases\.toml, row 2: unknown or missing: {field}\n"):
        read_rows(written(tmp_path, **{field: None}), "release", Release)


@pytest.mark.parametrize("field", ["nunpy", "Torch", "comment"])
def test_an_unknown_field_is_refused(tmp_path, field):
    with pytest.raises(CatalogError, match=rf"releases\.toml, row 2: unknown or missing: {field}\n"):
        read_rows(written(tmp_path, **{field: '"x"'}), "release", Release)


@pytest.mark.parametrize(
    ("field", "value"),
    [("torch", "2.6"), ("torch", "26"), ("numpy", "[]"), ("rocm", '"6.1"'), ("rocm", "[6.1]"), ("rocm", '["6.1", 6]'),
     ("archs", '[["gfx900"]]'), ("verified", "1"), ("verified", '"true"'), ("note", "true"), ("sources", "false")],
)  # fmt: skip
def test_a_mistyped_field_is_refused(tmp_path, field, value):
    with pytest.raises(CatalogError, match=rf"releases\.toml, row 2: {field} = .* is not a "):
        read_rows(written(tmp_path, **{field: value}), "release", Release)


def test_a_bool_is_no_number(tmp_path):
    path = tmp_path / "archs.toml"
    text = (FOLDER / "archs.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("version = 80003", "version = true", 1))
    with pytest.raises(CatalogError, match=r"archs\.toml, row 1: version = True is not a "):
        read_rows(path, "arch", Arch)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x7fELF\x02\x01\xff\xfe\x00", "cannot read"),
        (b"[[release]\ntorch = 2", "cannot read"),
        (b"", r"expected \[\[release\]\] tables only, found \[\]"),
        (b"[[arch]]\ngfx = 'gfx900'\n", r"tables only, found \['arch'\]"),
        (b"title = 'x'\n[[release]]\n", r"tables only, found \['release', 'title'\]"),
    ],
)
def test_a_file_that_is_no_table_of_rows_is_refused(tmp_path, content, said):
    (tmp_path / "releases.toml").write_bytes(content)
    with pytest.raises(CatalogError, match=said) as caught:
        read_rows(tmp_path / "releases.toml", "release", Release)
    assert str(tmp_path) in str(caught.value) and "docs/CATALOG.md" in caught.value.hint


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CatalogError, match="cannot read .*absent"):
        read_rows(tmp_path / "absent.toml", "release", Release)


def test_reading_the_catalog_does_not_load_torch():
    code = ("import sys; from rocm_patch.machine import catalog; catalog.archs(); catalog.variables(); "
            "catalog.releases(); catalog.issues(); print('torch' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# archs.toml


def test_the_file_that_each_process_reads_stays_small():
    assert (FOLDER / "archs.toml").stat().st_size < 40_000


@every_arch()
def test_name_and_number_agree(row):
    # gfx_target_version is decimal; in LLVM's name the last digit is hexadecimal: gfx90c is 9.0.12, 90012.
    found = re.fullmatch(r"gfx(\d{1,2})([0-9a-f])([0-9a-f])", row.gfx)
    assert row.version == int(found[1]) * 10000 + int(found[2], 16) * 100 + int(found[3], 16)


def test_oldest_first():
    assert [row.version for row in catalog.archs()] == sorted(row.version for row in catalog.archs())


def test_a_device_id_names_one_chip():
    ids = [number for row in catalog.archs() for number in row.device_ids]
    assert len(ids) == len(set(ids)) and all(0x1000 <= number <= 0xFFFF for number in ids)
    assert all(row.device_ids for row in catalog.archs())
    for line in re.findall(r"^device_ids = (\[.*?\])", (FOLDER / "archs.toml").read_text(), flags=re.M | re.S):
        assert re.fullmatch(r"\[(\s*0x[0-9a-f]{4},?)+\s*\]", line)


@every_arch()
def test_an_override_names_a_chip_that_wheels_are_built_for(row):
    for value in (row.override, *row.harmful_overrides):
        assert not value or re.fullmatch(r"\d+\.\d+\.\d+", value)
    assert row.override not in row.harmful_overrides and len(set(row.harmful_overrides)) == len(row.harmful_overrides)
    if row.override:
        major, minor, stepping = numbers(row.override)
        (target,) = (a for a in catalog.archs() if a.version == major * 10000 + minor * 100 + stepping)
        assert target.wheels_from and target.gfx != row.gfx and target.version // 10000 == row.version // 10000
        # It stands in for this chip where wheels lack it, so they had that one before, in its own right.
        assert not target.override and (not row.wheels_from or numbers(target.wheels_from) < numbers(row.wheels_from))
    else:
        assert not (row.override_max_torch or row.override_max_rocm or row.override_with)
    assert all(re.fullmatch(r"[A-Z_]+=\S+", setting) for setting in row.override_with)
    assert all(catalog.variable(setting.partition("=")[0]) for setting in row.override_with)
    assert row.override_note


@every_arch()
def test_words_of_an_arch_come_from_short_lists(row):
    assert row.generation in ("GCN4", "GCN5.0", "GCN5.1", "CDNA1", "CDNA2", "CDNA3", "CDNA4", "RDNA1", "RDNA2",
                              "RDNA3", "RDNA3.5", "RDNA4")  # fmt: skip
    assert row.native_index in ("ready", "builds", "no") and row.policy in ("bypass", "guarded")
    assert row.policy_note and row.products and row.support
    assert set(row.bypass_dtypes) <= {"float16", "bfloat16", "float32", "float64"}
    assert row.policy == "guarded" or not row.bypass_dtypes
    versions = (row.wheels_from, row.wheels_until, row.override_max_torch, row.override_max_rocm, row.min_kernel)
    assert all(re.fullmatch(r"\d+\.\d+(\.\d+)?", version) for version in versions if version)
    assert not row.wheels_until or numbers(row.wheels_from) <= numbers(row.wheels_until)


# https://releases.llvm.org/20.1.0/docs/AMDGPUUsage.html, table "AMDGPU Generic Processors".
GENERIC = {
    "gfx9-generic": "gfx900 gfx902 gfx904 gfx906 gfx909 gfx90c",
    "gfx9-4-generic": "gfx940 gfx941 gfx942 gfx950",
    "gfx10-1-generic": "gfx1010 gfx1011 gfx1012 gfx1013",
    "gfx10-3-generic": "gfx1030 gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036",
    "gfx11-generic": "gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153",
    "gfx12-generic": "gfx1200 gfx1201",
}
# Vega 12 was sold in Macs only; of the others no report with torch was found.
NOT_LISTED = {"gfx904", "gfx909", "gfx940", "gfx941"}


def test_generic_targets_are_llvms():
    found = {name: {row.gfx for row in catalog.archs() if row.generic == name} for name in GENERIC}
    assert found == {name: set(members.split()) - NOT_LISTED for name, members in GENERIC.items()}
    assert {row.gfx for row in catalog.archs() if not row.generic} == {"gfx803", "gfx908", "gfx90a"}


def test_which_chips_are_part_of_a_processor():
    # MI300A is one too, but shares its target with the cards.
    apus = "gfx902 gfx90c gfx1013 gfx1033 gfx1035 gfx1036 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153"
    assert {row.gfx for row in catalog.archs() if row.integrated} == set(apus.split())


def test_which_chips_bypass():
    # https://github.com/Comfy-Org/ComfyUI/pull/15615: float16 convolutions crash on gfx101x and gfx103x.
    assert {row.gfx for row in catalog.archs() if row.policy == "bypass"} == {f"gfx101{n}" for n in range(4)}
    assert {row.gfx: row.bypass_dtypes for row in catalog.archs() if row.bypass_dtypes} == {
        f"gfx103{n}": ("float16",) for n in range(7)
    }


UV = "https://github.com/astral-sh/uv/issues/14086"
UNSLOTH = "https://github.com/unslothai/unsloth/pull/9829"
MATRIX = "https://github.com/pytorch/pytorch/blob/main/RELEASE.md"
PREVIOUS = "https://pytorch.org/get-started/previous-versions/"
FLAGS = "ROCm/clr@01d09b6a:rocclr/utils/flags.hpp"
MIOPEN = "ROCm/MIOpen@27d6aa75:docs/how-to/debug-log.rst"
THEROCK = "ROCm/TheRock@0853618f:SUPPORTED_GPUS.md"
FACTS = [
    ("arch", "gfx1010", "device_ids", {0x731F, 0x7310, 0x7312, 0x731B}, TOPOLOGY),
    ("arch", "gfx1012", "device_ids", {0x7340, 0x7341, 0x7347}, TOPOLOGY),
    ("arch", "gfx1011", "device_ids", {0x7360, 0x7362}, TOPOLOGY),
    ("arch", "gfx1030", "device_ids", {0x73BF, 0x73AF, 0x73A3}, TOPOLOGY),
    ("arch", "gfx1031", "device_ids", {0x73DF}, TOPOLOGY),
    ("arch", "gfx1032", "device_ids", {0x73FF, 0x73EF}, TOPOLOGY),
    ("arch", "gfx1033", "device_ids", {0x163F}, TOPOLOGY),
    ("arch", "gfx1034", "device_ids", {0x743F, 0x7422}, TOPOLOGY),
    ("arch", "gfx1035", "device_ids", {0x1681}, TOPOLOGY),
    ("arch", "gfx900", "device_ids", {0x687F, 0x6860}, TOPOLOGY),
    ("arch", "gfx906", "device_ids", {0x66AF, 0x66A1}, TOPOLOGY),
    ("arch", "gfx902", "device_ids", {0x15DD, 0x15D8}, TOPOLOGY),
    ("arch", "gfx90c", "device_ids", {0x1636, 0x1638}, TOPOLOGY),
    ("arch", "gfx803", "device_ids", {0x67DF, 0x67EF, 0x7300}, TOPOLOGY),
    ("arch", "gfx1100", "device_ids", {0x744C, 0x7448}, "pciutils/pciids@006181e2:pci.ids"),
    ("arch", "gfx1103", "device_ids", {0x15BF, 0x1900}, "pciutils/pciids@006181e2:pci.ids"),
    ("arch", "gfx1151", "device_ids", {0x1586}, "pciutils/pciids@006181e2:pci.ids"),
    ("arch", "gfx1201", "device_ids", {0x7550, 0x7551}, "pciutils/pciids@006181e2:pci.ids"),
    ("arch", "gfx1010", "override", "10.3.0", "https://github.com/pytorch/pytorch/issues/106728"),
    ("arch", "gfx1010", "override_max_torch", "1.13.1", "https://github.com/pytorch/pytorch/issues/106728"),
    ("arch", "gfx1010", "wheels_from", "", BUILDER.format("1.13")),
    ("arch", "gfx1010", "native_index", "ready", THEROCK),
    ("arch", "gfx900", "native_index", "builds", THEROCK),
    ("arch", "gfx90c", "native_index", "no", THEROCK),
    ("arch", "gfx803", "wheels_from", "", BUILDER.format("1.13")),
    ("arch", "gfx902", "override_with", ("HSA_ENABLE_SDMA=0",),
     "https://github.com/HardAndHeavy/comfyui-rocm-docker/issues/3"),
    ("arch", "gfx1031", "override", "10.3.0", "https://github.com/ROCm/ROCm/issues/2353"),
    ("arch", "gfx1100", "wheels_from", "2.1", BUILDER.format("2.1")),
    ("arch", "gfx942", "wheels_from", "2.4", BUILDER.format("2.4")),
    ("arch", "gfx1101", "wheels_from", "2.6", "https://github.com/pytorch/pytorch/pull/141667"),
    ("arch", "gfx1102", "wheels_from", "2.7", UV),
    ("arch", "gfx1201", "wheels_from", "2.7", UV),
    ("arch", "gfx1151", "wheels_from", "2.10", UNSLOTH),
    ("arch", "gfx1103", "wheels_from", "2.13", "https://github.com/pytorch/pytorch/pull/179653"),
    ("arch", "gfx1103", "harmful_overrides", {"11.0.0"}, "https://github.com/ROCm/TheRock/issues/1184"),
    ("arch", "gfx1201", "harmful_overrides", {"10.3.0", "11.0.0"}, "https://github.com/jamiepine/voicebox/issues/469"),
    ("arch", "gfx1151", "min_kernel", "6.18.4", "ROCm/TheRock@89553ce3:docs/faq.md"),
    ("variable", "HSA_OVERRIDE_GFX_VERSION_1", "since_rocm", "6.3",
     "https://github.com/ROCm/ROCT-Thunk-Interface/commit/cf4935353e33"),
    ("variable", "HSA_USE_SVM", "since_rocm", "6.1", "https://github.com/ROCm/ROCT-Thunk-Interface/commit/7eaddcb"),
    ("variable", "GPU_MAX_HW_QUEUES", "default", "4", FLAGS),
    ("variable", "MIOPEN_FIND_MODE", "default", "DYNAMIC_HYBRID", "ROCm/MIOpen@2d1fd997:src/find_controls.cpp"),
    ("release", "1.12", "python", ("3.7", "3.10"), MATRIX),
    ("release", "1.13", "rocm", ("5.1.1", "5.2"), PREVIOUS),
    ("release", "1.13", "archs", ("gfx900", "gfx906", "gfx908", "gfx90a", "gfx1030"), BUILDER.format("1.13")),
    ("release", "2.2", "numpy", "<2", "https://github.com/pytorch/pytorch/issues/132179"),
    ("release", "2.3", "numpy", "", "https://github.com/pytorch/pytorch/issues/132179"),
    ("release", "2.4", "rocm", ("6.0", "6.1"), PREVIOUS),
    ("release", "2.5", "archs", {"gfx900", "gfx906", "gfx908", "gfx90a", "gfx1030", "gfx1100", "gfx942"}, UV),
    ("release", "2.6", "python", ("3.9", "3.13"), MATRIX),
    ("release", "2.7", "archs", {"gfx942", "gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201"}, UV),
    ("release", "2.9", "python", ("3.10", "3.14"), MATRIX),
    ("release", "2.10", "rocm", ("7.0", "7.1"), PREVIOUS),
]  # fmt: skip


@pytest.mark.parametrize(("table", "name", "field", "expected", "source"), FACTS)
def test_facts_are_as_their_sources_say(table, name, field, expected, source):
    rows = {"arch": ARCHS, "release": {row.torch: row for row in catalog.releases()}}
    row = catalog.variable(name) if table == "variable" else rows[table][name]
    found = getattr(row, field)
    # A set: the source names these among others.
    assert expected <= set(found) if isinstance(expected, set) else found == expected, source


# variables.toml

ANY = None
VALUES = [
    # name, value, whether it is understood, whether it changes nothing
    ("HSA_OVERRIDE_GFX_VERSION", "10.3.0", True, False),
    ("HSA_OVERRIDE_GFX_VERSION", "9.0.12", True, False),
    ("HSA_OVERRIDE_GFX_VERSION", "63.255.255", True, False),
    ("HSA_OVERRIDE_GFX_VERSION", "64.0.0", False, ANY),
    ("HSA_OVERRIDE_GFX_VERSION", "10.3.256", False, ANY),
    ("HSA_OVERRIDE_GFX_VERSION", "9.0.c", False, ANY),
    ("HSA_OVERRIDE_GFX_VERSION", "10.3", False, ANY),
    ("HSA_OVERRIDE_GFX_VERSION", "gfx1030", False, ANY),
    ("HSA_OVERRIDE_GFX_VERSION", "", False, ANY),
    ("HSA_OVERRIDE_GFX_VERSION_2", "11.0.0", True, False),
    ("HSA_USE_SVM", "0", True, False),
    ("HSA_USE_SVM", "1", True, True),
    ("HSA_XNACK", "0", True, False),
    ("HSA_XNACK", "on", False, ANY),
    ("HSA_ENABLE_SDMA", "0", True, False),
    ("HSA_ENABLE_SDMA", "false", False, ANY),
    ("HSA_ENABLE_INTERRUPT", "0", True, False),
    ("HSA_ENABLE_INTERRUPT", "1", True, True),
    ("AMD_SERIALIZE_KERNEL", "3", True, False),
    ("AMD_SERIALIZE_KERNEL", "4", False, ANY),
    ("AMD_LOG_LEVEL", "7", True, False),
    ("GPU_MAX_HW_QUEUES", "4", True, True),
    ("GPU_MAX_HW_QUEUES", "1", True, False),
    ("MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "1", True, True),
    ("MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "0", True, False),
    ("MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "disable", True, False),
    ("MIOPEN_DEBUG_CONV_DIRECT", "Enabled", True, True),
    ("MIOPEN_DEBUG_CONV_DIRECT", "2", False, ANY),
    ("MIOPEN_DEBUG_CONV_WINOGRAD", "off", True, False),
    ("MIOPEN_FIND_MODE", "NORMAL", True, False),
    ("MIOPEN_FIND_MODE", "normal", True, False),
    ("MIOPEN_FIND_MODE", "2", True, False),
    ("MIOPEN_FIND_MODE", "5", True, True),
    ("MIOPEN_FIND_MODE", "QUICK", False, ANY),
    ("MIOPEN_FIND_ENFORCE", "SEARCH_DB_UPDATE", True, False),
    ("MIOPEN_FIND_ENFORCE", "NONE", True, True),
    ("MIOPEN_FIND_ENFORCE", "6", False, ANY),
    ("MIOPEN_LOG_LEVEL", "7", True, False),
    ("MIOPEN_LOG_LEVEL", "8", False, ANY),
    ("MIOPEN_CHECK_NUMERICS", "0x05", True, False),
    ("MIOPEN_CHECK_NUMERICS", "yes", False, ANY),
    ("TORCH_BLAS_PREFER_HIPBLASLT", "0", True, False),
    ("TORCH_BLAS_PREFER_HIPBLASLT", "no", False, ANY),
    ("MIOPEN_USER_DB_PATH", "/var/tmp/db", True, False),
]


@pytest.mark.parametrize(("name", "value", "understood", "inert"), VALUES)
def test_values_that_are_understood_and_that_change_nothing(name, value, understood, inert):
    row = catalog.variable(name)
    assert (not row.legal or re.fullmatch(row.legal, value) is not None) is understood
    if inert is not ANY:
        assert bool(row.inert and re.fullmatch(row.inert, value)) is inert


@pytest.mark.parametrize("row", catalog.variables(), ids=lambda row: row.name)
def test_a_variables_row(row):
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+(_<N>)?", row.name) and row.component and row.meaning and row.default
    for expression in (row.legal, row.inert):
        re.compile(expression)
    if re.fullmatch(r"\d+", row.default) and row.legal:
        assert re.fullmatch(row.legal, row.default) and re.fullmatch(row.inert, row.default)
    # What is inert is understood as well.
    for value in ("0", "1", "4", "5", "on", "off", "NONE", "DYNAMIC_HYBRID", "false", "true"):
        if row.legal and row.inert and re.fullmatch(row.inert, value):
            assert re.fullmatch(row.legal, value)
    for version in (row.since_rocm, row.since_torch):
        assert not version or re.fullmatch(r"\d+\.\d+", version)


def test_what_should_not_be_left_set():
    slow = {"AMD_SERIALIZE_KERNEL", "AMD_SERIALIZE_COPY", "HIP_LAUNCH_BLOCKING", "AMD_LOG_LEVEL", "HSA_DISABLE_CACHE",
            "MIOPEN_ENABLE_LOGGING", "MIOPEN_ENABLE_LOGGING_CMD", "MIOPEN_DISABLE_CACHE", "MIOPEN_CHECK_NUMERICS",
            "ROCBLAS_LAYER"}  # fmt: skip
    kept = {"HSA_OVERRIDE_GFX_VERSION", "HIP_VISIBLE_DEVICES", "HSA_ENABLE_SDMA", "MIOPEN_FIND_MODE",
            "MIOPEN_DEBUG_CONV_IMPLICIT_GEMM", "MIOPEN_DEBUG_CONV_WINOGRAD", "MIOPEN_LOG_LEVEL",
            "PYTORCH_CUDA_ALLOC_CONF", "HSA_USE_SVM", "HSA_XNACK"}  # fmt: skip
    assert all(catalog.variable(name).debugging for name in slow)
    assert not any(catalog.variable(name).debugging for name in kept)


def test_the_documents_four_variables_say_what_they_do():
    gemm = catalog.variable("MIOPEN_DEBUG_CONV_IMPLICIT_GEMM")
    assert "default and changes nothing" in gemm.meaning
    assert "before 6.1" in catalog.variable("HSA_USE_SVM").meaning
    assert "pretend" in catalog.variable("HSA_OVERRIDE_GFX_VERSION").meaning
    assert "page faults" in catalog.variable("HSA_XNACK").meaning


def test_a_number_at_the_end_finds_the_numbered_row():
    assert catalog.variable("HSA_OVERRIDE_GFX_VERSION_3").name == "HSA_OVERRIDE_GFX_VERSION_<N>"
    assert catalog.variable("HSA_OVERRIDE_GFX_VERSION").name == "HSA_OVERRIDE_GFX_VERSION"
    assert catalog.variable("HSA_OVERRIDE_GFX_VERSION_X") is None and catalog.variable("PATH") is None


# releases.toml


def test_releases_are_oldest_first_without_a_gap():
    found = [numbers(row.torch) for row in catalog.releases()]
    assert found == sorted(found)
    assert {(1, 12), (1, 13)} | {(2, minor) for minor in range(14)} <= set(found)


@pytest.mark.parametrize("row", catalog.releases(), ids=lambda row: row.torch)
def test_a_releases_row(row):
    assert re.fullmatch(r"\d+\.\d+", row.torch) and row.rocm and row.archs
    assert [numbers(version) for version in row.rocm] == sorted(numbers(version) for version in row.rocm)
    first, last = row.python
    assert numbers(first) < numbers(last) and row.numpy == ("<2" if numbers(row.torch) < (2, 3) else "")
    # archs.toml and releases.toml say the same of each chip.
    # A wheels_from of 1.13, the first release that matters here, means 1.13 or earlier.
    torch = max(numbers(row.torch), (1, 13))
    carried = {
        chip.gfx
        for chip in catalog.archs()
        if chip.wheels_from
        and numbers(chip.wheels_from) <= torch <= (numbers(chip.wheels_until) if chip.wheels_until else torch)
    }
    assert set(row.archs) == carried and len(set(row.archs)) == len(row.archs)


def test_the_original_documents_row_is_there():
    (row,) = (row for row in catalog.releases() if row.torch == "1.13")
    for said in ("ROCm 5.2.0", "1.13.1+rocm5.2", "Python 3.10", "NumPy below 2", "gfx1010", "=10.3.0"):
        assert said in row.note
    assert "docs/PATCHES_V1.1_SUMMARY.md" in row.sources


# issues.toml: tests/test_logs.py has its symptoms.


@pytest.mark.parametrize("row", catalog.issues(), ids=lambda row: row.id)
def test_an_issues_row(row):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.id) and row.archs and row.cause and row.workaround
    assert row.archs == ("*",) or set(row.archs) <= set(ARCHS)
    for name in re.findall(r"\b([A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+)=", row.fix):
        assert catalog.variable(name) or name.startswith("ROCM_PATCH_"), f"the fix sets {name}, which is in no row"

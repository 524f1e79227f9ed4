"""Known failures in logs. The excerpts are real, without names of users and hosts; each says where it is from."""

import gzip
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, clean_environ
from rocm_patch.errors import UsageError
from rocm_patch.machine import catalog
from rocm_patch.tools.logs import LONGEST_LINE, match, read_log

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOGS = ROOT / "tests" / "logs"
KNOWN = sorted((LOGS / "known").glob("*.txt"))
UNRELATED = sorted((LOGS / "unrelated").glob("*.txt"))
SAMPLES = tomllib.loads((LOGS / "samples.toml").read_text(encoding="utf-8"))["sample"]
ISSUES = catalog.issues()
SYMPTOMS = sorted({symptom for issue in ISSUES for symptom in issue.symptoms})
EVERY_CHIP = {chip for issue in ISSUES for chip in issue.archs} - {"*"}
FAULT = "Memory access fault by GPU node-1 (Agent handle: 0x1) on address 0x2. Reason: Page not present."


def excerpt(path: Path) -> tuple[str, list[str]]:
    """An excerpt's text, and the chip of the machine it is from where it does not say so itself."""
    head, _, text = path.read_text(encoding="utf-8").partition("\n---\n")
    source, *machine = head.splitlines()
    assert source.startswith("source: ") and text
    return text, [line.removeprefix("machine: ") for line in machine]


def ids(text, gfx=()):
    return [found.issue.id for found in match(text, gfx)]


def stripped_of(symptom: str, *what: str) -> str:
    """A regular expression without escaped characters and classes, so that what is left has its special meaning."""
    symptom = re.sub(r"\\.", "x", symptom)
    symptom = re.sub(r"\[\^?\]?[^\]]*\]", "x", symptom)
    if "groups" in what:
        while "(" in symptom:
            symptom = re.sub(r"\([^()]*\)", "x", symptom)
    return symptom


# --- the excerpts ---


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.stem)
def test_a_known_failure_is_the_first_match(path):
    text, machine = excerpt(path)
    assert ids(text, machine)[:1] == [path.name.partition(".")[0]]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["text"].strip()[:50])
def test_a_sample_is_the_first_match(sample):
    assert sample["source"]
    assert ids(sample["text"], [sample["machine"]] if "machine" in sample else [])[:1] == [sample["first"]]


@pytest.mark.parametrize("path", UNRELATED, ids=lambda path: path.stem)
def test_an_unrelated_log_matches_nothing(path):
    text, _ = excerpt(path)
    assert ids(text) == []
    assert ids(text, EVERY_CHIP) == []


def test_there_are_enough_excerpts():
    assert len(KNOWN) >= 36 and len(UNRELATED) >= 36


def test_every_failure_with_symptoms_is_shown_first_somewhere():
    shown = {path.name.partition(".")[0] for path in KNOWN} | {sample["first"] for sample in SAMPLES}
    assert shown == {issue.id for issue in ISSUES if issue.symptoms}


def test_excerpts_name_no_person():
    for path in KNOWN + UNRELATED:
        text = path.read_text(encoding="utf-8")
        homes = set(re.findall(r"(?:/home/|\\Users\\)([\w.-]+)", text))
        assert homes <= {"user", "redacted", "runner", "pytorch", "vision", "xformers"}, path
        assert set(re.findall(r"[\w.]+@[\w-]+\.\w+", text)) == set(), path
        assert set(re.findall(r"\b([\w.]+)@[\w-]+", text)) <= {"user", "root", "builder"}, path


# --- the catalog ---


def test_ids_are_unique_and_rows_complete():
    assert len({issue.id for issue in ISSUES}) == len(ISSUES) >= 55
    for issue in ISSUES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", issue.id)
        assert issue.title and len(issue.title) < 100 and not issue.title.endswith(".")
        assert issue.archs and issue.versions and issue.cause and issue.workaround and issue.sources
        assert issue.archs == ("*",) or all(re.fullmatch(r"gfx[0-9a-f]{3,4}", chip) for chip in issue.archs)
        assert len(set(issue.symptoms)) == len(issue.symptoms)


def test_failures_of_chips_stand_before_those_of_any():
    general = ["*" in issue.archs for issue in ISSUES]
    assert general == sorted(general)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_no_symptom_is_dead(symptom):
    texts = [excerpt(path)[0] for path in KNOWN] + [sample["text"] for sample in SAMPLES]
    assert any(re.search(symptom, text) for text in texts)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_is_searched_in_linear_time(symptom):
    assert re.match(r"(?:[^\\.\[\](){}*+?|^$]|\\\W){3}(?![*+?{])", symptom), "starts with three plain characters"
    assert not re.search(r"[*+]|\{\d*,\}", stripped_of(symptom)), "repeats without a limit"
    assert "|" not in stripped_of(symptom, "groups"), "write two symptoms"
    # The worst case: what the symptom starts with, over and over, and no line ends. Linear takes milliseconds.
    start = re.match(r"(?:[^\\.\[\](){}*+?|^$]|\\\W)+(?![*+?{])", symptom)
    plain = re.sub(r"\\(\W)", r"\1", start.group())
    text = plain * (600_000 // len(plain))
    began = time.perf_counter()
    re.search(symptom, text)
    assert time.perf_counter() - began < 2


# --- which chips a log is about ---


def test_a_failure_of_one_chip_needs_that_chip():
    assert ids(FAULT) == ["memory-access-fault"]
    assert ids(FAULT, ["gfx1010"]) == ["gfx101x-runs-gfx1030-code", "memory-access-fault"]
    assert ids(f"{FAULT}\ngfx1010", []) == ["gfx101x-runs-gfx1030-code", "memory-access-fault"]
    assert ids(f"{FAULT}\nName: gfx1010:xnack-", []) == ["gfx101x-runs-gfx1030-code", "memory-access-fault"]


def test_what_a_log_names_beats_the_machine():
    assert ids(f"{FAULT}\nAMD arch: gfx1151", ["gfx1010"]) == ["gfx1151-override-fault", "memory-access-fault"]


def test_the_chip_that_an_override_pretends_does_not_hide_the_real_one():
    first = ["gfx101x-runs-gfx1030-code", "memory-access-fault"]
    # The card passes for gfx1030, which is all that its log shows; the machine knows better.
    assert ids(f"HSA_OVERRIDE_GFX_VERSION=10.3.0\nRaw device name: gfx1030\n{FAULT}", ["gfx1012"]) == first
    assert ids(f"export HSA_OVERRIDE_GFX_VERSION_1='10.3.0'\ngfx1030\n{FAULT}", ["gfx1013"]) == first
    # The override is in .bashrc and not in the log, and it is the one that is used with this chip.
    assert ids(f"Raw device name: gfx1030\n{FAULT}", ["gfx1010"]) == first
    # Somebody else's log: no override makes a gfx1010 pass for gfx1100.
    assert ids(f"Raw device name: gfx1100\n{FAULT}", ["gfx1010"]) == ["memory-access-fault"]
    # Both are named, so the real one is known, and it is not this machine's.
    log = f"HSA_OVERRIDE_GFX_VERSION=10.3.0 gfx1031 as gfx1030\n{FAULT}"
    assert ids(log, ["gfx1010"]) == ["memory-access-fault"]


@pytest.mark.parametrize(
    "line",
    [
        "['gfx900', 'gfx906', 'gfx908', 'gfx90a', 'gfx1010', 'gfx1100']",  # torch.cuda.get_arch_list()
        "PYTORCH_ROCM_ARCH=gfx900;gfx1010;gfx1030",
        "/rocblas/library/TensileLibrary_lazy_gfx1010.dat",
        "Missing: gfx1010_18.kdb.gz",
        "amd-torch-device-gfx1010==2.12.0+rocm7.14.0",
        "GFX VER gfx10100, gfx10, gfx10-1-generic",
    ],
)
def test_lists_and_file_names_do_not_name_the_chip(line):
    assert ids(f"{line}\n{FAULT}") == ["memory-access-fault"]
    assert ids(f"{line}\n{FAULT}\nDevice: gfx1100") == ["memory-access-fault"]
    assert ids(f"{line}\n{FAULT}", ["gfx1151"]) == ["gfx1151-override-fault", "memory-access-fault"]


# --- what is returned ---


def test_each_failure_once_with_its_first_line():
    text = f"start\n\n   {FAULT}  \n{FAULT}\nRuntimeError: miopenStatusUnknownError\n"
    unknown, fault = match(text)
    assert (unknown.issue.id, unknown.line_number, unknown.line) == (
        "miopen-unknown-error", 5, "RuntimeError: miopenStatusUnknownError",
    )  # fmt: skip
    assert (fault.issue.id, fault.line_number, fault.line) == ("memory-access-fault", 3, FAULT)


def test_particular_failures_come_first_then_the_order_of_the_catalog():
    text = "\n".join(sample["text"] for sample in SAMPLES) + "".join(excerpt(path)[0] for path in KNOWN)
    found = [found.issue for found in match(text)]
    order = [issue for issue in ISSUES if issue in found]
    assert found == order and len(found) > 80


def test_the_first_line_counts_whichever_symptom_it_has():
    (found,) = match("received 0 items of ancdata\n" * 2)
    assert found.line_number == 1
    (found,) = match("OSError: [Errno 24] Too many open files\nRuntimeError: received 0 items of ancdata\n")
    assert (found.issue.id, found.line_number) == ("too-many-open-files", 1)


def test_a_long_line_is_cut_to_the_part_with_the_symptom():
    (found,) = match("x" * 5000 + FAULT + "y" * 5000)
    assert len(found.line) <= LONGEST_LINE and "Memory access fault by GPU node-1" in found.line
    assert found.line_number == 1


def test_an_empty_log_matches_nothing():
    assert match("") == [] and match("\n\n", EVERY_CHIP) == []


# --- reading ---


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_colours_and_progress_bars_are_taken_out(tmp_path):
    log = (
        "\x1b[31mhsa api call failure\x1b[0m at: rocminfo.cc\r\n"
        "\x1b]8;;https://amd.com\x07link\x1b]8;;\x1b\\\n"
        "\r  0%|          | 0/20 [00:00<?, ?it/s]\r  5%|▌         | 1/20 [00:01<00:19,  1.01s/it]"
        "\rHW Exception by GPU node-1\r 10%|█         | 2/20 [00:02<00:18,  1.00s/it]\n"
        "end\r\n"
    )
    assert read_log(written(tmp_path / "a.log", log.encode())).split("\n") == [
        "hsa api call failure at: rocminfo.cc",
        "link",
        "HW Exception by GPU node-1  10%|█         | 2/20 [00:02<00:18,  1.00s/it]",
        "end",
        "",
    ]


def test_bytes_that_are_no_text_do_not_hurt(tmp_path):
    path = written(tmp_path / "a.log", b"\xff\xfe\xfa" * 3 + b"\n\x00\x80 " + FAULT.encode() + b"\n\xc3")
    assert ids(read_log(path))[:1] in ([], ["memory-access-fault"])  # the first bytes look like UTF-16's mark
    path = written(tmp_path / "b.log", b"\xfa\x80\n\x00 " + FAULT.encode() + b"\n\xc3")
    assert ids(read_log(path)) == ["memory-access-fault"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(tmp_path, encoding):
    path = written(tmp_path / "a.log", f"Gerät: Radeon\n{FAULT}\n".encode(encoding))
    text = read_log(path)
    assert re.fullmatch(r"Ger.t: Radeon\n" + re.escape(FAULT) + "\n", text)
    assert [(found.line_number, found.line) for found in match(text)] == [(2, FAULT)]


def test_gzip_is_unpacked_whatever_its_name(tmp_path):
    whole = gzip.compress(b"first\n") + gzip.compress(FAULT.encode())  # as logrotate and cat leave them
    assert read_log(written(tmp_path / "dmesg.1.gz", whole)) == f"first\n{FAULT}"
    assert read_log(written(tmp_path / "log", whole)) == f"first\n{FAULT}"
    assert read_log(written(tmp_path / "plain.gz", b"plain")) == "plain"


def test_gzip_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path, caplog):
    lines = "".join(f"{number} {number**3}\n" for number in range(200_000))
    packed = gzip.compress(f"{FAULT}\n{lines}".encode())
    text = read_log(written(tmp_path / "a.gz", packed[: len(packed) // 2]))
    assert ids(text) == ["memory-access-fault"] and 100_000 < len(text) < len(lines)
    assert "the gzip data breaks off" in caplog.text
    text = read_log(written(tmp_path / "b.gz", b"\x1f\x8b" + FAULT.encode()))  # only its first bytes are gzip's
    assert ids(text) == ["memory-access-fault"]


@pytest.mark.parametrize("name", [None, "-"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input(name, pack):
    code = f"import sys; from rocm_patch.tools.logs import *; t = read_log({name and f'Path({name!r})'})"
    code += "; print(len(t)); print(*[found.issue.id for found in match(t)])"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pack(b"\xff\n" + FAULT.encode()), env=clean_environ(),
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.decode().split() == [str(len(FAULT) + 2), "memory-access-fault"]


def test_a_missing_file_or_a_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"missing\.log cannot be read: No such file") as error:
        read_log(tmp_path / "missing.log")
    assert "rocm-patch doctor" in error.value.hint
    with pytest.raises(UsageError, match="is a folder") as error:
        read_log(tmp_path)
    assert error.value.hint == f"name a file in it: ls {tmp_path}"
    with pytest.raises(UsageError, match="cannot be read"):
        read_log(Path("a\0b"))
    with pytest.raises(UsageError, match="cannot be read: Not a directory"):
        read_log(written(tmp_path / "file", b"") / "below")


def test_a_file_that_may_not_be_read_is_a_usage_error(tmp_path):
    path = written(tmp_path / "kern.log", b"secret")
    path.chmod(0)
    tmp_path.chmod(0o755)
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        with pytest.raises(UsageError, match="may not be read") as error:
            read_log(path)
    finally:
        os.seteuid(user)
    assert error.value.hint == f"sudo cat {path} | rocm-patch doctor -"


# --- whatever it holds ---

FRAGMENTS = st.sampled_from(
    [
        FAULT,
        "gfx1010",
        "gfx",
        "HSA_OVERRIDE_GFX_VERSION=",
        "10.3.0",
        "999.999.999",
        "\r",
        "\n",
        "\x1b[",
        "\x1b]",
        "5%|",
        "|",
    ]
    + [sample["text"] for sample in SAMPLES]
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(FRAGMENTS | st.text(max_size=20), max_size=12).map("".join), st.sets(st.sampled_from(sorted(EVERY_CHIP)))
)
def test_any_text_can_be_matched(text, gfx):
    lines = text.count("\n") + 1
    for found in match(text, gfx):
        assert 1 <= found.line_number <= lines and len(found.line) <= LONGEST_LINE
        assert any(re.search(symptom, text) for symptom in found.issue.symptoms)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("logs") / "any.log"


@settings(deadline=None, max_examples=150)
@given(
    st.binary(max_size=400)
    | st.lists(FRAGMENTS.map(str.encode) | st.binary(max_size=20), max_size=8).map(b"".join)
    | st.binary(max_size=200)
    .map(gzip.compress)
    .flatmap(lambda packed: st.integers(2, len(packed)).map(lambda n: packed[:n]))
)
def test_any_bytes_can_be_read_and_matched(scratch, content):
    text = read_log(written(scratch, content))
    assert isinstance(text, str)
    match(text)


@pytest.mark.parametrize("end", ["\n", " ", "\r"], ids=["lines", "one line", "progress"])
def test_a_big_log_takes_linear_time(tmp_path, end):
    # 8 MB that nearly match nearly everything. Anything quadratic would take hours.
    almost = [symptom[: len(symptom) // 2].replace("\\", "") for symptom in SYMPTOMS]
    block = end.join(["gfx1030", "\x1b[31m", "\x1b]", "7%|##|", *almost]) + end
    text = block * (8_000_000 // len(block)) + f"\n{FAULT}\n"
    path = written(tmp_path / "big.log", text.encode())
    began = time.perf_counter()
    found = ids(read_log(path), ["gfx1010"])
    assert time.perf_counter() - began < 60
    assert "memory-access-fault" in found

"""`rocm-patch report`: what it leaves out, what it says, its page in a browser, and the form that it goes with."""

import itertools
import json
import os
import re
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.provisional import domains

from conftest import MACHINES, ROOT, python
from rocm_patch import __version__
from rocm_patch.errors import UsageError
from rocm_patch.machine import catalog
from rocm_patch.settings import Settings
from rocm_patch.tools import privacy, report
from rocm_patch.tools.privacy import Private, private_facts, scrubbed

ALICE = Private(
    names=("alice", "al", "max", "torch", "amd", "root", "will"),
    hosts=("alice-desktop.fritz.box", "alice-desktop", "zeus"),
    homes=("/data/homes/a.liddell", "/home/alice"),
)
SECTIONS = ("summary", "findings", "machine", "torch", "environment", "verify", "verdicts", "bench")


# What is left out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # homes
        ("/home/alice/x.py and /home/bob/y", "~/x.py and /home/<user>/y"),
        ("'/home/alice'", "'~'"),
        ("/data/homes/a.liddell/.cache", "~/.cache"),
        ("/home/alice2/x /home/al", "/home/<user>/x /home/<user>"),
        ("/tmp/tree/home/alice/x", "/tmp/tree/home/<user>/x"),
        ("file:///home/alice/x", "file:///home/<user>/x"),
        (r"C:\Users\John Smith\x.py", r"C:\Users\<user>\x.py"),
        (r"C:\\Users\\John\\x.py", r"C:\\Users\\<user>\\x.py"),
        ("/mnt/c/Users/Bob/x, /Users/bob and then", "/mnt/c/Users/<user>/x, /Users/<user> and then"),
        ("/run/media/alice/disk", "/run/media/<user>/disk"),
        # names: whole words and parts of paths
        ("user alice is not in group render", "user <user> is not in group render"),
        ("Alice's machine, ALICE", "<user>'s machine, <user>"),
        ("malice alices alice2", "malice alices alice2"),
        ("/mnt/alice-data/alice_venv/lib", "/mnt/<user>-data/<user>_venv/lib"),
        ("alice@zeus:/srv", "<user>@<host>:/srv"),
        # short names, English words: only as a whole part of a path
        ("/srv/al/x also al", "/srv/<user>/x also al"),
        ("it will run /srv/will/x", "it will run /srv/<user>/x"),
        ("max_split_size_mb=5 max-autotune /srv/max/x", "max_split_size_mb=5 max-autotune /srv/<user>/x"),
        # words of the field: only as a home
        ("torch 2.13.0+cpu in site-packages/torch/lib", "torch 2.13.0+cpu in site-packages/torch/lib"),
        ("amdgpu, /opt/amd, AMD Radeon, /home/amd/x", "amdgpu, /opt/amd, AMD Radeon, /home/<user>/x"),
        ("root cause /root/x", "root cause /root/x"),
        # hosts
        ("alice-desktop.fritz.box, alice-desktop.local on ALICE-DESKTOP.", "<host>, <host> on <host>."),
        ("zeus.corp.example zeusian", "<host> zeusian"),
        # addresses
        ("alice.l+x@mail.example.co.uk wrote", "<email> wrote"),
        ("https://bob:secret@git.example/x", "https://<private>@git.example/x"),
        ("ROCm/MIOpen@rocm-5.2.0:src/include/x.hpp", "ROCm/MIOpen@rocm-5.2.0:src/include/x.hpp"),
        ("aa:bb:cc:dd:ee:ff AA-BB-CC-DD-EE-FF", "<mac> <mac>"),
        ("192.168.1.17 172.16.0.4 10.0.0.5 84.130.2.7", "<ip> <ip> <ip> <ip>"),
        ("http://10.0.0.5:29500/ 8.8.8.8:53 host 5.6.7.8", "http://<ip>:29500/ <ip>:53 host <ip>"),
        ("10.1.2.3:/export", "<ip>:/export"),
        ("fe80::1ff:fe23:4567:890a%eth0: timeout", "<ip>: timeout"),
        ("[2001:db8::8a2e:370:7334]:80 ::ffff:192.168.1.5", "[<ip>]:80 ::ffff:<ip>"),
        # no addresses
        ("5.2.0.1 rocm-5.2.0.1 v10.0.0.1 cudnn 9.1.0.70", "5.2.0.1 rocm-5.2.0.1 v10.0.0.1 cudnn 9.1.0.70"),
        ("ROCm 10.0.0.1, driver 32.0.12033.1030", "ROCm 10.0.0.1, driver 32.0.12033.1030"),
        ("HSA_OVERRIDE_GFX_VERSION=10.3.0.1 127.0.0.1 ::1", "HSA_OVERRIDE_GFX_VERSION=10.3.0.1 127.0.0.1 ::1"),
        ("0000:03:00.0 c10::Error at::native 12:34:56", "0000:03:00.0 c10::Error at::native 12:34:56"),
        ("2026-11-22T22:40:11+00:00", "2026-11-22T22:40:11+00:00"),
        # single devices
        ("GPU-DEADBEEFDEADBEEF 550e8400-e29b-41d4-a716-446655440000", "<id> <id>"),
        ("0123456789abcdef0123456789abcdef", "<id>"),
        ("1b1610fc1b1610fc1b1610fc1b1610fc1b1610fc", "1b1610fc1b1610fc1b1610fc1b1610fc1b1610fc"),
        ("serial number: 12345678, unique_id 12345678901234567890", "serial number: <id>, unique_id <id>"),
    ],
)  # fmt: skip
def test_what_is_replaced_and_what_stays(text, expected):
    assert scrubbed(text, ALICE) == expected
    assert scrubbed(expected, ALICE) == expected


def test_what_stands_beside_a_number_is_its_key_too():
    value = {"versions": {"miopen": "10.0.0.1"}, "rocm_version": "10.0.0.2", "server": "5.6.7.8", "note": "10.0.0.3"}
    assert scrubbed(value, ALICE) == {
        "versions": {"miopen": "10.0.0.1"}, "rocm_version": "10.0.0.2", "server": "<ip>", "note": "<ip>",
    }  # fmt: skip


def test_fields_of_single_devices_are_dropped_and_keys_are_scrubbed():
    gpu = {"unique_id": 12345678901234567890, "serial_number": "x", "uuid": "y", "gpu_uuid": 1, "node": 1}
    value = {"gpus": [gpu], "/home/alice/x": {"machine_id": "a", "alice": [True, None, 1.5]}}
    assert scrubbed(value, ALICE) == {"gpus": [{"node": 1}], "~/x": {"alice": [True, None, 1.5]}}


NAMES = st.from_regex(r"[a-z_][a-z0-9_-]{0,14}", fullmatch=True).filter(privacy._is_telling)
LETTERS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=5)


@given(name=NAMES, before=LETTERS, after=LETTERS)
def test_a_name_goes_from_paths_and_never_from_inside_a_word(name, before, after):
    private = Private(names=(name,), homes=(f"/home/{name}",))
    assert scrubbed(f"/home/{name}/00 '/srv/{name}/00'", private) == "~/00 '/srv/<user>/00'"
    assert scrubbed(f"/home/{name}", private) == "~"
    word = f"a {before}{name}{after} b"
    assert scrubbed(word, private) == word


@given(name=NAMES)
def test_a_longer_name_goes_wherever_it_is_a_word(name):
    assume(len(name) > 2 and name not in privacy._ENGLISH)
    for text in (f"user {name} is", f"({name})", f"{name}@zeus", f"User {name.upper()}.", f"NAME={name}"):
        assert scrubbed(text, Private(names=(name,))) == re.sub(re.escape(name), "<user>", text, flags=re.IGNORECASE)


def networks(*names):
    return st.one_of([st.ip_addresses(network=name) for name in names])


@given(address=networks("32.0.0.0/4", "64.0.0.0/3", "128.0.0.0/1", "10.0.0.0/8", "2000::/3", "fe80::/10", "fc00::/7"))
def test_addresses_go(address):
    assume(not address.is_loopback and int(address) >> 24 != 127)
    for text in (str(address), address.exploded, address.exploded.upper()):
        assert scrubbed(f"from {text} ({text})", ALICE) == "from <ip> (<ip>)"


@given(
    parts=st.tuples(st.integers(0, 31), *[st.integers(0, 255)] * 3),
    prefix=st.sampled_from(["", "v", "rocm-", "version ", "=="]),
)
def test_versions_stay(parts, prefix):
    assume(parts[0] != 10 or prefix)
    for count in (2, 3, 4):
        text = f"torch with {prefix}{'.'.join(map(str, parts[:count]))}, built"
        assert scrubbed(text, ALICE) == text


@given(numbers=st.tuples(st.integers(0, 0xFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7)))
def test_pci_addresses_stay(numbers):
    domain, bus, slot, function = numbers
    text = f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"
    for form in (text, f"amdgpu {text}: SMU", f"[{text}, {text}]", text.upper()):
        assert scrubbed(form, ALICE) == form


@given(octets=st.binary(min_size=6, max_size=6), mark=st.sampled_from(":-"))
def test_mac_addresses_go(octets, mark):
    assert scrubbed(f"eth0 {octets.hex(mark)} up", ALICE) == "eth0 <mac> up"


@given(local=st.from_regex(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,10}", fullmatch=True), domain=domains())
def test_email_addresses_go(local, domain):
    assert scrubbed(f"mail <{local}@{domain}> now", ALICE) == "mail <<email>> now"


PIECES = st.sampled_from(
    ["alice", "/home/alice", "/home/", "/Users/", "Bob Smith", "zeus", ".", ":", "::", "@", "/", "\\", " ", "-", "<",
     ">", "10.0.0.5", "192.168.1.1", "fe80::1", "aa:bb:cc:dd:ee:ff", "a@b.de", "serial ", "12345678", "~", "://"]
)  # fmt: skip


@given(pieces=st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=8))
def test_scrubbing_twice_changes_nothing_more(pieces):
    once = scrubbed("".join(pieces), ALICE)
    assert scrubbed(once, ALICE) == once


def test_what_this_machine_tells_of_its_owner(tmp_path):
    home = tmp_path / "homes" / "volunteer"
    home.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "homes")
    facts = private_facts({"USER": "CORP\\volunteer", "SUDO_USER": "eve", "HOME": f"{tmp_path}/link/volunteer/"})
    assert {"volunteer", "eve"} <= set(facts.names)
    assert {f"{tmp_path}/link/volunteer", f"{tmp_path}/homes/volunteer"} <= set(facts.homes)
    assert socket.gethostname() in facts.hosts
    assert scrubbed(f"{home}/x", facts) == "~/x"
    assert private_facts({}).names  # from the system's own list of users


def test_no_fact_of_the_catalog_looks_private():
    rows = [*catalog.archs(), *catalog.variables(), *catalog.releases(), *catalog.issues()]
    assert len(rows) > 50
    for row in map(report._plain, rows):
        assert scrubbed(row, ALICE) == row


# The document ---------------------------------------------------------------------------------------------------

BENCH = {
    "schema_version": 1,
    "device": "a GPU",
    "versions": {"torch": "2.13.0", "miopen": "10.0.0.1"},
    "rows": [
        {"name": f"layer{n}", "dtype": "float32", "native_ms": 1.0, "ours_ms": ratio, "gflop": 7.5}
        for n, ratio in enumerate((0.25, 1.0, 4.0))
    ],
}
BOXES = [
    {"box": "torch imports", "state": "ticked", "detail": "2.13.0", "seconds": 2.5},
    {"box": "workers", "state": "failed", "detail": "RuntimeError in /home/alice/train.py", "seconds": 0.5},
    {"box": "training", "state": "not run", "detail": "no GPU", "seconds": 0.0},
]


def alices(tmp_path, **more):
    home = tmp_path / "homes" / "alice"
    home.mkdir(parents=True, exist_ok=True)
    return {
        "HOME": str(home), "USER": "alice", "LOGNAME": "alice", "PATH": os.environ["PATH"],
        "ROCM_PATCH_CACHE_DIR": f"{home}/cache", "ROCM_PATCH_LOG": "info", "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
        "HIP_VISIBLE_DEVICES": "GPU-DEADBEEFDEADBEEF", "AWS_SECRET": "hunter2", "SSH_CLIENT": "192.168.1.7 1 22",
        **more,
    }  # fmt: skip


def test_the_document_of_a_card(tmp_path):
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(BENCH))
    asked = Settings(sysfs_root=str(MACHINES / "rx_5600_xt"))
    document = report.collect(asked, alices(tmp_path), boxes=BOXES, bench=bench)
    assert list(document) == [
        "schema_version", "kind", "made", "rocm_patch", "python", "machine", "torch", "activation", "plan",
        "environment", "findings", "verify", "verdicts", "bench",
    ]  # fmt: skip
    assert (document["schema_version"], document["kind"]) == (1, "rocm-patch report")
    assert document["rocm_patch"] == __version__ and document["made"].endswith("+00:00")
    assert [gpu["gfx"] for gpu in document["machine"]["gpus"]] == ["gfx1010"]
    assert document["machine"]["home"]["path"] == "~"
    assert document["torch"]["kind"] == "cpu" and document["torch"]["targets"] == []
    assert document["activation"]["policy"] == "native"  # a CPU build
    assert {change["name"] for change in document["plan"]["variables"]} >= {"HSA_XNACK"}
    assert all(change["why"] and change["source"] for change in document["plan"]["variables"])
    values = {row["name"]: row["value"] for row in document["environment"]}
    assert values.pop("ROCM_PATCH_CACHE_DIR") == "~/cache" and values.pop("HIP_VISIBLE_DEVICES") == "<id>"
    assert values == {"ROCM_PATCH_LOG": "info", "HSA_OVERRIDE_GFX_VERSION": "10.3.0"}
    assert {"check", "level", "summary", "why", "fix", "source"} <= set(document["findings"][0])
    assert document["verify"][1]["detail"] == "RuntimeError in /home/<user>/train.py"
    assert document["bench"] == BENCH and document["verdicts"] == []
    text = json.dumps(document, allow_nan=False)
    for private in ("alice", "hunter2", "192.168.1.7", "DEADBEEF", str(tmp_path / "homes")):
        assert private not in text
    page = report.render(json.loads(text))
    assert "alice" not in page and "gfx1010" in page and "0000:03:00.0" in page


def test_nothing_of_this_very_machine_is_in_its_report():
    document = json.dumps(report.collect(Settings()))
    private = [path.read_text().strip() for path in Path("/sys/class/net").glob("*/address")]
    private += [path.read_text().strip() for path in [Path("/etc/machine-id")] if path.exists()]
    private += [host for host in [socket.gethostname()] if privacy._is_telling(host)]
    for text in private:
        assert not text.strip("0:") or text not in document


@pytest.mark.parametrize("machine", sorted(path.name for path in MACHINES.iterdir() if path.is_dir()))
def test_every_machine_has_a_page(machine, tmp_path):
    document = report.collect(Settings(sysfs_root=str(MACHINES / machine)), alices(tmp_path))
    page = Page(report.render(document))
    assert page.ids >= set(SECTIONS)
    for gpu in document["machine"]["gpus"]:
        assert gpu["gfx"] in page.text and gpu["name"] in page.text


def test_a_word_of_ours_as_user_name_changes_no_word_of_ours():
    """The page sorts by these words, so a user named after one must not break it."""
    document = full_document()
    words = {
        "ok",
        "warning",
        "failure",
        "ticked",
        "failed",
        "not run",
        "bypass",
        "guarded",
        "native",
        "hip",
        "cpu",
        "cuda",
        document["kind"],
    }
    for word in set(" ".join(words).split()):
        after = scrubbed(document, Private(names=(word,), hosts=(word,)))
        assert [f["level"] for f in after["findings"]] == [f["level"] for f in document["findings"]]
        assert [b["state"] for b in after["verify"]] == [b["state"] for b in document["verify"]]
        assert after["activation"]["policy"] == "bypass" and after["kind"] == document["kind"]


def test_text_that_is_none_can_be_written(tmp_path):
    odd = {"a\udcff": "b\udcff\x1b[31m\0", "c": [float("nan"), float("inf")], "d": {1, 2}, "e": Path("/x")}
    plain = report._plain(odd)
    assert plain == {"a\\udcff": "b\\udcff\\x1b[31m\\x00", "c": ["nan", "inf"], "d": [1, 2], "e": "/x"}
    report.write(tmp_path / "x.json", json.dumps(plain, allow_nan=False))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"), ("{", "not JSON"), ("[]", "no list of rows"), ('{"rows": {}}', "no list of rows"),
        ('{"rows": [1]}', "no list of rows"), ('{"rows": []}', "schema_version None"), ("[" * 100_000, "not JSON"),
        ('{"rows": [], "schema_version": 2}', "schema_version 2"), (b"\xff", "not JSON"),
    ],
)  # fmt: skip
def test_a_bad_bench_file(tmp_path, content, why):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=why) as caught:
        report.collect(Settings(), {}, bench=path)
    assert "rocm-patch bench --json" in caught.value.hint and "bench.json" in caught.value.message


# Writing --------------------------------------------------------------------------------------------------------


def test_writing_replaces_whole_files_only(tmp_path):
    path, link = tmp_path / "r.html", tmp_path / "link.html"
    path.write_text("before")
    link.symlink_to(path)
    report.write(link, "after \u00e9")
    assert path.read_text(encoding="utf-8") == "after \u00e9" and link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.html", "r.html"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path: "it is a folder", tmp_path / "none" / "r.html": "no such folder", Path("/dev/null"): "a device",
        tmp_path / "pipe": "a device or a pipe", tmp_path / "file" / "r.html": "no such folder",
        tmp_path / ("n" * 300): "name too long", tmp_path / "loop": "",
        Path("/sys/report.html"): "",  # read-only, for root too
    }  # fmt: skip
    for path, why in cases.items():
        with pytest.raises(UsageError, match=f"(?i)cannot write .*{re.escape(path.name)}.*{why}") as caught:
            report.write(path, "x")
        assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop", "pipe"]


# The page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page has, by its tags."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.links, self.text, self._hidden = set(), [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self._hidden = tag in ("style", "script")
        if "id" in attributes:
            assert attributes["id"] not in self.ids
            self.ids.add(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data


NASTY = "<script>alert(1)</script>\"><img src=http://x.example/y onerror='alert(2)'> & {{ 7*7 }} javascript:alert(3)"


def finding(level, summary, fix="", source="", why=""):
    return {"check": level + "_check", "level": level, "summary": summary, "why": why, "fix": fix, "source": source}


def full_document():
    """All that a page can show, in the most awkward form."""
    long = "x" * 300
    return {
        "schema_version": 1, "kind": "rocm-patch report", "made": "2026-11-22T22:40:11+00:00",
        "rocm_patch": __version__, "python": "3.11.7",
        "machine": {
            "gpus": [{"node": 1, "gfx": "gfx1010", "name": "Navi 10 [Radeon RX 5600 OEM/5600 XT / 5700/5700 XT]",
                      "device_id": 29471, "vram_bytes": 6 << 30, "pcie_atomics": None, "pci_address": "0000:03:00.0",
                      "of_the_future": {"deep": {"deeper": [1, {"deepest": True}]}, "long": long}}],
            "unlisted": [{"address": "0000:04:00.0", "driver": ""}], "kfd": True, "new_fact": ["a", NASTY],
            "home": {"path": "~", "free_bytes": -1},
        },
        "torch": {"python": f"~/{long}", "version": "1.13.1+rocm5.2", "kind": "hip", "cuda": None,
                  "targets": [f"gfx{n}" for n in range(900, 930)]},
        "activation": {"backend": "hip", "policy": "bypass", "strategy": None, "why": "RDNA1",
                       "bypass_dtypes": ["float16"]},
        "plan": {"variables": [{"name": "HSA_XNACK", "value": "0", "why": "w", "source": "https://example.org/a.b",
                                "found": found} for found in (None, "0", "1")],
                 "notices": ["plain words", {**finding("warning", "s", "f"), "name": "n"}]},
        "environment": [{"name": "HSA_XNACK", "value": long, "component": "ROCr"}],
        "findings": [
            finding("ok", "FINE-1"), finding("warning", "WARN-1", "mend the warning"), finding("ok", "FINE-2"),
            finding("failure", "FAIL-0 without a cure"),
            finding("failure", f"FAIL-1 {NASTY}", f"mend {long}",
                    "ROCm/x@rocm-5.2.0:y; https://example.org/issues/1.", NASTY),
            finding("strange", "STRANGE-1"),
        ],
        "verify": [*BOXES, {"box": "box " * 30, "state": "done", "detail": NASTY + long, "seconds": 99, "new": 1}],
        "verdicts": [],
        "bench": {**BENCH, "rows": [
            *BENCH["rows"],
            {"layer": "a/very/" + "long/" * 30, "native_ms": 2, "ours_ms": 90.0, "other_ms": 0.1, "note": NASTY},
        ]},
    }  # fmt: skip


def test_the_page_says_first_what_matters():
    text = report.render(full_document())
    page = Page(text)
    assert page.ids >= set(SECTIONS)
    assert "2 failures and 2 warnings among 6 findings." in page.text
    summary = text[text.index('id="summary"') : text.index('id="findings"')]
    assert "FAIL-1" in summary and "mend xxx" in summary  # the first failure that has a cure
    order = [page.text.rindex(mark) for mark in ("FAIL-0", "FAIL-1", "WARN-1", "STRANGE-1", "FINE-1", "FINE-2")]
    assert order == sorted(order)
    assert text.index("<details>") < text.index("FINE-1")
    for words in ("Of the future", "Deepest", "New fact", "6.0 GiB", "0x731f", "30 entries", "New: 1", "not stated"):
        assert words in page.text, words
    for words in ("would be set", "is set already", "yours, 1, stays", "None recorded", "bypass on hip: RDNA1"):
        assert words in page.text, words
    assert page.text.count("not yet run on AMD hardware") == 1
    assert f"Made by rocm-patch {__version__} (schema 1). rocm-patch itself was not yet run on AMD" in page.text


def test_the_page_is_one_file_and_everything_in_it_is_escaped():
    text = report.render(full_document())
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "use", "image"}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "onerror", "onload", "onclick", "xlink:href", "background"} & set(attributes), (
            tag
        )
    assert "url(" not in text and "@import" not in text
    assert all(link.startswith("#") or re.fullmatch(r"https?://\S+", link) for link in page.links)
    assert "https://example.org/issues/1" in page.links and "https://example.org/a.b" in page.links
    assert {link[1:] for link in page.links if link.startswith("#")} == set(SECTIONS)
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text


def test_the_page_reads_without_eyes():
    page = Page(report.render(full_document()))
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 2 and sum(tag == "title" for tag, _ in page.tags) == 3
    named = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert named <= page.ids and all(attributes["role"] == "img" for attributes in pictures)


def test_nothing_wrong_and_nothing_run():
    quiet = {"made": "2026", "findings": [finding("ok", "fine")], "verify": None, "bench": None}
    text = Page(report.render(quiet)).text
    assert "No failures and no warnings among 1 finding." in text and "found nothing to mend" in text
    assert "What to do next" not in text and "Not run for this report" in text and "No measurements" in text
    failed = {**quiet, "verify": BOXES[1:2]}
    assert "1 box of verify failed" in Page(report.render(failed)).text


def test_bench_without_native_and_without_rows():
    rows = [{"name": "a", "ours_ms": 0.001}, {"name": "b", "ours_ms": 500.0}, {"name": "c", "note": "no time"}]
    page = Page(report.render({"bench": {"schema_version": 1, "device": "d", "rows": rows}}))
    assert "milliseconds, logarithmic" in page.text and "ours 500 ms" in page.text
    assert "no rows" in Page(report.render({"bench": {"schema_version": 1, "rows": []}})).text
    ratios = Page(report.render({"bench": BENCH})).text
    assert "ours 0.25 \u00d7" in ratios and "Geometric mean over the rows: ours 1 times native." in ratios
    assert "times native; dashed: native" in ratios


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(extra=JSON, name=st.text(max_size=10), seconds=JSON)
def test_whatever_a_later_version_adds_is_shown(extra, name, seconds):
    plain = report._plain({name: extra, "gpus": [{"gfx": "gfx1010", "extra": extra}]})
    bench = report._plain({"rows": [{"name": "a", "native_ms": seconds, name: extra}]})
    boxes = report._plain([{"box": "b", "state": "ticked", "seconds": seconds, "detail": ""}])
    Page(report.render({"machine": plain, "torch": plain, "verify": boxes, "verdicts": [plain], "bench": bench}))


@given(values=st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=5), reference=st.sampled_from([None, 1.0]))
def test_every_value_has_its_place_on_the_axis(values, reference):
    for is_linear in (False, True):
        axis = report._axis(values, reference, is_linear)
        places = [axis.place(value) for value in sorted(values)]
        assert places == sorted(places) and places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
        assert 2 <= len(axis.ticks) <= 8 and all(-1e-9 <= place <= 1 + 1e-9 for place, _ in axis.ticks)
        assert len({text for _, text in axis.ticks}) == len(axis.ticks)
        assert not (is_linear and axis.is_log)


def test_the_module_starts_without_torch_and_without_the_page_maker():
    code = "import sys, rocm_patch.tools.report; print(sorted({'torch', 'jinja2'} & set(sys.modules)))"
    assert python("-c", code).stdout == "[]\n"


# The form of the issue ------------------------------------------------------------------------------------------

# https://docs.github.com/en/communities/using-templates-to-encourage-useful-issues-and-pull-requests/
# syntax-for-issue-forms, syntax-for-githubs-form-schema, common-validation-errors-when-creating-issue-forms
TOP = {"name", "description", "body", "assignees", "labels", "title", "type", "projects"}
ATTRIBUTES = {  # type: (required, optional)
    "markdown": ({"value"}, set()),
    "textarea": ({"label"}, {"description", "placeholder", "value", "render"}),
    "input": ({"label"}, {"description", "placeholder", "value"}),
    "dropdown": ({"label", "options"}, {"description", "multiple", "default"}),
    "checkboxes": ({"label", "options"}, {"description"}),
}


def form(name):
    import yaml

    return yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def test_the_issue_form_is_one_that_github_takes():
    top = form("hardware_report.yml")
    assert {"name", "description", "body"} <= set(top) <= TOP
    assert all(is_text(top[key]) for key in ("name", "description", "title"))
    ids, labels = [], []
    for element in top["body"]:
        required, optional = ATTRIBUTES[element["type"]]
        attributes = element["attributes"]
        assert required <= set(attributes) <= required | optional
        assert set(element) <= {"type", "id", "attributes", "validations"}
        for key in set(attributes) - {"options", "multiple", "default"}:
            assert is_text(attributes[key]), key
        if element["type"] == "markdown":
            assert set(element) == {"type", "attributes"}
            continue
        assert re.fullmatch(r"[A-Za-z0-9_-]+", element["id"])
        ids.append(element["id"])
        labels.append(attributes["label"])
        assert "password" not in attributes["label"].lower()
        assert set(element.get("validations", {})) <= {"required"}
        assert all(isinstance(value, bool) for value in element.get("validations", {}).values())
        options = attributes.get("options", [])
        if element["type"] == "dropdown":
            assert options and all(is_text(option) and option.lower() != "none" for option in options)
            assert len(set(options)) == len(options)
        if element["type"] == "checkboxes":
            assert "validations" not in element and options
            assert all({"label"} <= set(option) <= {"label", "required"} for option in options)
            assert all(is_text(option["label"]) for option in options)
            labels += [option["label"] for option in options]
    assert ids and len(set(ids)) == len(ids)
    simple = [re.sub(r"[^a-z0-9_-]+", "-", label.lower()).strip("-") for label in labels]
    assert len(set(simple)) == len(simple)


def test_the_issue_form_asks_for_what_is_needed():
    body = {element.get("id"): element for element in form("hardware_report.yml")["body"]}
    for name in ("card", "command", "verify", "report"):
        assert body[name]["validations"]["required"], name
    assert body["consent"]["attributes"]["options"][0]["required"] is True
    assert "render" not in body["report"]["attributes"]  # with it, files cannot be attached
    assert "rocm-patch report" in body[None]["attributes"]["value"]
    config = form("config.yml")
    assert set(config) <= {"blank_issues_enabled", "contact_links"} and config["blank_issues_enabled"] is True


# In a browser ---------------------------------------------------------------------------------------------------

LOOK = """() => {
  const problems = [], width = innerWidth, root = document.documentElement;
  const shown = element => element.checkVisibility() && element.getBoundingClientRect().height > 0;
  if (root.scrollWidth > width) problems.push(`the page is ${root.scrollWidth} wide`);
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    if (!element.closest(".wide") && box.width && box.right > width + 0.5)
      problems.push(`${element.tagName} reaches ${box.right}: ${element.textContent.slice(0, 60)}`);
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), picture = text.closest("svg").getBoundingClientRect();
    // Some letters hang over by a pixel.
    if (box.right > picture.right + 2 || box.left < picture.left - 2 || box.bottom > picture.bottom)
      problems.push(`cut off: ${text.textContent}`);
  }
  // The ratio of luminances that WCAG 2 asks of text, 4.5 (https://www.w3.org/TR/WCAG22/#contrast-minimum).
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(color).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (numbers(color).length < 4 || numbers(color)[3] > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  for (const element of document.querySelectorAll("body *")) {
    if (!shown(element) || ![...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(element.closest("svg") ? style.fill : style.color), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) problems.push(`contrast ${ratio.toFixed(2)}: ${element.textContent.slice(0, 60)}`);
  }
  const sections = [...document.querySelectorAll("section")].filter(shown).map(section => section.id);
  const paper = luminance(behind(document.body));
  return {problems, sections, paper, fine: shown(document.querySelector("details .finding.ok"))};
}"""


@pytest.fixture(scope="module")
def browser():
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("not on this machine: chromium (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers have no user namespaces for Chromium's sandbox; the page is ours.
        started = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write(path, report.render(full_document()))
    return path


def opened(browser, path, **context):
    """The page, and what it said and asked for while it opened."""
    page = browser.new_page(**context)
    heard = {"errors": [], "requests": []}
    page.on("console", lambda message: heard["errors"].append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: heard["errors"].append(str(error)))
    page.on("request", lambda request: heard["requests"].append(request.url))
    page.goto(path.as_uri(), wait_until="networkidle")
    return page, heard


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(browser, page_file, width, scheme):
    page, heard = opened(browser, page_file, viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen = page.evaluate(LOOK)
    assert sorted(seen["sections"]) == sorted(SECTIONS) and seen["problems"] == []
    assert (seen["paper"] > 0.8) == (scheme == "light") and (seen["paper"] < 0.05) == (scheme == "dark")
    assert not seen["fine"]
    page.click("summary:has-text('In order')")
    assert page.evaluate(LOOK)["fine"]
    (ROOT / ".artifacts").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / ".artifacts" / f"report-{scheme}-{width}.png", full_page=True)
    page.close()
    assert heard == {"errors": [], "requests": [page_file.as_uri()]}


def test_the_page_on_paper(browser, page_file):
    page, heard = opened(browser, page_file, viewport={"width": 680, "height": 960}, color_scheme="dark")
    printed = page.pdf(path=ROOT / ".artifacts" / "report.pdf", format="A4")
    page.emulate_media(media="print")
    seen = page.evaluate(LOOK)
    assert printed.startswith(b"%PDF") and len(printed) > 10_000
    assert seen["fine"] and seen["paper"] > 0.99 and seen["problems"] == []
    assert not page.is_visible("nav")
    page.close()
    assert heard == {"errors": [], "requests": [page_file.as_uri()]}

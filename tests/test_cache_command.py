"""`rocm-patch cache`: what it prints, where, its exit codes, and what is left afterwards."""

import dataclasses
import json
import os
import sqlite3

import pytest

from conftest import rocm_patch
from hammer import MACHINE
from rocm_patch.trust.store import Store, Verdict

pytestmark = pytest.mark.torch_free

OTHER = dataclasses.replace(MACHINE, device="gfx1151", torch="2.13.0")
SPEC = '{"direction":"forward","image":[1,2,42,42]}'


@pytest.fixture
def cache(tmp_path):
    """A store with entries of two machines, and the command line on its folder."""
    folder = tmp_path / "cache"
    store = Store(folder)
    store.put(
        MACHINE, SPEC, "forward 1x2x42x42", "native", Verdict("hang", when=1e9, evidence="no progress\nin a frame")
    )
    store.put(MACHINE, SPEC, "forward 1x2x42x42", "im2col", Verdict("ok", 0.25, 3e-7, 9, 1.1e9))
    store.put(OTHER, "opaque", "grad_weight 3x3", "native", Verdict("ok", when=1.2e9))
    store.suspect(OTHER, "other", "grad_input 5x5", "native", "died\nwith a stack")
    store.close()

    def run(*arguments, check=True):
        return rocm_patch("cache", *arguments, check=check, ROCM_PATCH_CACHE_DIR=str(folder))

    run.folder = folder
    return run


def left(cache):
    store = Store(cache.folder)
    return sorted((row.label, row.strategy) for row in store.rows()), [s.label for s in store.suspicions()]


def test_list_is_a_table_by_machine(cache):
    done = cache("list")
    blocks = done.stdout.split(f"{OTHER.id}  ")
    assert blocks[0].startswith(f"{MACHINE.id}  gfx1010") and blocks[1].startswith("gfx1151")
    hang = next(line for line in blocks[0].splitlines() if " hang " in line)
    assert hang.split()[:4] == ["hang", "native", "forward", "1x2x42x42"] and hang.endswith("no progress")
    assert any(line.split()[:2] == ["ok", "im2col"] for line in blocks[0].splitlines())
    assert any(line.split()[:3] == ["suspect", "native", "grad_input"] for line in blocks[1].splitlines())
    assert "in a frame" not in done.stdout and done.stderr == ""
    bad = cache("list", "--bad").stdout
    assert " hang " in bad and " suspect " in bad and " ok " not in bad
    assert OTHER.id not in cache("list", "--machine", MACHINE.id[:6]).stdout


def test_list_as_json(cache):
    document = json.loads(cache("list", "--json").stdout)
    assert set(document) == {"schema_version", "where", "verdicts", "suspicions"} and document["schema_version"] == 1
    assert document["where"] == str(cache.folder / "verdicts.db") and len(document["verdicts"]) == 3
    first = document["verdicts"][0]
    assert first["machine"] == {"id": MACHINE.id, **dataclasses.asdict(MACHINE)} and first["error"] is None
    assert first["spec"]["image"] == [1, 2, 42, 42] and first["kind"] == "hang" and first["when"] == 1e9
    assert first["evidence"] == "no progress\nin a frame" and document["verdicts"][2]["spec"] == "opaque"
    assert [entry["label"] for entry in document["suspicions"]] == ["grad_input 5x5"]
    assert [entry["kind"] for entry in json.loads(cache("list", "--bad", "--json").stdout)["verdicts"]] == ["hang"]


def test_nothing_known_is_no_error(tmp_path):
    folder = str(tmp_path / "none")
    done = rocm_patch("cache", "list", ROCM_PATCH_CACHE_DIR=folder)
    assert done.stdout == "" and "nothing is known" in done.stderr and folder in done.stderr
    document = json.loads(rocm_patch("cache", "list", "--json", ROCM_PATCH_CACHE_DIR=folder).stdout)
    assert document["verdicts"] == document["suspicions"] == []
    assert "0 removed" in rocm_patch("cache", "clear", ROCM_PATCH_CACHE_DIR=folder).stderr
    assert not os.path.exists(folder)  # noqa: PTH110


def test_show_has_all_of_the_evidence(cache):
    text = cache("show", "42x42").stdout
    assert "no progress\n" in text and "    in a frame" in text and "3e-07" in text and "not measured" in text
    assert "gfx1010" in text and "grad_weight" not in text
    everything = cache("show").stdout
    assert "grad_weight 3x3" in everything and "    with a stack" in everything and "suspected" in everything
    assert len(json.loads(cache("show", "42x42", "--json").stdout)["verdicts"]) == 2


def test_show_of_nothing(cache):
    done = cache("show", "17x17", check=False)
    assert done.returncode == 1 and done.stdout == "" and "hint: rocm-patch cache list" in done.stderr


def test_clear_says_what_goes(cache):
    done = cache("clear")
    assert done.stdout == "" and left(cache) == ([], [])
    assert f"forgetting 1 hang, 1 ok of {MACHINE.id}" in done.stderr
    assert f"forgetting 1 ok, 1 suspect of {OTHER.id}" in done.stderr and "4 removed" in done.stderr


def test_clear_a_part(cache):
    assert "1 removed" not in cache("clear", "--bad").stderr
    assert left(cache) == ([("forward 1x2x42x42", "im2col"), ("grad_weight 3x3", "native")], [])
    assert "1 removed" in cache("clear", "--machine", OTHER.id).stderr
    assert left(cache) == ([("forward 1x2x42x42", "im2col")], [])


@pytest.mark.parametrize("arguments", [("--machine", "nonsense"), ("--all", "--bad")])
def test_clear_what_cannot_be(cache, arguments):
    before = left(cache)
    done = cache("clear", *arguments, check=False)
    assert done.returncode == 2 and "hint:" in done.stderr and left(cache) == before


def test_what_was_set_aside_goes_with_all_alone(cache):
    (cache.folder / "verdicts.db").write_bytes(b"garbage" * 999)
    done = cache("list")
    assert "is damaged" in done.stderr and "hint: rocm-patch cache clear --all" in done.stderr
    (aside,) = cache.folder.glob("*.corrupt-*")
    cache("clear")
    assert aside.exists()
    assert f"{aside} removed" in cache("clear", "--all").stderr and not aside.exists()


def test_clear_that_cannot_write_says_so(cache):
    connection = sqlite3.connect(cache.folder / "verdicts.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    done = cache("clear", check=False)
    connection.close()
    assert done.returncode == 1 and "could not be written" in done.stderr and len(left(cache)[0]) == 3


def test_it_needs_no_torch(cache, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('not here')\n")
    done = rocm_patch("cache", "show", ROCM_PATCH_CACHE_DIR=str(cache.folder), PYTHONPATH=str(tmp_path))
    assert "no progress" in done.stdout

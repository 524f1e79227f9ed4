"""`rocm-patch check` on scripts with faults planted in them, and on scripts without.

A line of `tests/scripts/` that ends in `# expect: RULE` is to be found with that rule, and nothing else is.
"""

import ast
import json
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, rocm_patch
from rocm_patch.tools.check import check_file
from rocm_patch.tools.check.rules import RULE_NAMES

SCRIPTS = ROOT / "tests" / "scripts"
pytestmark = pytest.mark.torch_free


def planted(path):
    lines = path.read_text().splitlines()
    return sorted(
        (number, rule) for number, line in enumerate(lines, 1) for rule in re.findall(r"# expect: ([\w-]+)", line)
    )


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_planted_fault_is_found_with_its_line_and_nothing_else(path):
    assert [(finding.line, finding.rule) for finding in check_file(path)] == planted(path)


def test_the_scripts_are_many_and_every_rule_is_planted_in_one():
    rules = {rule for path in SCRIPTS.glob("*.py") for _, rule in planted(path)}
    assert rules == set(RULE_NAMES)
    clean = [path for path in SCRIPTS.glob("*.py") if not planted(path)]
    assert len(list(SCRIPTS.glob("*.py"))) >= 20 and len(clean) >= 8


def test_the_clean_scripts_say_so():
    for path in SCRIPTS.glob("*.py"):
        says = (ast.get_docstring(ast.parse(path.read_text())) or "") if path.stem != "syntax_error" else ""
        if "clean" in says:
            assert not planted(path), path


def notebook(*cells):
    made = [
        {"cell_type": "code", "source": cell, "metadata": {}, "outputs": [], "execution_count": None}
        for cell in cells
    ]
    return json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Title"]}, *made], "metadata": {},
                       "nbformat": 4, "nbformat_minor": 5})  # fmt: skip


def test_notebooks_are_read_cell_by_cell(tmp_path):
    path = tmp_path / "train.ipynb"
    path.write_text(
        notebook(
            "%pip install rocm-patch\nimport torch\nfiles = !ls\n",
            "%%bash\necho 'not Python ('\n",
            'import os\nfrom torch.utils.data import DataLoader\nos.environ["HSA_OVERRIDE_GFX_VERSION"] = "10.3.0"\n',
            "for batch in DataLoader([1], num_workers=2):\n    print(batch)\nawait other()\ntorch.zeros(1).cuda()\n",
        )
    )
    (found,) = check_file(path)
    assert (found.cell, found.line, found.rule) == (4, 3, "torch-before-environment")
    assert "(cell 2, line 2)" in found.summary and "before cell 2, line 2" in found.fix
    path.write_text(notebook("x = 1", "def broken(:\n    pass"))
    (found,) = check_file(path)
    assert (found.cell, found.line, found.rule) == (3, 1, "unreadable")
    path.write_text("{}[")
    (found,) = check_file(path)
    assert found.rule == "unreadable" and "not a notebook" in found.summary


def test_the_command(tmp_path):
    done = rocm_patch("check", str(SCRIPTS / "unguarded_main.py"), check=False)
    assert done.returncode == 1
    first, why, fix = done.stdout.splitlines()
    assert first.startswith(f"{SCRIPTS / 'unguarded_main.py'}:25:1: missing-guard: ")
    assert why.startswith("  why: ") and fix.startswith("  fix: ") and "rocm-patch run" in fix
    assert done.stderr == "rocm-patch: 1 finding in 1 file\n"
    clean = rocm_patch("check", str(SCRIPTS / "guarded_argparse.py"), str(SCRIPTS / "functions_only.py"))
    assert (clean.stdout, clean.stderr) == ("", "rocm-patch: no findings in 2 files\n")
    missing = rocm_patch("check", str(tmp_path / "nowhere.py"), check=False)
    assert missing.returncode == 2 and "there is no " in missing.stderr and "hint: " in missing.stderr
    (tmp_path / "notes.txt").write_text("import (")
    nothing = rocm_patch("check", str(tmp_path), check=False)
    assert nothing.returncode == 2 and "there is no script or notebook in " in nothing.stderr
    assert rocm_patch("check", check=False).returncode == 2


def test_folders_and_json(tmp_path):
    """What an environment or a version control system keeps in a folder is not the user's own."""
    for folder in (".git", "venv", "package/__pycache__", "package"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(SCRIPTS / "gpu_at_import.py", tmp_path / folder / "train.py")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    (tmp_path / "notes.txt").write_text("import (")
    (tmp_path / "package" / "again.py").symlink_to("train.py")
    done = rocm_patch("check", "--json", str(tmp_path), str(tmp_path / "package" / "train.py"), check=False)
    document = json.loads(done.stdout)
    assert done.returncode == 1 and document["schema_version"] == 1 and document["files"] == 1
    assert [finding["line"] for finding in document["findings"]] == [5, 9, 10, 11]
    assert set(document["findings"][0]) == {"path", "line", "column", "rule", "summary", "why", "fix", "cell"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"import torch\x00", "null bytes"),
        (b"# coding: nonsense\nimport torch\n", "unknown encoding"),
        (b"x = '\xff'\n", "codec|encod|invalid"),
        (b"-" * 100_000 + b"1", "nested too deeply"),
        (b"x = (" + b"(" * 5000, "parenthes|never closed"),
        (b"+".join([b"1"] * 20_000), "nested too deeply"),
    ],
    ids=["null", "encoding", "bytes", "minus", "open", "sum"],
)
def test_what_is_not_python_is_one_finding(tmp_path, content, reason):
    path = tmp_path / "odd.py"
    path.write_bytes(content)
    (found,) = check_file(path)
    assert found.rule == "unreadable" and re.search(reason, found.summary)
    (tmp_path / "folder.py").mkdir()
    (found,) = check_file(tmp_path / "folder.py")
    assert found.rule == "unreadable"


def test_the_encoding_that_a_script_declares_is_read(tmp_path):
    path = tmp_path / "latin.py"
    path.write_bytes("# coding: latin-1\nimport os, torch\nos.environ['HSA_XNACK'] = 'é'\r\n".encode("latin-1"))
    assert [(found.line, found.rule) for found in check_file(path)] == [(3, "torch-before-environment")]


def _indented(statements):
    return statements.map(lambda text: text.replace("\n", "\n "))


NAMES = st.sampled_from(["a", "b", "loader", "torch", "os", "self"])
EXPRESSIONS = st.recursive(
    st.one_of(NAMES, st.sampled_from(["1", "'fork'", "DataLoader(a, num_workers=2)", "os.environ", "lambda: a"])),
    lambda inner: st.one_of(
        st.builds("{}.{}".format, st.builds("({})".format, inner), NAMES),
        st.builds("({})({}, *{}, {}={}, **{})".format, inner, inner, inner, NAMES, inner, inner),
        st.builds("[{} for {} in {} if {}]".format, inner, NAMES, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} := {})".format, NAMES, inner),
        st.builds("({})[{}]".format, inner, inner),
        st.builds("{{{}: {}, **{}}}".format, inner, inner, inner),
    ),
    max_leaves=8,
)
STATEMENTS = st.recursive(
    st.one_of(
        st.builds("{} = {}".format, NAMES, EXPRESSIONS),
        st.builds("{}, {} = {}".format, NAMES, NAMES, EXPRESSIONS),
        st.builds("{}.x = {}".format, NAMES, EXPRESSIONS),
        EXPRESSIONS,
        st.sampled_from(["import torch", "from torch import *", "global a", "del a", "pass"]),
    ),
    lambda inner: st.one_of(
        st.builds("for {} in {}:\n {}".format, NAMES, EXPRESSIONS, _indented(inner)),
        st.builds("def {}({}, *{}):\n {}\n return {}".format, NAMES, st.just("p"), st.just("q"), _indented(inner),
                  EXPRESSIONS),
        st.builds("class {}({}):\n {}".format, NAMES, EXPRESSIONS, _indented(inner)),
        st.builds("if __name__ == '__main__':\n {}\nelse:\n {}".format, _indented(inner), _indented(inner)),
        st.builds("{}\n{}".format, inner, inner),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=STATEMENTS)
def test_names_that_stand_for_each_other_end_somewhere(tmp_path_factory, text):
    """Whatever refers to whatever: an answer, and no error of ours."""
    path = tmp_path_factory.mktemp("drawn") / "drawn.py"
    path.write_text(text)
    rules = {finding.rule for finding in check_file(path)}
    try:
        compile(text, "drawn", "exec", ast.PyCF_ONLY_AST)
    except SyntaxError:
        assert rules == {"unreadable"}
    else:
        assert "unreadable" not in rules


def test_our_own_programs_have_no_findings_but_those_they_mean():
    found = [finding for name in ("examples", "benchmarks", "src") for finding in _below(ROOT / name)]
    assert {finding.rule for finding in found} <= {"fork-asked-for", "gpu-in-worker"}, found


def _below(folder):
    return [finding for path in sorted(folder.rglob("*.py")) for finding in check_file(path)]

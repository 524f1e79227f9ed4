"""`rocm-patch check`: what will go wrong in a script with a GPU and workers, found by reading it.

Nothing of the script is run. `files` reads it, `scopes` and `names` say what a name in it stands for, `flow` in
which order it does things, `loaders` which of its loaders have workers; `rules` are asked one after the other.
"""

from __future__ import annotations

import dataclasses
import io
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocm_patch.tools.check import files
from rocm_patch.tools.check.files import Source, UnreadableError
from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.rules import RULES

SCHEMA_VERSION = 1
_IGNORE = re.compile(r"#\s*rocm-patch:\s*ignore(?:\[([^\]]*)\])?")


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        findings: by file, in the order of their lines.
        files: how many files were looked at.
    """

    findings: tuple[Finding, ...]
    files: int


def check(paths: Iterable[Path]) -> Result:
    """Check scripts, notebooks, and all of them in folders.

    Raises:
        UsageError: a path does not exist.
    """
    found: list[Finding] = []
    count = 0
    for path in list(files.find(paths)):
        count += 1
        found += check_file(path)
    return Result(tuple(found), count)


def check_file(path: Path) -> list[Finding]:
    """What is wrong in one script or notebook, in the order of its lines."""
    is_notebook = path.suffix == ".ipynb"
    try:
        source = files.read(path)
        script = Script(str(path), source.tree, is_notebook)
        found = {finding for rule in RULES for finding in rule(script)}
    except UnreadableError as error:
        return [_unreadable(path, error)]
    except RecursionError:
        return [_unreadable(path, UnreadableError(files.TOO_DEEP))]
    silenced = _silenced(source)
    loud = [finding for finding in found if not silenced.get(finding.line, frozenset()) & {finding.rule, "*"}]
    return [_placed(source, finding) for finding in sorted(loud, key=lambda f: (f.line, f.column, f.rule, f.summary))]


def _placed(source: Source, finding: Finding) -> Finding:
    line, cell = source.place(finding.line)
    return dataclasses.replace(finding, line=line, cell=cell)


def _unreadable(path: Path, error: UnreadableError) -> Finding:
    return Finding(
        str(path),
        error.line,
        error.column,
        "unreadable",
        error.reason,
        "nothing else of it was checked",
        "open it in Jupyter" if path.suffix == ".ipynb" else f"python -m py_compile {path}",
        error.cell,
    )


def _silenced(source: Source) -> dict[int, frozenset[str]]:
    """The rules that comments switch off, by line; `*` for all."""
    if "rocm-patch:" not in source.text:
        return {}
    found: dict[int, frozenset[str]] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            match = _IGNORE.search(token.string) if token.type == tokenize.COMMENT else None
            if match:
                rules = (match[1] or "*").split(",")
                found[token.start[0]] = frozenset(rule.strip() for rule in rules)
    except (tokenize.TokenError, SyntaxError):  # what was read up to here counts
        pass
    return found


def document(result: Result) -> dict[str, Any]:
    """The findings as the JSON document of the command line."""
    return {
        "schema_version": SCHEMA_VERSION,
        "findings": [dataclasses.asdict(finding) for finding in result.findings],
        "files": result.files,
    }

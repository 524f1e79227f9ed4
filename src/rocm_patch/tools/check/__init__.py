"""`rocm-patch check`: what will go wrong in a script with a GPU and workers, found by reading it.

Nothing of the script is run. `files` reads it, `scopes` and `names` say what a name in it stands for, `flow` in
which order it does things, `loaders` which of its loaders have workers; `rules` are asked one after the other.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import shlex
import sys
import threading
import tokenize
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocm_patch.errors import UsageError
from rocm_patch.tools.check import files
from rocm_patch.tools.check.files import Source, UnreadableError
from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.rules import RULE_NAMES, RULES

SCHEMA_VERSION = 1
_STACK_BYTES = 512 << 20  # of addresses, not of memory
_DEPTH = 10_000
_IGNORE = re.compile(r"rocm-patch:\s*ignore(?:\[([^\]]*)\])?")


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
        UsageError: a path does not exist, or there is nothing to check.
    """
    asked = list(paths)
    scripts = list(files.find(asked))
    if not scripts:
        raise UsageError(
            f"there is no script or notebook in {', '.join(map(str, asked))}", "rocm-patch check train.py"
        )
    return Result(
        tuple(_with_room(lambda: [finding for path in scripts for finding in check_file(path)])), len(scripts)
    )


def _with_room(work: Callable[[], list[Finding]]) -> list[Finding]:
    """Work in a thread whose stack is long enough for long chains of `a + b + ...` and of `elif`."""
    stack, depth = threading.stack_size(_STACK_BYTES), sys.getrecursionlimit()
    sys.setrecursionlimit(max(depth, _DEPTH))
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()
    finally:
        sys.setrecursionlimit(depth)
        threading.stack_size(stack)


def check_file(path: Path) -> list[Finding]:
    """What is wrong in one script or notebook, in the order of its lines."""
    try:
        source = files.read(path)
        script = Script(str(path), source)
        found = {finding for rule in RULES for finding in rule(script)}
    except UnreadableError as error:
        return [_unreadable(path, error)]
    except RecursionError:
        return [_unreadable(path, UnreadableError(files.TOO_DEEP))]
    silenced, odd = _silenced(source, path)
    loud = [finding for finding in found if not silenced.get(finding.line, set()) & {finding.rule, "*"}] + odd
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
        "open it in Jupyter" if path.suffix == ".ipynb" else f"python -m py_compile {shlex.quote(str(path))}",
        error.cell,
    )


def _silenced(source: Source, path: Path) -> tuple[dict[int, set[str]], list[Finding]]:
    """The rules that comments switch off, by line, `*` for all; and comments that name no rule.

    A comment counts for the statement that it stands in, or before where it has a line of its own.
    """
    found: dict[int, set[str]] = {}
    odd: list[Finding] = []
    if "rocm-patch:" not in source.text:
        return found, odd
    statements = [node for node in ast.walk(source.tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    extents = {line: node for node in statements for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    for token in _comments(source.text):
        match = _IGNORE.search(token.string)
        if match is None:
            continue
        names = {name.strip() for name in (match[1] or "*").split(",")}
        line = token.start[0] + (1 if token.line.lstrip().startswith("#") else 0)
        node = extents.get(line)
        covered = range(line, line + 1) if node is None else range(node.lineno, (node.end_lineno or line) + 1)
        for number in covered:
            found.setdefault(number, set()).update(names)
        for name in sorted(names - {"*", *RULE_NAMES}):
            odd.append(
                Finding(
                    str(path), token.start[0], token.start[1] + 1, "unknown-rule",
                    f"there is no rule {name!r}", "the comment switches nothing off",
                    f"one of {', '.join(RULE_NAMES)}",
                )
            )  # fmt: skip
    return found, odd


def _comments(text: str) -> Iterator[tokenize.TokenInfo]:
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token
    except (tokenize.TokenError, SyntaxError):  # what was read up to here counts
        return


def document(result: Result) -> dict[str, Any]:
    """The findings as the JSON document of the command line."""
    return {
        "schema_version": SCHEMA_VERSION,
        "findings": [dataclasses.asdict(finding) for finding in result.findings],
        "files": result.files,
    }

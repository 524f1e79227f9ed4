"""The files that are checked: which they are, and their code."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rocm_patch.errors import UsageError

_SUFFIXES = (".py", ".pyw", ".ipynb")
_SKIPPED = ("__pycache__", "build", "node_modules", "site-packages")
# What IPython takes and Python does not: `%magic`, `!command`, `?help`, `help?`, `x = !command`.
_MAGIC = re.compile(r"^(\s*)(?:[%!?].*|[^#'\"]*\?\s*)$")
_ASSIGNED_MAGIC = re.compile(r"^(\s*[\w.,\s]+=\s*)[%!].*$")
# Cell magics whose cell is Python all the same.
_PYTHON_CELLS = ("%%time", "%%timeit", "%%capture", "%%prun")

TOO_DEEP = "its expressions are nested too deeply"
_TOO_DEEP = (RecursionError, MemoryError)  # the second is what Python's parser says when its stack is full


class UnreadableError(Exception):
    """A file that has no code to check.

    Args:
        reason: why, in words.
        line: where, from 1.
        column: where, from 1.
        cell: in which cell of a notebook.
    """

    def __init__(self, reason: str, line: int = 1, column: int = 1, cell: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column, self.cell = reason, line, column, cell


@dataclass(frozen=True)
class Source:
    """A file's code.

    Attributes:
        text: the code; of a notebook that of its cells, one after the other.
        tree: the same, parsed.
        cells: of a notebook for each of its cells with code: number, and the line before its first in `text`.
    """

    text: str
    tree: ast.Module
    cells: tuple[tuple[int, int], ...] | None = None

    def place(self, line: int) -> tuple[int, int | None]:
        """The line as the reader of the file counts it, and its cell."""
        if self.cells is None:
            return line, None
        number, before = max(
            (cell for cell in self.cells if cell[1] < line), key=lambda cell: cell[1], default=(1, 0)
        )
        return line - before, number


def find(paths: Iterable[Path]) -> Iterator[Path]:
    """The files to check: those given, and in folders all scripts and notebooks, each once.

    Raises:
        UsageError: a path does not exist.
    """
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no {path}", "rocm-patch check train.py, or rocm-patch check FOLDER")
        for file in _below(path) if path.is_dir() else [path]:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_skipped(Path(root, name)))
        yield from (Path(root, name) for name in sorted(names) if _is_checked(Path(root, name)))


def _is_skipped(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name in _SKIPPED or (folder / "pyvenv.cfg").exists()


def _is_checked(file: Path) -> bool:
    return file.suffix in _SUFFIXES and not file.name.startswith(".") and file.is_file()


def read(path: Path) -> Source:
    """A script's or notebook's code.

    Raises:
        UnreadableError: it cannot be read, or is not Python.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"it cannot be read: {error.strerror or error}") from error
    return _notebook(content) if path.suffix == ".ipynb" else parse(content)


def parse(content: bytes) -> Source:
    """A script's code, in the encoding that it declares.

    Raises:
        UnreadableError: it is not Python.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = io.TextIOWrapper(io.BytesIO(content), encoding, newline=None).read()
        tree = _tree(text)
    except SyntaxError as error:  # an unknown encoding is one too
        raise UnreadableError(f"it is not Python: {error.msg}", error.lineno or 1, error.offset or 1) from error
    except (ValueError, LookupError) as error:  # rot13 is an encoding, but not of text
        raise UnreadableError(f"it is not Python: {error}") from error
    except _TOO_DEEP as error:
        raise UnreadableError(TOO_DEEP) from error
    return Source(text, tree)


def _tree(text: str, *, has_await: bool = False) -> ast.Module:
    flags = ast.PyCF_ONLY_AST | (ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if has_await else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the user's strings
        tree = compile(text, "<script>", "exec", flags, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    return tree


def _notebook(content: bytes) -> Source:
    lines: list[str] = []
    cells: list[tuple[int, int]] = []
    for number, code in _code_cells(content):
        cells.append((number, len(lines)))
        try:
            kept = _without_magics(code)
            _tree(kept, has_await=True)
        except SyntaxError as error:
            reason = f"cell {number} is not Python: {error.msg}"
            raise UnreadableError(reason, error.lineno or 1, error.offset or 1, number) from error
        except ValueError as error:
            raise UnreadableError(f"cell {number} is not Python: {error}", cell=number) from error
        except _TOO_DEEP as error:
            raise UnreadableError(TOO_DEEP, cell=number) from error
        lines += kept.split("\n")
    text = "\n".join(lines) + "\n"
    return Source(text, _tree(text, has_await=True), tuple(cells))


def _code_cells(content: bytes) -> Iterator[tuple[int, str]]:
    """Number and text of a notebook's cells with Python, of its third and its fourth format."""
    try:
        document = json.loads(content)
        metadata = document.get("metadata", {})
        language = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
        sheets = document.get("worksheets", [document])
        cells = [cell for sheet in sheets for cell in sheet.get("cells", [])]
        for number, cell in enumerate(cells, start=1):
            source = cell.get("source", cell.get("input", ""))
            if cell.get("cell_type") == "code" and str(language or "python").startswith(("python", "ipython")):
                yield number, "".join(source)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UnreadableError(f"it is not a notebook: {error}") from error


def _without_magics(code: str) -> str:
    """A cell's Python: as many lines, with nothing in the place of what is IPython's own."""
    first = code.lstrip().partition("\n")[0]
    if first.startswith("%%") and not first.split()[0].startswith(_PYTHON_CELLS):
        return "\n" * code.count("\n")
    try:
        _tree(code, has_await=True)
    except (SyntaxError, ValueError):
        kept = (_MAGIC.sub(r"\1pass", line) for line in code.split("\n"))
        return "\n".join(_ASSIGNED_MAGIC.sub(r"\1None", line) for line in kept)
    return code

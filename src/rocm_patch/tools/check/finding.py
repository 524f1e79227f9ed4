"""What is wrong in a script, and where."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from rocm_patch.tools.check.files import Source
from rocm_patch.tools.check.flow import Step, steps
from rocm_patch.tools.check.loaders import Loaders
from rocm_patch.tools.check.names import Names


@dataclass(frozen=True)
class Finding:
    """A fault in a script.

    Attributes:
        path: the file.
        line: from 1; of the cell where the file is a notebook.
        column: from 1.
        rule: the rule's name, which `# rocm-patch: ignore[RULE]` takes.
        summary: what is so.
        why: what follows from it.
        fix: what mends it.
        cell: the number of the notebook's cell, from 1; None in a script.
    """

    path: str
    line: int
    column: int
    rule: str
    summary: str
    why: str
    fix: str
    cell: int | None = None


class Script:
    """A parsed script, and what the rules ask about it.

    Args:
        path: the file.
        source: its code.

    Attributes:
        program: the file, as a shell takes it.
        is_notebook: whether it is a notebook's: no process can import it.
    """

    def __init__(self, path: str, source: Source) -> None:
        self.path = path
        self.program = shlex.quote(path)
        self.is_notebook = source.cells is not None
        self.names = Names(source.tree)
        self._source = source

    def at(self, line: int) -> str:
        """A line of the code in words, as the reader of the file counts."""
        number, cell = self._source.place(line)
        return f"line {number}" if cell is None else f"cell {cell}, line {number}"

    @cached_property
    def steps(self) -> list[Step]:
        """What it does when it is started."""
        return steps(self.names)

    @cached_property
    def loaders(self) -> Loaders:
        """Its data loaders."""
        return Loaders(self.names)

    @cached_property
    def calls(self) -> list[ast.Call]:
        """Every call in it, wherever it stands."""
        return [call for calls in self.names.table.calls.values() for call in calls]

    def found(self, node: ast.AST, rule: str, summary: str, why: str, fix: str) -> Finding:
        """A finding at a node."""
        return Finding(
            self.path, getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1, rule, summary, why, fix
        )


Rule = Callable[[Script], Iterable[Finding]]

"""What a script does when it is started, in the order in which it does it, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from rocm_patch.tools.check.names import Names
from rocm_patch.tools.check.scopes import Function

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Libraries' functions that call the function that they are given.
_CALLERS = ("fire.Fire", "typer.run", "absl.app.run", "tyro.cli")
_DEEPEST = 40


@dataclass(frozen=True)
class Step:
    """One expression or statement that is evaluated.

    Attributes:
        node: what.
        line: the line of the script's top level that leads to it.
        is_guarded: whether it is under `if __name__ == "__main__":`, which a worker skips.
        is_direct: whether it stands at the top level itself, and not in a function that is called there.
    """

    node: ast.AST
    line: int
    is_guarded: bool
    is_direct: bool


def steps(names: Names) -> list[Step]:
    """The steps of a script: conditions and loops once through each of their branches.

    What is in a function counts where the function is first called.
    """
    walk = _Walk(names)
    return [step for statement in names.tree.body for step in walk.run(statement, statement.lineno, False, 0)]


class _Walk:
    def __init__(self, names: Names) -> None:
        self.names = names
        self._seen: set[tuple[ast.AST, bool]] = set()

    def run(self, node: ast.AST, line: int, guarded: bool, depth: int) -> Iterator[Step]:
        """The steps of a node, what it consists of first."""
        here = Step(node, line, guarded, depth == 0)
        if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
            arguments = node.args
            parts: list[ast.AST] = [*getattr(node, "decorator_list", []), *arguments.defaults]
            parts += [default for default in arguments.kw_defaults if default is not None]
            yield from self._all(parts, line, guarded, depth)
        elif isinstance(node, ast.If):
            yield from self._condition(node, line, guarded, depth)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            yield from self.run(node.iter, line, guarded, depth)
            yield here
            yield from self._all([*node.body, *node.orelse], line, guarded, depth)
        else:
            yield from self._all(ast.iter_child_nodes(node), line, guarded, depth)
            yield here
            if isinstance(node, ast.Call):
                yield from self._called(node, line, guarded, depth)

    def _all(self, nodes: Iterator[ast.AST] | list[ast.AST], line: int, guarded: bool, depth: int) -> Iterator[Step]:
        for node in nodes:
            # The place of interest is the innermost statement of the top level: the call in a loop, not the loop.
            at = node.lineno if depth == 0 and isinstance(node, ast.stmt) else line
            yield from self.run(node, at, guarded, depth)

    def _condition(self, node: ast.If, line: int, guarded: bool, depth: int) -> Iterator[Step]:
        yield from self.run(node.test, line, guarded, depth)
        guards = guard(node.test)
        if self.names.dotted(node.test) not in ("typing.TYPE_CHECKING", "TYPE_CHECKING"):
            yield from self._all(list(node.body), line, guarded or guards == "body", depth)
        yield from self._all(list(node.orelse), line, guarded or guards == "else", depth)

    def _called(self, call: ast.Call, line: int, guarded: bool, depth: int) -> Iterator[Step]:
        called = self.names.dotted(call.func)
        found = self.names.definition(call.func)
        functions: list[ast.AST | None] = [found]
        if called in _CALLERS and call.args:
            functions = [self.names.definition(call.args[0])]
        elif called == "threading.Thread":
            functions = [self.names.definition(part) for part in self.names.keyword(call, "target")]
        elif isinstance(found, ast.ClassDef):
            functions = [self.names.method(found, name) for name in ("__init__", "__post_init__")]
        elif found is None:
            functions = [
                self.names.method(owner, name)
                for owner in self._instance(call.func)
                for name in ("__call__", "forward")
            ]
            functions += self._commands(call.func)
        for function in functions:
            if isinstance(function, _FUNCTIONS) and (function, guarded) not in self._seen and depth < _DEEPEST:
                self._seen.add((function, guarded))
                yield from self._body(function, line, guarded, depth + 1)

    def _commands(self, app: ast.expr) -> list[ast.AST]:
        """The commands of a typer application that is called."""
        if not isinstance(app, ast.Name) or not any(
            isinstance(value, ast.Call) and self.names.dotted(value.func) == "typer.Typer"
            for value in self.names.values(app)
        ):
            return []
        return [
            node
            for node in self.names.tree.body
            for mark in (node.decorator_list if isinstance(node, _FUNCTIONS) else [])
            for part in [mark.func if isinstance(mark, ast.Call) else mark]
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == app.id
        ]

    def _instance(self, node: ast.AST) -> Iterator[ast.ClassDef]:
        for value in self.names.values(node):
            made = self.names.definition(value.func) if isinstance(value, ast.Call) and value is not node else None
            if isinstance(made, ast.ClassDef):
                yield made

    def _body(self, function: Function, line: int, guarded: bool, depth: int) -> Iterator[Step]:
        yield from self._all(list(function.body), line, guarded, depth)


def guard(test: ast.expr) -> str:
    """Which part of an `if` a worker skips: `body`, `else`, or neither."""
    for part in ast.walk(test):
        if isinstance(part, ast.Compare) and len(part.ops) == 1:
            sides = [part.left, part.comparators[0]]
            texts = [side.value for side in sides if isinstance(side, ast.Constant)]
            if any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides) and texts:
                is_equal = isinstance(part.ops[0], ast.Eq)
                return "body" if is_equal == (texts[0] == "__main__") else "else"
    return ""

"""Who binds which name where in a script: read once, asked by `names`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(eq=False)
class Scope:
    """A module, class, function, lambda or comprehension, and the names that it binds."""

    node: ast.AST
    parent: Scope | None
    bindings: dict[str, list[Binding]] = field(default_factory=dict)

    @property
    def is_class(self) -> bool:
        """Whether its names are hidden from the functions in it."""
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_function(self) -> bool:
        """Whether what is defined in it has no name that another process could import."""
        return isinstance(self.node, (*_FUNCTIONS, ast.Lambda))

    def find(self, name: str) -> list[Binding]:
        """What a name in this scope may stand for; empty if the script does not say."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.bindings and (scope is self or not scope.is_class):
                return scope.bindings[name]
            scope = scope.parent
        return []


@dataclass(frozen=True, eq=False)
class Binding:
    """One way in which a name gets a value.

    Attributes:
        kind: `import`, `value`, `element` (of what is iterated over), `parameter` or `definition`.
        scope: where `node` is evaluated.
        node: the value, the iterable, the parameter's function, or the definition.
        detail: an import's full name; a parameter's name.
        path: the places in the value that unpacking takes.
    """

    kind: str
    scope: Scope
    node: ast.AST
    detail: str = ""
    path: tuple[int, ...] = ()


@dataclass(eq=False)
class Table:
    """The scopes of a script.

    Attributes:
        module: the script's own.
        of: the scope that each node is evaluated in.
        attributes: what `anything.NAME = ...` assigns, by name.
        items: what `NAME["key"] = ...` and `NAME.update(...)` put in, by both names.
        merged: what `NAME.update(OTHER)` takes over.
        appended: what `NAME.append(...)` adds.
        calls: every call, by the last part of the callee's name.
    """

    module: Scope
    of: dict[ast.AST, Scope] = field(default_factory=dict)
    attributes: dict[str, list[Binding]] = field(default_factory=dict)
    items: dict[tuple[str, str], list[ast.expr]] = field(default_factory=dict)
    merged: dict[str, list[ast.expr]] = field(default_factory=dict)
    appended: dict[str, list[ast.expr]] = field(default_factory=dict)
    calls: dict[str, list[ast.Call]] = field(default_factory=dict)


def read(tree: ast.Module) -> Table:
    """The scopes of a parsed script."""
    table = Table(Scope(tree, None))
    _Reader(table).read(tree, table.module)
    return table


class _Reader:
    def __init__(self, table: Table) -> None:
        self.table = table

    def read(self, node: ast.AST, scope: Scope) -> None:
        self.table.of[node] = scope
        inner = scope
        if isinstance(node, (*_FUNCTIONS, ast.Lambda, ast.ClassDef)):
            inner = Scope(node, scope)
            self._definition(node, scope, inner)
            return
        if isinstance(node, _COMPREHENSIONS):
            inner = Scope(node, scope)
            for part in node.generators:
                self._bind(part.target, Binding("element", inner, part.iter), inner)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, full in imported(node):
                self._add(scope, name, Binding("import", scope, node, full))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, Binding("value", scope, node.value), scope)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._bind(node.target, Binding("value", scope, node.value), scope)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self._bind(node.target, Binding("element", scope, node.iter), scope)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, Binding("value", scope, item.context_expr), scope)
        elif isinstance(node, ast.Call):
            self._call(node)
        for child in ast.iter_child_nodes(node):
            self.read(child, inner)

    def _definition(self, node: Function | ast.Lambda | ast.ClassDef, scope: Scope, inner: Scope) -> None:
        outside: list[ast.AST] = []
        if not isinstance(node, ast.Lambda):
            self._add(scope, node.name, Binding("definition", scope, node))
            outside += node.decorator_list
        if isinstance(node, ast.ClassDef):
            outside += [*node.bases, *node.keywords]
        else:
            arguments = node.args
            outside += [*arguments.defaults, *(default for default in arguments.kw_defaults if default is not None)]
            self.table.of[arguments] = scope
            for parameter in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                self._add(inner, parameter.arg, Binding("parameter", scope, node, parameter.arg))
        for part in outside:
            self.read(part, scope)
        for part in node.body if isinstance(node.body, list) else [node.body]:
            self.read(part, inner)

    def _bind(self, target: ast.expr, binding: Binding, scope: Scope) -> None:
        if isinstance(target, ast.Name):
            self._add(scope, target.id, binding)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for place, part in enumerate(target.elts):
                at = Binding(binding.kind, binding.scope, binding.node, binding.detail, (*binding.path, place))
                self._bind(part, at, scope)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, Binding("value", scope, target), scope)
        elif isinstance(target, ast.Attribute):
            self.table.attributes.setdefault(target.attr, []).append(binding)
        elif isinstance(target, ast.Subscript) and isinstance(binding.node, ast.expr) and not binding.path:
            owner, key = target.value, target.slice
            if isinstance(owner, ast.Name) and isinstance(key, ast.Constant):
                self.table.items.setdefault((owner.id, str(key.value)), []).append(binding.node)

    def _add(self, scope: Scope, name: str, binding: Binding) -> None:
        while isinstance(scope.node, _COMPREHENSIONS) and binding.kind != "element" and scope.parent:
            scope = scope.parent  # a walrus binds outside
        node = scope.node
        if isinstance(node, _FUNCTIONS) and any(
            isinstance(part, ast.Global) and name in part.names for part in node.body
        ):
            scope = self.table.module
        scope.bindings.setdefault(name, []).append(binding)

    def _call(self, node: ast.Call) -> None:
        self.table.calls.setdefault(last_part(node.func), []).append(node)
        function = node.func
        if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
            return
        owner = function.value.id
        if function.attr == "append" and node.args:
            self.table.appended.setdefault(owner, []).append(node.args[0])
        elif function.attr == "update":
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self.table.items.setdefault((owner, keyword.arg), []).append(keyword.value)
            self.table.merged.setdefault(owner, []).extend(node.args)


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """The names that an import binds, and what they stand for in full."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield alias.asname or alias.name, f"{dots}{node.module or ''}.{alias.name}"
        elif alias.asname:
            yield alias.asname, alias.name
        else:
            yield alias.name.split(".")[0], alias.name.split(".")[0]


def last_part(node: ast.expr) -> str:
    """The last name of `a.b.c`; empty for what has none."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""

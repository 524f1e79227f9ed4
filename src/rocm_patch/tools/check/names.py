"""What an expression of a script may stand for, as far as the script alone says.

Nothing is run: a name is followed to what is assigned to it, a call of the script's own function to what that
returns, a parameter to its default and to what the script's own calls hand over. Order and conditions are ignored,
so the answer is a list of what is possible.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check import scopes
from rocm_patch.tools.check.scopes import Binding, Function, Scope, last_part

Definition = Function | ast.ClassDef
FORKED = "multiprocessing.<fork>"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# What hands on, one by one, what it is given.
_PASS_ON = ("enumerate", "zip", "reversed", "sorted", "list", "tuple", "tqdm", "trange", "track", "iter")


class Names:
    """The names of one script."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.table = scopes.read(tree)
        self._values: dict[ast.AST, list[ast.AST]] = {}
        self._dotted: dict[ast.AST, str] = {}
        self._results: dict[Function, list[ast.expr]] = {}
        self._iterated: dict[ast.AST, list[ast.AST]] = {}
        self._definitions: dict[ast.AST, Definition | None] = {}

    def scope(self, node: ast.AST) -> Scope:
        """Where a node is evaluated."""
        return self.table.of.get(node, self.table.module)

    def dotted(self, node: ast.AST) -> str:
        """The full name of what an expression is, `torch.utils.data.DataLoader`; empty if it has none.

        A name that the script nowhere binds, as after `from x import *`, stands for itself.
        """
        if node not in self._dotted:
            self._dotted[node] = ""  # what is defined by itself has no name
            self._dotted[node] = self._find_dotted(node)
        return self._dotted[node]

    def _find_dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            bindings = self.scope(node).find(node.id)
            found = [self._bound_name(binding) for binding in bindings]
            return next(filter(None, found), "") if bindings else node.id
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        if isinstance(node, ast.Call):
            called = self.dotted(node.func)
            if called in ("importlib.import_module", "__import__") and node.args:
                return next(self.texts(node.args[0]), "")
            if called.endswith("get_context") and called.split(".")[0] in ("multiprocessing", "torch", "mp"):
                methods = [text for part in argument(node, 0, "method") for text in self.texts(part)]
                return FORKED if "fork" in methods else "multiprocessing"
        if isinstance(node, ast.IfExp):
            return self.dotted(node.body) or self.dotted(node.orelse)
        return ""

    def _bound_name(self, binding: Binding) -> str:
        if binding.kind == "import":
            return binding.detail
        return self.dotted(binding.node) if binding.kind == "value" and not binding.path else ""

    def values(self, node: ast.AST) -> list[ast.AST]:
        """The expressions, functions and classes that an expression may stand for; itself where nothing is known."""
        if node not in self._values:
            self._values[node] = []
            found = list(dict.fromkeys(self._find_values(node)))
            self._values[node] = found or [node]
        return self._values[node]

    def texts(self, node: ast.AST) -> Iterator[str]:
        """The strings that an expression may be."""
        for value in self.values(node):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value

    def _find_values(self, node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Name):
            for binding in self.scope(node).find(node.id):
                yield from self._bound_values(binding)
        elif isinstance(node, ast.Attribute):
            method = self.definition(node)
            if method is not None:
                yield method
            for binding in self.table.attributes.get(node.attr, []):
                yield from self._bound_values(binding)
        elif isinstance(node, ast.IfExp):
            yield from self.values(node.body)
            yield from self.values(node.orelse)
        elif isinstance(node, ast.BoolOp):
            for part in node.values:
                yield from self.values(part)
        elif isinstance(node, (ast.NamedExpr, ast.Await, ast.Starred)):
            yield from self.values(node.value)
        elif isinstance(node, ast.Subscript):
            yield from self._inside(node)
        elif isinstance(node, ast.Call):
            function = self.definition(node.func)
            returned = self._returned(function) if isinstance(function, _FUNCTIONS) else []
            for part in returned:
                yield from self.values(part)
            if not returned:
                yield node
        else:
            yield node

    def _returned(self, function: Function) -> list[ast.expr]:
        if function not in self._results:
            self._results[function] = list(_returns(function))
        return self._results[function]

    def _bound_values(self, binding: Binding) -> Iterator[ast.AST]:
        if binding.kind == "definition":
            yield binding.node
        elif binding.kind == "parameter":
            yield from self._handed_over(binding)
        elif binding.kind in ("value", "element"):
            found = self._elements(binding.node) if binding.kind == "element" else self.values(binding.node)
            for place in binding.path:
                found = [part for value in found for part in self._at(value, place)]
            yield from found

    def _at(self, value: ast.AST, place: int) -> list[ast.AST]:
        if isinstance(value, (ast.Tuple, ast.List)):
            return self.values(value.elts[place]) if place < len(value.elts) else []
        return [value] if isinstance(value, ast.Call) else []  # `a, b = random_split(...)`: both are of it

    def _elements(self, node: ast.AST) -> list[ast.AST]:
        """What iterating over an expression may give."""
        if node not in self._iterated:
            self._iterated[node] = []  # `x = iter(x)` asks about itself
            self._iterated[node] = self._find_elements(node)
        return self._iterated[node]

    def _find_elements(self, node: ast.AST) -> list[ast.AST]:
        found: list[ast.AST] = []
        for value in self.values(node):
            if isinstance(value, (ast.List, ast.Tuple, ast.Set)):
                found += [inner for part in value.elts for inner in self.values(part)]
            elif isinstance(value, ast.Dict):
                found += [inner for key in value.keys if key is not None for inner in self.values(key)]
            elif isinstance(value, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
                found += self.values(value.elt)
            elif isinstance(value, ast.Call):
                found += self._elements_of_call(value)
        if isinstance(node, ast.Name):
            found += [inner for part in self.table.appended.get(node.id, []) for inner in self.values(part)]
        return found

    def _elements_of_call(self, call: ast.Call) -> list[ast.AST]:
        name = last_part(call.func)
        if isinstance(call.func, ast.Attribute) and name in ("items", "values", "keys"):
            found: list[ast.AST] = []
            for value in self.values(call.func.value):
                for key, item in zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else []:
                    if key is not None and name == "items":
                        found.append(ast.Tuple(elts=[key, item], ctx=ast.Load()))
                    elif key is not None:
                        found += self.values(key if name == "keys" else item)
                if isinstance(value, ast.DictComp) and name == "values":
                    found += self.values(value.value)
            return found
        if name == "enumerate" and call.args:
            number = ast.Name("", ast.Load())
            parts = [part for part in self._elements(call.args[0]) if isinstance(part, ast.expr)]
            return [ast.Tuple([number, part], ast.Load()) for part in parts]
        if name in _PASS_ON and name != "zip" and call.args:
            return self._elements(call.args[0])
        return []

    def _inside(self, node: ast.Subscript) -> Iterator[ast.AST]:
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if isinstance(node.value, ast.Name):
            for put in self.table.items.get((node.value.id, str(key)), []):
                yield from self.values(put)
        for value in self.values(node.value):
            if isinstance(value, ast.Dict):
                known = [k.value for k in value.keys if isinstance(k, ast.Constant)]
                for name, item in zip(value.keys, value.values, strict=True):
                    if key not in known or (isinstance(name, ast.Constant) and name.value == key):
                        yield from self.values(item)
            elif isinstance(value, (ast.List, ast.Tuple)):
                by_place = isinstance(key, int) and -len(value.elts) <= key < len(value.elts)
                for part in [value.elts[key]] if by_place and isinstance(key, int) else value.elts:
                    yield from self.values(part)
            elif isinstance(value, ast.DictComp):
                yield from self.values(value.value)
            elif isinstance(value, ast.ListComp):
                yield from self.values(value.elt)

    def _handed_over(self, binding: Binding) -> Iterator[ast.AST]:
        """A parameter's default, and what the script's own calls give for it."""
        function = binding.node
        if not isinstance(function, (*_FUNCTIONS, ast.Lambda)):
            return
        arguments = function.args
        by_place = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(by_place) - len(arguments.defaults)) + arguments.defaults
        known = dict(zip([part.arg for part in by_place], defaults, strict=True))
        known |= dict(zip([part.arg for part in arguments.kwonlyargs], arguments.kw_defaults, strict=True))
        default = known.get(binding.detail)
        if default is not None:
            yield from self.values(default)
        if isinstance(function, ast.Lambda):
            return
        owner = self.scope(function).node
        is_method = isinstance(owner, ast.ClassDef) and not any(
            last_part(mark) == "staticmethod" for mark in function.decorator_list
        )
        name = owner.name if isinstance(owner, ast.ClassDef) and function.name == "__init__" else function.name
        names = [part.arg for part in by_place]
        place = names.index(binding.detail) - is_method if binding.detail in names else 99
        for call in self.table.calls.get(name, []):
            for part in argument(call, place, binding.detail) if place >= 0 else []:
                yield from self.values(part)

    def definition(self, node: ast.AST) -> Definition | None:
        """The function, method or class of this script that an expression names; None for anything else."""
        if node not in self._definitions:
            self._definitions[node] = None  # `x = x.to(device)` asks about itself
            self._definitions[node] = self._find_definition(node)
        return self._definitions[node]

    def _find_definition(self, node: ast.AST) -> Definition | None:
        if isinstance(node, ast.Name):
            for binding in self.scope(node).find(node.id):
                if isinstance(binding.node, (*_FUNCTIONS, ast.ClassDef)) and binding.kind == "definition":
                    return binding.node
                if binding.kind == "value" and isinstance(binding.node, (ast.Name, ast.Attribute)):
                    return self.definition(binding.node)
        if isinstance(node, ast.Attribute):
            owner = self._class_of(node.value)
            return self.method(owner, node.attr) if owner is not None else None
        return None

    def _class_of(self, node: ast.AST) -> ast.ClassDef | None:
        """The script's own class that an expression is, or is an instance of."""
        if isinstance(node, ast.Name):
            for binding in self.scope(node).find(node.id):
                owner = self.scope(binding.node).node
                if binding.kind == "parameter" and isinstance(owner, ast.ClassDef):
                    arguments = getattr(binding.node, "args", None)
                    if arguments is not None and arguments.args and arguments.args[0].arg == node.id:
                        return owner  # self
        if isinstance(node, ast.Call) and last_part(node.func) == "super":
            scope: Scope | None = self.scope(node)
            while scope is not None and not scope.is_class:
                scope = scope.parent
            bases = self.bases(scope.node) if scope is not None and isinstance(scope.node, ast.ClassDef) else []
            return next((base for base in bases if isinstance(base, ast.ClassDef)), None)
        for value in self.values(node):
            found = self.definition(value.func) if isinstance(value, ast.Call) else value
            if isinstance(found, ast.ClassDef):
                return found
        return None

    def bases(self, owner: ast.ClassDef) -> list[ast.ClassDef | str]:
        """What a class derives from: classes of this script, and full names of others; theirs too."""
        found: list[ast.ClassDef | str] = []
        waiting = list(owner.bases)
        while waiting and len(found) < 50:
            base: ast.expr = waiting.pop(0)
            if isinstance(base, ast.Subscript):  # Dataset[int]
                base = base.value
            own = self.definition(base)
            if isinstance(own, ast.ClassDef):
                found.append(own)
                waiting += own.bases
            else:
                found.append(self.dotted(base))
        return found

    def method(self, owner: ast.ClassDef, name: str) -> Function | None:
        """A method of a class or of those of this script that it derives from."""
        for place in (owner, *(base for base in self.bases(owner) if isinstance(base, ast.ClassDef))):
            for node in place.body:
                if isinstance(node, _FUNCTIONS) and node.name == name:
                    return node
        return None

    def keyword(self, call: ast.Call, name: str) -> list[ast.expr]:
        """What a call gives for a keyword, through `**options` too."""
        found = [keyword.value for keyword in call.keywords if keyword.arg == name]
        for keyword in call.keywords:
            if keyword.arg is None:
                found += self._in_options(keyword.value, name, set())
        return found

    def _in_options(self, options: ast.expr, name: str, seen: set[ast.AST]) -> list[ast.expr]:
        found: list[ast.expr] = []
        if options in seen:
            return found
        seen.add(options)
        for value in self.values(options):
            if isinstance(value, ast.Dict):
                for key, item in zip(value.keys, value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name:
                        found.append(item)
                    elif key is None:  # {**others}
                        found += self._in_options(item, name, seen)
            elif isinstance(value, ast.Call) and last_part(value.func) == "dict":
                found += [keyword.value for keyword in value.keywords if keyword.arg == name]
        if isinstance(options, ast.Name):
            found += self.table.items.get((options.id, name), [])
            for other in self.table.merged.get(options.id, []):
                found += self._in_options(other, name, seen)
        return found


def argument(call: ast.Call, place: int, name: str) -> Iterator[ast.expr]:
    """What a call gives for a parameter, by place or by keyword."""
    before = call.args[: place + 1]
    if place < len(call.args) and not any(isinstance(part, ast.Starred) for part in before):
        yield call.args[place]
    yield from (keyword.value for keyword in call.keywords if keyword.arg == name)


def _returns(function: Function) -> Iterator[ast.expr]:
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.value
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)

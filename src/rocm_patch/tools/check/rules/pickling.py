"""What a loader is given that Python cannot pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check.finding import Finding, Script
from rocm_patch.tools.check.scopes import last_part

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ARGUMENTS = ("dataset", "collate_fn", "worker_init_fn")
# Calls in small letters whose result keeps what they are given.
_KEEPERS = ("random_split", "partial", "list", "tuple", "dict", "set")
_DEEPEST = 8
# Calls whose result cannot be pickled. multiprocessing's locks can be, on their way to a worker.
_HANDLES = frozenset((
    "open", "io.open", "gzip.open", "bz2.open", "lzma.open", "zipfile.ZipFile", "tarfile.open", "h5py.File",
    "lmdb.open", "sqlite3.connect", "psycopg2.connect", "socket.socket", "threading.Lock", "threading.RLock",
    "threading.Condition", "threading.Event", "threading.Semaphore", "netCDF4.Dataset", "rasterio.open",
))  # fmt: skip
# What a dataset keeps in these is made in the worker.
_IN_WORKERS = ("__getitem__", "__getitems__", "__iter__", "__setstate__")


def lambda_to_loader(script: Script) -> Iterator[Finding]:
    """Lambdas, functions and classes without a name of their own in what travels to workers."""
    for node, name, call in _unpicklable_of_loaders(script):
        if isinstance(node, ast.Call):
            continue
        what = (
            "a lambda" if isinstance(node, ast.Lambda) else f"`{getattr(node, 'name', '')}`, defined in a function,"
        )
        yield script.found(
            node,
            "lambda-to-loader",
            f"{what} {_is(name)} the {name} of the DataLoader with workers in {script.at(call.lineno)}",
            "a worker that does not come by fork gets it by pickle, which takes functions and classes by the name "
            "that a module has for them: `Can't pickle ...`",
            "define it with def or class at the top level of a module"
            + ("" if script.is_notebook else f"; rocm-patch run {script.program} sends it by value"),
        )


def handle_to_loader(script: Script) -> Iterator[Finding]:
    """Open files, database handles and locks in what travels to workers."""
    for node, name, call in _unpicklable_of_loaders(script):
        if isinstance(node, ast.Call):
            yield script.found(
                node,
                "handle-to-loader",
                f"what {script.names.dotted(node.func)}() returns {_is(name)} the {name} of the DataLoader with "
                f"workers in {script.at(call.lineno)}",
                "it cannot be pickled, so that workers can only be forked; and forked workers share one position in "
                "the file, one connection to the database",
                "open it in the worker, at its first use or in worker_init_fn; leave locks out",
            )


def _is(argument: str) -> str:
    return "is in" if argument == "dataset" else "is"


def _unpicklable_of_loaders(script: Script) -> Iterator[tuple[ast.AST, str, ast.Call]]:
    """What cannot be pickled, each with the parameter and the loader that it is given to."""
    seen: set[ast.AST] = set()
    for call in sorted(script.loaders.with_workers, key=lambda call: call.lineno):
        if script.loaders.asks_for_fork(call):  # nothing is pickled
            continue
        for name in _ARGUMENTS:
            for part in script.loaders.given(call, name):
                for node in _unpicklable(script, part, 0, set()):
                    if node not in seen:
                        seen.add(node)
                        yield node, name, call


def _unpicklable(script: Script, node: ast.AST, depth: int, seen: set[ast.AST]) -> Iterator[ast.AST]:
    names = script.names
    for value in names.values(node):
        if value in seen or depth > _DEEPEST:
            continue
        seen.add(value)
        if isinstance(value, ast.Lambda):
            yield value
        elif isinstance(value, (*_FUNCTIONS, ast.ClassDef)):
            if names.scope(value).is_function:
                yield value
        elif isinstance(value, (ast.List, ast.Tuple)):
            for part in value.elts:
                yield from _unpicklable(script, part, depth + 1, seen)
        elif isinstance(value, ast.Dict):
            for part in value.values:
                yield from _unpicklable(script, part, depth + 1, seen)
        elif isinstance(value, ast.Call):
            yield from _in_call(script, value, depth, seen)


def _in_call(script: Script, call: ast.Call, depth: int, seen: set[ast.AST]) -> Iterator[ast.AST]:
    """What is in the object that a call makes."""
    name = last_part(call.func)
    own = script.names.definition(call.func)
    if script.names.dotted(call.func) in _HANDLES:
        yield call
        return
    if isinstance(own, ast.ClassDef):
        if script.names.scope(own).is_function and own not in seen:
            seen.add(own)
            yield own
        for base in (own, *(base for base in script.names.bases(own) if isinstance(base, ast.ClassDef))):
            for part in _kept(base):
                yield from _unpicklable(script, part, depth + 1, seen)
        if script.names.method(own, "__init__") is not None:
            return  # what it does not keep does not travel
    if name[:1].isupper() or name in _KEEPERS:
        for part in (*call.args, *(keyword.value for keyword in call.keywords)):
            yield from _unpicklable(script, part, depth + 1, seen)


def _kept(own: ast.ClassDef) -> Iterator[ast.expr]:
    """What a class's methods keep in `self` before it is sent to a worker."""
    waiting: list[ast.AST] = list(own.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, _FUNCTIONS) and (node.name in _IN_WORKERS or node.name.startswith("worker")):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
            for target in node.targets
        ):
            yield node.value
        elif isinstance(node, ast.Call) and last_part(node.func) == "__init__":
            yield from (*node.args, *(keyword.value for keyword in node.keywords))

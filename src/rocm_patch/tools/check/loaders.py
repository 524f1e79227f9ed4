"""Data loaders and worker processes in a script."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rocm_patch.tools.check.names import FORKED, Names, argument
from rocm_patch.tools.check.scopes import Scope, last_part

# Where a parameter of torch's DataLoader stands.
_PLACES = {"dataset": 0, "num_workers": 5, "collate_fn": 6, "worker_init_fn": 10, "multiprocessing_context": 11}
_LIBRARIES = ("torch", "torch_geometric", "torchdata", "monai", "dgl")
_STARTERS = ("Pool", "Manager", "ProcessPoolExecutor", "spawn", "start_processes")
_PROCESS_LIBRARIES = (
    "multiprocessing",
    "torch.multiprocessing",
    "concurrent.futures",
    "mp",
    "billiard",
    "multiprocess",
)
# Methods of libraries that make loaders with workers by themselves.
_TRAINING = {"ultralytics": ("train", "val", "tune"), "transformers": ("train", "evaluate", "predict")}
DATASETS = (
    "Dataset",
    "IterableDataset",
    "MapDataset",
    "VisionDataset",
    "ImageFolder",
    "DatasetFolder",
    "TensorDataset",
)


class Loaders:
    """The loaders of one script.

    Attributes:
        calls: every call that makes a loader.
        with_workers: those that may have worker processes.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.calls = [call for calls in names.table.calls.values() for call in calls if self.makes_loader(call)]
        self.with_workers = {call for call in self.calls if self._has_workers(call)}

    def makes_loader(self, call: ast.Call) -> bool:
        """Whether a call makes a DataLoader: torch's, one that the script derives from it, or a partial of one."""
        return self._is_loader(call.func) or self._partial(call) is not None or self._is_super(call)

    def _is_loader(self, node: ast.AST, depth: int = 0) -> bool:
        own = self.names.definition(node)
        if isinstance(own, ast.ClassDef):
            return depth < 5 and any(
                isinstance(base, str) and is_torch_loader(base) for base in self.names.bases(own)
            )
        return own is None and is_torch_loader(self.names.dotted(node))

    def _is_super(self, call: ast.Call) -> bool:
        """Whether it is `super().__init__(...)` in a class that derives from DataLoader."""
        function = call.func
        if not (isinstance(function, ast.Attribute) and function.attr == "__init__"):
            return False
        scope: Scope | None = self.names.scope(call)
        while scope is not None and not scope.is_class:
            scope = scope.parent
        if scope is None or not isinstance(scope.node, ast.ClassDef):
            return False
        is_super = isinstance(function.value, ast.Call) and last_part(function.value.func) == "super"
        bases = self.names.bases(scope.node)
        return is_super and any(isinstance(base, str) and is_torch_loader(base) for base in bases)

    def _partial(self, call: ast.Call) -> ast.Call | None:
        if not isinstance(call.func, ast.Name):
            return None
        for value in self.names.values(call.func):
            if not isinstance(value, ast.Call) or value is call or last_part(value.func) != "partial":
                continue
            if value.args and self._is_loader(value.args[0]):
                return value
        return None

    def given(self, call: ast.Call, name: str) -> list[ast.expr]:
        """What a loader is given for a parameter of DataLoader."""
        own = self.names.definition(call.func)
        keeps_places = not isinstance(own, ast.ClassDef) or self.names.method(own, "__init__") is None
        place = _PLACES[name] if keeps_places else 99
        found = list(argument(call, place, "")) + self.names.keyword(call, name)
        partial = self._partial(call)
        if partial is not None:
            found += self.names.keyword(partial, name)
        return found

    def _has_workers(self, call: ast.Call) -> bool:
        given = self.given(call, "num_workers")
        own = self.names.definition(call.func)
        if isinstance(own, ast.ClassDef):  # what its __init__ gives DataLoader's
            parts = [node for node in ast.walk(own) if isinstance(node, ast.Call) and self._is_super(node)]
            given += [part for node in parts for part in self.given(node, "num_workers")]
        return any(self._may_be_positive(value) for part in given for value in self.names.values(part))

    def loaders_of(self, node: ast.AST) -> list[ast.Call]:
        """The loaders with workers that an object of the script's own class makes in `train_dataloader` and such."""
        found = []
        for value in self.names.values(node):
            own = self.names.definition(value.func) if isinstance(value, ast.Call) else None
            for method in own.body if isinstance(own, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef) and method.name.endswith("_dataloader"):
                    found += [part for part in ast.walk(method) if part in self.with_workers]
        return [call for call in found if isinstance(call, ast.Call)]

    def _may_be_positive(self, value: ast.AST) -> bool:
        if isinstance(value, ast.Constant):
            return isinstance(value.value, int) and value.value > 0
        if isinstance(value, ast.Attribute):  # arguments.workers: the default that the script gives the option
            defaults = list(self._option_defaults(value.attr))
            return not defaults or any(self._may_be_positive(default) for default in defaults)
        return True

    def _option_defaults(self, name: str) -> Iterator[ast.AST]:
        for call in self.names.table.calls.get("add_argument", []):
            flags = [part.value for part in call.args if isinstance(part, ast.Constant)]
            is_named = any(str(flag).lstrip("-").replace("-", "_") == name for flag in flags)
            destinations = [text for part in argument(call, 99, "dest") for text in self.names.texts(part)]
            if is_named or name in destinations:
                for keyword in call.keywords:
                    if keyword.arg == "default":
                        yield from self.names.values(keyword.value)

    def loaders_in(self, node: ast.AST) -> list[ast.Call]:
        """The loaders with workers that an expression may be."""
        found = []
        for value in self.names.values(node):
            if isinstance(value, ast.Call) and value in self.with_workers:
                found.append(value)
        return found

    def asks_for_fork(self, call: ast.Call) -> bool:
        """Whether a loader says itself that its workers are forked."""
        return any(is_fork(self.names, part) for part in self.given(call, "multiprocessing_context"))

    def starts_process(self, call: ast.Call) -> bool:
        """Whether a call starts processes that are not a loader's: a pool, a manager, `process.start()`."""
        if last_part(call.func) == "start" and isinstance(call.func, ast.Attribute):
            values = self.names.values(call.func.value)
            return any(isinstance(value, ast.Call) and self.makes_process(value, ("Process",)) for value in values)
        return self.makes_process(call, _STARTERS)

    def makes_process(self, call: ast.Call, kinds: tuple[str, ...] = ("Process", *_STARTERS)) -> bool:
        """Whether a call makes a process of multiprocessing, or what consists of such, and not by fork."""
        home, _, name = self.names.dotted(call.func).rpartition(".")
        return name in kinds and home in _PROCESS_LIBRARIES

    def trains_with_workers(self, call: ast.Call) -> bool:
        """Whether a call is the training of a library that makes loaders with workers by itself.

        ultralytics has 8 workers unless told otherwise, transformers as many as TrainingArguments say.
        """
        if not isinstance(call.func, ast.Attribute):
            return False
        for made in self.names.values(call.func.value):
            home = self.names.dotted(made.func).split(".")[0] if isinstance(made, ast.Call) else ""
            if not isinstance(made, ast.Call) or call.func.attr not in _TRAINING.get(home, ()):
                continue
            if home == "ultralytics":
                given = self.names.keyword(call, "workers") or [ast.Constant(8)]
            else:
                settings = [value for part in argument(made, 1, "args") for value in self.names.values(part)]
                calls = [value for value in settings if isinstance(value, ast.Call)]
                given = [part for value in calls for part in self.names.keyword(value, "dataloader_num_workers")]
            if any(self._may_be_positive(value) for part in given for value in self.names.values(part)):
                return True
        return False

    def has_processes(self) -> bool:
        """Whether there are worker processes of any kind, forks among them."""
        calls = (call for calls in self.names.table.calls.values() for call in calls)
        return bool(self.with_workers) or any(
            self.makes_process(call)
            or self.names.dotted(call.func) in ("os.fork", f"{FORKED}.Process", f"{FORKED}.Pool")
            or last_part(call.func) == "set_start_method"
            for call in calls
        )


def is_torch_loader(name: str) -> bool:
    """Whether a full name is that of a DataLoader; a bare one comes from `import *`, or from outside a snippet."""
    first, last = name.split(".")[0], name.split(".")[-1]
    return last in ("DataLoader", "StatefulDataLoader") and (name == last or first in _LIBRARIES)


def is_fork(names: Names, node: ast.AST) -> bool:
    """Whether a start method or a context is fork."""
    return "fork" in names.texts(node) or any(names.dotted(value) == FORKED for value in names.values(node))

"""The state of a process that scripts rely on, taken along to workers that are no forks of it."""

from __future__ import annotations

import gc
import locale
import logging
import os
import resource
import signal
import socket
import sys
import types
import warnings
from typing import Any

from rocm_patch.workers import installed

_DATA = (bool, int, float, complex, str, bytes, type(None))
_LIMITS = ("RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_MEMLOCK",
           "RLIMIT_NPROC", "RLIMIT_STACK")  # fmt: skip
_CONTAINERS = (tuple, list, set, frozenset, dict)


def captured(modules: set[str]) -> dict[str, Any]:
    """What a forked worker would have from this process. Everything in it can be pickled.

    Args:
        modules: names of modules whose changed settings matter, beside the user's own.
    """
    state: dict[str, Any] = {
        "environ": dict(os.environ),
        "umask": _umask(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "blocked_signals": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "recursion": sys.getrecursionlimit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "socket_timeout": socket.getdefaulttimeout(),
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "warnings": _plain_warnings(),
        "log": _log_levels(),
        "settings": _module_settings(modules),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = _of_torch(torch)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy_errors"] = numpy.geterr()
    cv2 = sys.modules.get("cv2")
    if cv2 is not None and hasattr(cv2, "getNumThreads"):
        state["cv2_threads"] = cv2.getNumThreads()
    return state


def apply_first(state: dict[str, Any]) -> None:
    """In a worker, before it imports or loads anything: what imports may look at."""
    os.environ.clear()
    os.environ.update(state["environ"])
    if state["umask"] is not None:
        os.umask(state["umask"])
    os.sched_setaffinity(0, state["affinity"])
    for name, limits in state["limits"].items():
        if resource.getrlimit(getattr(resource, name)) != limits:
            resource.setrlimit(getattr(resource, name), limits)
    if os.getpriority(os.PRIO_PROCESS, 0) != state["niceness"]:
        os.setpriority(os.PRIO_PROCESS, 0, state["niceness"])
    signal.pthread_sigmask(signal.SIG_SETMASK, state["blocked_signals"])
    sys.setrecursionlimit(state["recursion"])
    socket.setdefaulttimeout(state["socket_timeout"])
    try:
        locale.setlocale(locale.LC_ALL, state["locale"])
    except locale.Error:  # made up of categories that cannot be set together again
        locale.setlocale(locale.LC_ALL, "")


def apply_to_libraries(state: dict[str, Any]) -> None:
    """In a worker, when what the server imported is there and before the dataset is loaded."""
    for name, level in state["log"].items():
        logging.getLogger(name).setLevel(level)
    if "torch" in state:
        import torch

        _apply_to_torch(torch, state["torch"])
    apply_settings(state)
    # After all imports, which add filters of their own.
    filters: Any = warnings.filters
    filters[:] = [
        (action, _pattern(message), category, _pattern(module), line)
        for action, message, category, module, line in state["warnings"]
    ]


def apply_settings(state: dict[str, Any]) -> None:
    """In a worker, again when the dataset is loaded: the names of those modules that have been imported by then."""
    for name, settings in state["settings"].items():
        module = sys.modules.get(name)
        if module is not None:
            for key, value in settings.items():
                here = getattr(module, key, _ABSENT)
                if type(here) is not type(value) or here != value:
                    setattr(module, key, value)
    cv2 = sys.modules.get("cv2")
    if cv2 is not None and "cv2_threads" in state:
        cv2.setNumThreads(state["cv2_threads"])
    if "numpy_errors" in state:
        import numpy

        numpy.seterr(**state["numpy_errors"])
    is_enabled, thresholds = state["garbage"]
    gc.set_threshold(*thresholds)
    (gc.enable if is_enabled else gc.disable)()


_ABSENT = object()


def _umask() -> int | None:
    """Without changing it, as os.umask would."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as lines:
        return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), None)


def _plain_warnings() -> list[Any]:
    return [
        (action, _text(message), category, _text(module), line)
        for action, message, category, module, line in warnings.filters
        if isinstance(category, type) and category.__module__ in ("builtins", "warnings")
    ]


def _text(pattern: Any) -> Any:
    return pattern if pattern is None or isinstance(pattern, str) else (pattern.pattern, pattern.flags)


def _pattern(text: Any) -> Any:
    import re

    return re.compile(*text) if isinstance(text, tuple) else text


def _log_levels() -> dict[str, int]:
    levels = {"": logging.root.level}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level:
            levels[name] = logger.level
    return levels


def _module_settings(modules: set[str]) -> dict[str, dict[str, Any]]:
    """Plain data among the names of modules: all of the user's own modules; the public, unchangeable kind of others.

    `config.SIZE = 64` and `PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True` are such. What a package keeps under private
    names, or in containers, tells of things that it has done in this process, not of what the user wants.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name in ("__main__", "__mp_main__"):
            continue
        names = list(vars(module).items())  # at once: another thread may import
        if installed.is_users(name):
            settings = {key: value for key, value in names if key[:2] != "__" and is_data(value)}
        elif name in modules and not installed.is_standard(name):
            settings = {key: value for key, value in names if key[:1] != "_" and type(value) in _DATA}
        else:
            continue
        if settings:
            found[name] = settings
    return found


def is_data(value: Any, depth: int = 0) -> bool:
    """Whether a value is a number, a text or the like, or a container of nothing else."""
    if type(value) in _DATA:
        return True
    if type(value) not in _CONTAINERS or depth > 4 or len(value) > 10_000:
        return False
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return all(is_data(part, depth + 1) for part in parts)


def _of_torch(torch: Any) -> dict[str, Any]:
    state = {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }
    multiprocessing = sys.modules.get("torch.multiprocessing")
    if multiprocessing is not None:
        state["sharing"] = multiprocessing.get_sharing_strategy()
    if hasattr(torch, "get_default_device"):
        state["device"] = str(torch.get_default_device())
    if hasattr(torch, "get_float32_matmul_precision"):
        state["precision"] = torch.get_float32_matmul_precision()
    return state


def _apply_to_torch(torch: Any, state: dict[str, Any]) -> None:
    """What differs only: some of torch's setters import half of its compiler."""
    here = _of_torch(torch)
    if here["dtype"] != state["dtype"]:
        torch.set_default_dtype(state["dtype"])
    torch.set_grad_enabled(state["grad"])
    if (here["deterministic"], here["warn_only"]) != (state["deterministic"], state["warn_only"]):
        _set_deterministic(torch, state["deterministic"], warn_only=state["warn_only"])
    if "sharing" in state and here.get("sharing") != state["sharing"]:
        torch.multiprocessing.set_sharing_strategy(state["sharing"])
    if here.get("device") != state.get("device"):
        torch.set_default_device(state["device"])
    if here.get("precision") != state.get("precision"):
        torch.set_float32_matmul_precision(state["precision"])


def _set_deterministic(torch: Any, is_on: bool, *, warn_only: bool) -> None:
    """As torch.use_deterministic_algorithms, which in torch 2.13 imports the compiler to tell it: seconds per worker.

    A compiler that has been imported is told here too.
    """
    torch._C._set_deterministic_algorithms(is_on, warn_only=warn_only)
    inductor = sys.modules.get("torch._inductor.config")
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = is_on  # type: ignore[union-attr]

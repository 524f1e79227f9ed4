"""What the user asked for: the `ROCM_PATCH_*` variables, checked once, in one place.

The same names serve as options of `rocm-patch run` and as arguments of `enable_all_patches()`.
Standard library only: this module rides in every patched child process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rocm_patch.errors import UsageError

LOGGER = logging.getLogger("rocm_patch")

BACKENDS = ("auto", "hip", "cuda", "cpu")
POLICIES = ("bypass", "guarded", "native")
# The names in conv.STRATEGIES; a test holds the two together.
STRATEGY_NAMES = (
    "pointwise", "fused_winograd", "direct", "implicit_gemm_128", "implicit_gemm_64", "implicit_gemm_32",
    "implicit_gemm_16", "columns", "winograd_f43", "winograd_f23", "depthwise", "grouped", "taps", "im2col",
)  # fmt: skip
START_METHODS = ("spawn", "forkserver", "fork")
# Of loaders' workers: `auto` is the fork server, and fork where that cannot be.
LOADER_METHODS = ("auto", *START_METHODS)
PROFILES = ("auto", "document", "none")
LOG_LEVELS = ("debug", "info", "warning", "error")


_WORKSPACE_HINT = (
    "give bytes, or a number with K, M or G: ROCM_PATCH_WORKSPACE=512M, --workspace 512M, workspace='512M'"
)
_OFF = ("0", "off", "false", "no")


@dataclass(frozen=True)
class Settings:
    """One user's choices. `None` and `auto` leave the choice to the machine's facts.

    Attributes:
        enabled: False switches everything off (`ROCM_PATCH=0`).
        backend: whose tensors the convolution override serves: `auto`, `hip`, `cuda` or `cpu`.
        conv: a policy (`bypass`, `guarded`, `native`) or the name of a strategy, which implies `bypass`.
        start_method: how worker processes start, when the user gave one.
        profile: which environment plan applies: `auto` (by the card found), `document` (the four variables
            of `docs/PATCHES_V1.1_SUMMARY.md` on any card) or `none`.
        sysfs_root: a folder that stands for `/` when hardware is read.
        workspace: bytes that one convolution may take beyond its operands and result; None for the smaller of 1 GiB
            and a tenth of the device's memory.
        exact: leave out algorithms whose error is larger than that of matrix products: Winograd's.
        fault: `kind:direction[:after=N]`, a failure put into native convolutions; for tests and demonstrations.
        hang_limit: seconds without progress after which a convolution counts as hung.
        busy_limit: seconds in all after which it does, though it takes processor time or compiles.
        log: level of the `rocm_patch` logger on stderr.
    """

    enabled: bool = True
    backend: str = "auto"
    conv: str | None = None
    start_method: str | None = None
    profile: str = "auto"
    sysfs_root: str = "/"
    workspace: int | None = None
    exact: bool = False
    fault: str | None = None
    hang_limit: float = 60.0
    busy_limit: float = 1200.0
    log: str | None = None

    def __post_init__(self) -> None:
        check("backend", self.backend, BACKENDS)
        check("conv", self.conv, (*POLICIES, *STRATEGY_NAMES))
        check("start_method", self.start_method, LOADER_METHODS)
        check("profile", self.profile, PROFILES)
        check("log", self.log, LOG_LEVELS)
        for field in ("hang_limit", "busy_limit"):
            value = getattr(self, field)
            if not 0 < value < float("inf"):
                raise UsageError(
                    f"{field.replace('_', ' ')} {value:g} is not a time to wait for",
                    f"give seconds, {variable(field)}=60",
                )
        if self.workspace is not None and self.workspace < 1:
            raise UsageError(f"a workspace of {self.workspace} bytes is none", _WORKSPACE_HINT)

    def replaced(self, **asked: Any) -> Settings:
        """These settings with every argument that is not None put in; raises `UsageError` on an unknown value."""
        return dataclasses.replace(self, **{name: value for name, value in asked.items() if value is not None})


def variable(field: str) -> str:
    """The environment variable of a `Settings` field."""
    return "ROCM_PATCH" if field == "enabled" else f"ROCM_PATCH_{field.upper()}"


def check(what: str, value: str | None, legal: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is None or one of `legal`."""
    if value is not None and value not in legal:
        raise UsageError(
            f"unknown {what.replace('_', ' ')} {value!r}; it can be {', '.join(legal)}",
            f"give one of these as {what}=, --{what.replace('_', '-')} or {variable(what)}=",
        )


def from_environ(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that the environment asks for.

    Raises:
        UsageError: a variable holds a value that rocm-patch does not know.
    """
    given = os.environ if environ is None else environ
    asked: dict[str, Any] = {"enabled": given.get("ROCM_PATCH", "1").lower() not in _OFF}
    for field in dataclasses.fields(Settings):
        value = given.get(variable(field.name))
        if field.name in ("hang_limit", "busy_limit") and value:
            asked[field.name] = _seconds(field.name, value)
        elif field.name == "workspace" and value:
            asked[field.name] = parse_bytes(value)
        elif field.name == "exact":
            asked[field.name] = (value or "0").lower() not in _OFF
        elif field.name != "enabled" and value:
            asked[field.name] = value if field.name in ("sysfs_root", "fault") else value.lower()
    return Settings(**asked)


def parse_bytes(text: str | int) -> int:
    """A number of bytes from `512M`, `2GiB`, `1048576` or an int; K, M and G are powers of 1024.

    Raises:
        UsageError: the text is no such number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmg]?)(?:i?b)?", str(text).strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is not a size", _WORKSPACE_HINT)
    return int(float(found[1]) * 1024 ** " kmg".index(found[2] or " "))


def _seconds(field: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(
            f"{variable(field)}={value!r} is not a number", f"{variable(field)}=60, in seconds"
        ) from None


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is now, as `logging.lastResort` does, so that redirection works."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"rocm-patch: {self.format(record)}\n")
        except Exception:  # noqa: BLE001  (logging's contract: a handler reports its own failures)
            self.handleError(record)


def show_log(level: str) -> None:
    """Send the `rocm_patch` logger to stderr from `level` on; a second call only changes the level."""
    if not any(isinstance(handler, _StderrHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_StderrHandler())
        LOGGER.propagate = False
    LOGGER.setLevel(level.upper())

"""What is known of cards, variables, versions and failures: TOML files, read into frozen records.

Every row names its sources and says whether it was verified in one of them; `docs/CATALOG.md` says what each field
means and how to add a row. Reading is strict: an unknown, missing or mistyped field is a `CatalogError` that names
the row, so a slip in the data cannot become a wrong plan.
"""

from __future__ import annotations

import sys
import typing
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rocm_patch.errors import RocmPatchError

_FOLDER = Path(__file__).parent


class CatalogError(RocmPatchError):
    """A file of the catalog does not hold what its records ask for."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "install rocm-patch again; if you edited the catalog, see docs/CATALOG.md")


@dataclass(frozen=True)
class Row:
    """What every row of the catalog has.

    Attributes:
        sources: addresses, or `repository@tag:path`, or what was measured and where.
        verified: whether the row's statements were read in those sources; False for inferences and weak reports.
    """

    sources: tuple[str, ...]
    verified: bool


@dataclass(frozen=True, kw_only=True)
class Arch(Row):
    """One GPU architecture.

    Attributes:
        gfx: LLVM's target name, `gfx1010`.
        version: the kernel driver's `gfx_target_version`, 100100.
        products: what the cards are called in shops, one entry per chip.
        generation: `RDNA1`, `CDNA3`, `GCN5.0`.
        integrated: whether the chip is part of a CPU (an APU).
        support: AMD's position, in words.
        override: value of `HSA_OVERRIDE_GFX_VERSION` that lets a build without native code run, empty for none.
        override_max_torch: last torch release with which the override is known to work, empty for any.
        override_max_rocm: last ROCm release with which it is, empty for any.
        override_with: further variables that reports set beside the override, `NAME=value`.
        override_note: what is known of the override.
        harmful_overrides: values that are reported to crash or hang this chip.
        wheels_from: first torch release whose pytorch.org ROCm wheels carry native code, empty for never.
        wheels_until: last such release, empty for "still".
        wheels_note: what else is known of the wheels.
        native_index: AMD's own wheel index (TheRock): `ready`, `builds` (no promise at run time) or `no`.
        miopen_databases: stems of the database files that MIOpen ships for it, `gfx1030_36`; empty for none known.
        generic: LLVM's generic target that covers it, `gfx10-1-generic`, empty for none.
        policy: convolution policy on this chip: `bypass` or `guarded`.
        bypass_dtypes: under `guarded`, the types whose native convolutions are known to crash here.
        policy_note: why.
        device_ids: PCI device ids; old kernels name the chip by these alone.
        since_rocm: first ROCm release whose runtime knows the chip, empty where every release concerned does; an
            older one leaves the GPU out.
        min_kernel: first Linux release on which the chip is reported to work, empty where any does.
    """

    gfx: str
    version: int
    products: tuple[str, ...]
    generation: str
    integrated: bool
    support: str
    override: str
    override_note: str
    wheels_from: str
    native_index: str
    policy: str
    policy_note: str
    override_max_torch: str = ""
    override_max_rocm: str = ""
    override_with: tuple[str, ...] = ()
    harmful_overrides: tuple[str, ...] = ()
    wheels_until: str = ""
    wheels_note: str = ""
    miopen_databases: tuple[str, ...] = ()
    generic: str = ""
    bypass_dtypes: tuple[str, ...] = ()
    device_ids: tuple[int, ...] = ()
    since_rocm: str = ""
    min_kernel: str = ""


@dataclass(frozen=True, kw_only=True)
class Variable(Row):
    """One environment variable.

    Attributes:
        name: as in the environment; `<N>` stands for a number.
        component: who reads it.
        meaning: what its values do, one or two sentences.
        default: what holds when it is unset.
        legal: regular expression that a whole value must match to be understood, empty for any value.
        inert: regular expression of values that change nothing, because they are the default; empty for none.
        since_rocm: first ROCm release that knows it, empty where every release concerned does.
        since_torch: first torch release that knows it.
        debugging: why it should not be left set, empty for variables that may be.
        read_late: whether it may still be set after torch is imported; the others are read once, early.
    """

    name: str
    component: str
    meaning: str
    default: str
    legal: str = ""
    inert: str = ""
    since_rocm: str = ""
    since_torch: str = ""
    debugging: str = ""
    read_late: bool = False


@dataclass(frozen=True, kw_only=True)
class Release(Row):
    """One torch release as ROCm wheels of pytorch.org exist for it.

    Attributes:
        torch: `1.13`: the release series, without the patch level where all agree.
        rocm: ROCm versions that wheels were built for, oldest first.
        python: first and last Python, `("3.7", "3.10")`.
        numpy: requirement in the form of a version specifier, `<2`.
        archs: gfx targets that the wheels carry.
        note: what else is known.
    """

    torch: str
    rocm: tuple[str, ...]
    python: tuple[str, ...]
    numpy: str
    archs: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class KnownIssue(Row):
    """One failure that users report.

    Attributes:
        id: name for ever; removed names stay reserved.
        title: the failure in words.
        symptoms: regular expressions, any of which betrays it in a log; empty where nothing is printed.
        archs: gfx targets concerned, `*` for any.
        versions: where it is seen.
        cause: what is known.
        workaround: what helps, in words.
        fix: the command or setting that does it, empty where there is none.
        confirmed: whether users confirmed the workaround.
    """

    id: str
    title: str
    symptoms: tuple[str, ...]
    archs: tuple[str, ...]
    versions: str
    cause: str
    workaround: str
    confirmed: bool
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Hazard(Row):
    """Machine code that some chips cannot run, or run wrongly.

    Attributes:
        id: name for ever; removed names stay reserved.
        title: what it is, in words.
        archs: the chips concerned.
        code: generation of the code in which it is looked for: `gfx9`, `gfx10` or `gfx11`.
        kind: `encoding`, the chip has no such instruction, or `bug`, the chip has a fault that the code does not work
            around.
        effect: what comes of it: `hang`, `page fault`, `illegal instruction`, `wrong values`.
        feature: LLVM's name of the chip's feature, for an encoding that of the feature that the chip lacks.
        instructions: `FORMAT OPCODE MNEMONIC` of each instruction that is one; empty where a check finds it.
        check: name of a check of sequences (`scan/flow.py`); empty where the instruction alone is enough.
        targets: the targets in whose code the opcodes mean this; empty for every one of the generation.
    """

    id: str
    title: str
    archs: tuple[str, ...]
    code: str
    kind: str
    effect: str
    feature: str
    instructions: tuple[str, ...] = ()
    check: str = ""
    targets: tuple[str, ...] = ()


_Row = TypeVar("_Row", bound=Row)


@cache
def archs() -> tuple[Arch, ...]:
    """Every known architecture, oldest first."""
    return read_rows(_FOLDER / "archs.toml", "arch", Arch)


@cache
def variables() -> tuple[Variable, ...]:
    """Every known environment variable."""
    return read_rows(_FOLDER / "variables.toml", "variable", Variable)


@cache
def releases() -> tuple[Release, ...]:
    """The version matrix, oldest first."""
    return read_rows(_FOLDER / "releases.toml", "release", Release)


@cache
def issues() -> tuple[KnownIssue, ...]:
    """Every known failure; the more particular ones come first."""
    return read_rows(_FOLDER / "issues.toml", "issue", KnownIssue)


@cache
def hazards() -> tuple[Hazard, ...]:
    """Everything that is looked for in machine code; the worst comes first."""
    return read_rows(_FOLDER / "hazards.toml", "hazard", Hazard)


def arch(gfx: str) -> Arch | None:
    """The architecture of that LLVM name, None if it is unknown."""
    return next((row for row in archs() if row.gfx == gfx), None)


def targets_of(chip: str) -> tuple[str, ...]:
    """The targets whose code a chip takes for its own: itself, and the generic one that covers it."""
    known = arch(chip)
    return (chip, known.generic) if known and known.generic else (chip,)


def variable(name: str) -> Variable | None:
    """The environment variable of that name; `NAME_1` finds `NAME_<N>`."""
    stem, _, number = name.rpartition("_")
    numbered = f"{stem}_<N>" if number.isdecimal() else name
    return next((row for row in variables() if row.name in (name, numbered)), None)


def read_rows(path: Path, table: str, kind: type[_Row]) -> tuple[_Row, ...]:
    """The rows of one file: an array of tables named `table` and nothing else.

    Raises:
        CatalogError: the file cannot be read, or a row has an unknown, missing or mistyped field.
    """
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ImportError) as error:
        raise CatalogError(f"cannot read {path}: {error}") from error
    if set(content) != {table}:
        raise CatalogError(f"{path}: expected [[{table}]] tables only, found {sorted(content)}")
    types = typing.get_type_hints(kind)
    return tuple(_row(path, number, row, kind, types) for number, row in enumerate(content[table], start=1))


def _parsed(text: str) -> dict[str, Any]:
    # Here and not above: a Python 3.10 without tomli must still be able to import this module and say so.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _row(path: Path, number: int, row: dict[str, Any], kind: type[_Row], types: dict[str, Any]) -> _Row:
    where = f"{path.name}, row {number}"
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if wrong := sorted((set(row) - set(types)) | (required - set(row))):
        raise CatalogError(f"{where}: unknown or missing: {', '.join(wrong)}")
    values: dict[str, Any] = {}
    for name, value in row.items():
        item_type = typing.get_args(types[name])[:1]
        if item_type and isinstance(value, list) and all(type(item) is item_type[0] for item in value):
            values[name] = tuple(value)
        elif not item_type and type(value) is types[name]:
            values[name] = value
        else:
            raise CatalogError(f"{where}: {name} = {value!r} is not a {types[name]}")
    return kind(**values)

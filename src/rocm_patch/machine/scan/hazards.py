"""Which kernels of a code object a card cannot run safely, by the rules in the catalog (`hazards.toml`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from rocm_patch.machine import catalog
from rocm_patch.machine.catalog import Hazard
from rocm_patch.machine.scan import flow, isa, opcodes
from rocm_patch.machine.scan.elf import CodeObject

# Of kernels with hazards so many are named for each library; the counts are of all.
MOST_NAMED = 20_000


@dataclass(frozen=True)
class Kernel:
    """A function with at least one hazard.

    Attributes:
        name: as in the file.
        hazards: id of the rule to the number of places.
    """

    name: str
    hazards: dict[str, int]

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """Sorts the worst first: what cannot be encoded, then the number of rules and of places."""
        cannot = not self.hazards.keys().isdisjoint(_encodings())
        return (not cannot, -len(self.hazards), -sum(self.hazards.values()), self.name)


@cache
def _encodings() -> frozenset[str]:
    return frozenset(row.id for row in catalog.hazards() if row.kind == "encoding")


@dataclass
class Examination:
    """What the examination of code has found, for one card.

    Attributes:
        examined: functions whose code was decoded: kernels, and what they call.
        called: those of them that are no kernels.
        undecoded: those that are for a generation for which there is no decoder here.
        cannot_encode: of those examined, kernels with an instruction that the card has not.
        with_bug: kernels without such, but with a known hardware bug without its work-around.
        places: id of the rule to the number of places in all.
        kernels_by_rule: id of the rule to the number of kernels.
        kernels: those with hazards, at most `MOST_NAMED`.
    """

    examined: int = 0
    called: int = 0
    undecoded: int = 0
    cannot_encode: int = 0
    with_bug: int = 0
    places: dict[str, int] = field(default_factory=dict)
    kernels_by_rule: dict[str, int] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def clean(self) -> int:
        """Functions in which nothing was found."""
        return self.examined - self.cannot_encode - self.with_bug

    @property
    def is_harmful(self) -> bool:
        """Whether anything was found."""
        return bool(self.cannot_encode or self.with_bug)

    def add(self, other: Examination) -> None:
        """Count in what was found elsewhere."""
        self.examined += other.examined
        self.called += other.called
        self.undecoded += other.undecoded
        self.cannot_encode += other.cannot_encode
        self.with_bug += other.with_bug
        for ours, theirs in ((self.places, other.places), (self.kernels_by_rule, other.kernels_by_rule)):
            for rule, count in theirs.items():
                ours[rule] = ours.get(rule, 0) + count
        self.kernels += other.kernels[: MOST_NAMED - len(self.kernels)]


def rules_for(card: str, target: str) -> tuple[Hazard, ...]:
    """The rules for code of one target on a card."""
    generation = isa.generation_of(target)
    return tuple(
        row
        for row in catalog.hazards()
        if card in row.archs and row.code == generation and (not row.targets or target in row.targets)
    )


def examine(code: bytes, read: CodeObject, card: str) -> Examination:
    """Look through every function of a code object.

    Args:
        code: the ELF file.
        read: what `elf.read_code_object` says of it.
        card: the chip that would run it, `gfx1010`.
    """
    found = Examination()
    generation = isa.generation_of(read.target)
    if generation is None:
        found.undecoded = len(read.functions)
        return found
    rules = rules_for(card, read.target)
    known: dict[tuple[int, int, bool], dict[str, int]] = {}  # linkers give equal kernels one code
    for function in read.functions:
        found.examined += 1
        found.called += not function.is_kernel
        key = (function.start, function.size, function.is_wave32)
        if key not in known:
            words = isa.big_endian(code[function.start : function.start + function.size]) if rules else b""
            known[key] = _places(words, rules, generation, function.is_wave32) if words else {}
        if known[key]:
            found.add(_of_one(Kernel(function.name, dict(known[key])), rules))
    return found


def _places(words: bytes, rules: Sequence[Hazard], generation: str, is_wave32: bool) -> dict[str, int]:
    """Rule to the number of places in one function's code."""
    places = _single(words, rules, generation)
    if any(rule.check for rule in rules):
        for check, where in flow.find(words, is_wave32).items():
            for rule in rules:
                if rule.check == check:
                    places[rule.id] = places.get(rule.id, 0) + len(where)
    return places


def _of_one(kernel: Kernel, rules: Iterable[Hazard]) -> Examination:
    cannot = any(rule.kind == "encoding" for rule in rules if rule.id in kernel.hazards)
    return Examination(
        0, 0, 0, int(cannot), int(not cannot), dict(kernel.hazards), dict.fromkeys(kernel.hazards, 1), [kernel]
    )


def _single(words: bytes, rules: Sequence[Hazard], generation: str) -> dict[str, int]:
    """Rule to the number of its instructions in one function."""
    counts: dict[str, int] = {}
    numbered = tuple(rule for rule in rules if rule.instructions)
    pattern = _pattern(numbered, generation)
    if pattern is not None:
        for match in pattern.finditer(words):
            if match.lastindex:
                rule = numbered[match.lastindex - 1].id
                counts[rule] = counts.get(rule, 0) + 1
    return counts


@cache
def _pattern(rules: tuple[Hazard, ...], generation: str) -> re.Pattern[bytes] | None:
    """A run of instructions that no rule names, and one that a rule does, with a group for each rule."""
    if not rules:
        return None
    heads = [b"|".join(opcodes.head(generation, *_parsed(text)) for text in rule.instructions) for rule in rules]
    any_one = b"|".join(isa.formats(generation).values()) + rb"|[\x00-\xff]{4}"
    wanted = b"|".join(b"((?=%s)(?:%s))" % (head, any_one) for head in heads)
    # Long runs are taken in pieces, since the matcher remembers each step of one.
    return re.compile(b"(?:(?!%s)(?:%s)){1,1000}|%s" % (b"|".join(heads), any_one, wanted))


def _parsed(text: str) -> tuple[str, int]:
    name, opcode, _ = text.split(None, 2)
    return name, int(opcode, 16)

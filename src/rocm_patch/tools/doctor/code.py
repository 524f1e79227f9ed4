"""What GPU code the libraries carry for each card, and what of it the card cannot run safely, as scanned before."""

from __future__ import annotations

from collections.abc import Iterable

from rocm_patch.machine import catalog, fit
from rocm_patch.machine.scan import hazards, places, scanning
from rocm_patch.tools.doctor.finding import Context, Finding, failure, ok, warning
from rocm_patch.trust.fingerprint import override_for

_NAMED = 3


def scanned_code(context: Context) -> Iterable[Finding]:
    """Which libraries serve each card, natively or through an override, and which kernels it cannot run safely."""
    for entry in context.used:
        card = entry.gpu.gfx
        override = override_for(entry.gpu, context.planned)
        question = scanning.Question(card, override)
        where = places.default_places(
            context.build.folder if context.build else None, context.environ, str(context.root)
        )
        found = scanning.scan(where, question, context.environ, only_remembered=True)
        libraries = [library for library in found.libraries if library.has_code]
        if not libraries:
            if hazards.rules_for(card, question.reported):
                summary = f"{card}: what its code for {question.reported} does on this card has not been looked at"
                yield ok(summary, fix="rocm-patch scan")
            continue
        yield _served(card, libraries)
        yield from _harmful(card, question, libraries)


def _served(card: str, libraries: list[scanning.Library]) -> Finding:
    by_kind: dict[str, list[str]] = {}
    for library in libraries:
        by_kind.setdefault(library.answer(card)[0], []).append(library.name)
    words = {
        "native": f"native for {card}", "compiled": "compiled when loaded", "override": "only through an override",
        "none": f"none for {card}",
    }  # fmt: skip
    parts = [f"{words[kind]}: {_names(by_kind[kind])}" for kind in words if kind in by_kind]
    return ok(f"GPU code of {len(libraries)} libraries; {'; '.join(parts)}", source="rocm-patch scan")


def _harmful(card: str, question: scanning.Question, libraries: list[scanning.Library]) -> Iterable[Finding]:
    harm = hazards.Examination()
    guilty = []
    for library in libraries:
        found = library.harm(question)
        harm.add(found)
        if found.is_harmful:
            guilty.append(library.name)
    if not harm.examined:
        return
    if not harm.is_harmful:
        yield ok(f"{card}: nothing is known against its {harm.examined:,} kernels for {question.reported}")
        return
    rules = {row.id: row for row in catalog.hazards()}
    effects = sorted({rules[rule].effect for rule in harm.places if rule in rules})
    summary = (
        f"{harm.cannot_encode + harm.with_bug:,} of {harm.examined:,} kernels for {question.reported} cannot run "
        f"safely on {card}: {', '.join(f'{n:,} with {rule}' for rule, n in sorted(harm.kernels_by_rule.items()))}"
    )
    why = f"what may come of it: {', '.join(effects)}; in {_names(guilty)}"
    source = "; ".join(
        dict.fromkeys(text for rule in harm.places if rule in rules for text in rules[rule].sources[:1])
    )
    is_better = question.reported != card and fit.has_native_wheel(card)
    mend = fit.native_torch_command(card) if is_better else "rocm-patch scan --kernels"
    yield (failure if harm.cannot_encode and not is_better else warning)(summary, why, mend, source)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


CHECKS = (scanned_code,)

"""What GPU code the libraries carry for each card, and what of it the card cannot run safely, as scanned before."""

from __future__ import annotations

from collections.abc import Iterable

from rocm_patch.machine import catalog, fit
from rocm_patch.machine.scan import hazards, places, scanning
from rocm_patch.machine.visibility import visible_gpus
from rocm_patch.tools.doctor.finding import Context, Finding, ok, warning
from rocm_patch.trust.fingerprint import override_for

_NAMED = 3


def scanned_code(context: Context) -> Iterable[Finding]:
    """Which libraries serve each card, natively or through an override, and which kernels it cannot run safely."""
    gpus = [entry.gpu for entry in context.used] or visible_gpus(context.machine.gpus, context.environ)
    for gpu in gpus:
        question = scanning.Question(gpu.gfx, override_for(gpu, context.planned))
        torch = context.build.folder if context.build else None
        where = places.default_places(torch, context.environ, str(context.root))
        found = scanning.scan(where, question, context.environ, only_remembered=True)
        libraries = [library for library in found.libraries if library.has_code]
        if not libraries:
            yield ok(f"{gpu.gfx}: the GPU code of torch and ROCm has not been scanned", fix="rocm-patch scan")
            continue
        yield _served(question, libraries)
        for chip in dict.fromkeys(library.answer(question).chip for library in libraries):
            if chip:
                yield from _harmful(question, chip, libraries)


def _served(question: scanning.Question, libraries: list[scanning.Library]) -> Finding:
    card = question.card
    by_kind: dict[str, list[str]] = {}
    for library in libraries:
        by_kind.setdefault(library.answer(question).kind, []).append(library.name)
    words = {
        "native": f"native for {card}", "compiled": "compiled when loaded",
        "override": f"another chip's, under {fit.OVERRIDE}", "none": f"none for {card}",
    }  # fmt: skip
    parts = [f"{words[kind]}: {_names(by_kind[kind])}" for kind in words if kind in by_kind]
    return ok(f"GPU code of {len(libraries)} libraries; {'; '.join(parts)}", source="rocm-patch scan")


def _harmful(question: scanning.Question, chip: str, libraries: list[scanning.Library]) -> Iterable[Finding]:
    card, harm = question.card, hazards.Examination()
    guilty = []
    for library in libraries:
        if library.answer(question).chip == chip:
            found = library.harm(question)
            harm.add(found)
            if found.is_harmful:
                guilty.append(library.name)
    if not harm.is_harmful:
        if harm.examined:
            yield ok(f"{card}: nothing is known against {harm.examined:,} kernels for {chip}")
        return
    rules = {row.id: row for row in catalog.hazards()}
    effects = sorted({rules[rule].effect for rule in harm.places if rule in rules})
    summary = (
        f"{harm.cannot_encode + harm.with_bug:,} of {harm.examined:,} kernels for {chip} cannot run "
        f"safely on {card}: {', '.join(f'{n:,} with {rule}' for rule, n in sorted(harm.kernels_by_rule.items()))}"
    )
    why = f"possible are: {', '.join(effects)}; in {_names(guilty)}"
    sources = [text for rule in harm.places if rule in rules for text in rules[rule].sources[:1]]
    is_better = chip != card and fit.has_native_wheel(card)
    mend = fit.native_torch_command(card) if is_better else "rocm-patch scan --kernels"
    yield warning(summary, why, mend, "; ".join(dict.fromkeys(sources)))


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


CHECKS = (scanned_code,)

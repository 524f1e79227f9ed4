"""How long strategies took for convolutions on this machine, kept in the store with the verdicts.

Convolutions that differ only a little in their samples and sizes share their timings, so that programs with ever new
shapes are not timed for ever.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from rocm_patch.conv.spec import ConvSpec
from rocm_patch.settings import LOGGER
from rocm_patch.trust.store import Verdict
from rocm_patch.trust.verdicts import Verdicts

# What a verdict's evidence says when its seconds were timed for comparison, and not of a first call.
_TIMED = "timed"


def bucket(spec: ConvSpec) -> ConvSpec:
    """A spec's like: number of samples and sizes rounded up to a power of two, or three quarters of one."""
    return dataclasses.replace(
        spec,
        image=(_rounded(spec.image[0]), spec.image[1], *map(_rounded, spec.spatial)),
        out=tuple(map(_rounded, spec.out)),
    )


def _rounded(size: int) -> int:
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


class Timings:
    """The timings of one machine.

    Args:
        verdicts: where they are kept.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._exact: dict[ConvSpec, dict[str, float]] = {}
        self._alike: dict[ConvSpec, dict[str, float]] = {}
        self._read: set[str] = set()

    def of(self, spec: ConvSpec) -> Mapping[str, float]:
        """Seconds by strategy: of this spec, else of one like it; empty where nothing was timed."""
        if spec.device not in self._read:
            self._read.add(spec.device)
            self._read_all(spec)
        return self._exact.get(spec) or self._alike.get(bucket(spec)) or {}

    def _read_all(self, like: ConvSpec) -> None:
        store = self._verdicts.store
        if store is None:
            return
        for row in store.rows(self._verdicts.call(like, "").machine):
            if row.verdict.evidence != _TIMED or row.verdict.is_bad or not math.isfinite(row.verdict.seconds):
                continue
            try:
                spec = ConvSpec.from_json(row.spec, like.device)
            except ValueError as error:
                LOGGER.debug("a timing is left out: %s", error)
                continue
            self._keep(spec, {row.strategy: row.verdict.seconds})

    def _keep(self, spec: ConvSpec, seconds: Mapping[str, float]) -> None:
        self._exact.setdefault(spec, {}).update(seconds)
        self._alike.setdefault(bucket(spec), {}).update(seconds)

    def enter(self, spec: ConvSpec, seconds: Mapping[str, float]) -> None:
        """Keep what was timed just now, instead of what was timed before."""
        self._exact[spec] = dict(seconds)
        self._alike[bucket(spec)] = dict(seconds)
        for name, taken in seconds.items():
            known = self._verdicts.of(spec, name)
            calls = 1 if known is None else max(1, known.calls)
            error = math.nan if known is None else known.error
            self._verdicts.enter(spec, name, Verdict("ok", taken, error, calls, evidence=_TIMED))

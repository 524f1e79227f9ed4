"""Whether the machine code behind a strategy is free of what the card cannot run safely, where that is known.

Known are rocm-patch's own kernels once they are compiled, and the BLAS library once `rocm-patch scan` has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from rocm_patch.conv import NATIVE, Strategy
from rocm_patch.conv.spec import ConvSpec
from rocm_patch.machine.build import TorchBuild, find_libraries
from rocm_patch.machine.fit import override_target
from rocm_patch.machine.scan import elf, hazards
from rocm_patch.machine.scan.kept import Kept
from rocm_patch.settings import LOGGER
from rocm_patch.trust.fingerprint import Fingerprint

_MOST_KNOWN = 8192


class Cleanliness:
    """What is known of the strategies' code on this machine's devices.

    Args:
        fingerprint: from torch's name of a device to what it is.
        build: the torch that runs, whose BLAS library is meant.
        environ: says where scans are remembered.
        root: a folder that stands for `/`.
    """

    def __init__(
        self,
        fingerprint: Callable[[str], Fingerprint],
        build: TorchBuild | None,
        environ: Mapping[str, str],
        root: str = "/",
    ) -> None:
        self._fingerprint, self._build, self._environ, self._root = fingerprint, build, environ, root
        self._chips: dict[str, tuple[str, str] | None] = {}
        self._blas: dict[tuple[str, str], bool | None] = {}
        self._known: dict[tuple[str, ConvSpec], bool] = {}

    def of(self, spec: ConvSpec, strategy: Strategy) -> bool | None:
        """True, False, or None where part of it is not known and nothing is known against the rest."""
        chips = self._chips_of(spec.device)
        if chips is None or strategy is NATIVE:
            return None
        kernels = self._kernels(spec, strategy, chips[0])
        if kernels is False or not strategy.uses_blas:
            return kernels
        blas = self._blas_of(chips)
        return blas if blas is False else (kernels and blas)

    def _chips_of(self, device: str) -> tuple[str, str] | None:
        """The card's chip and the one that it passes for; None where no rule concerns it."""
        if device not in self._chips:
            found = self._fingerprint(device)
            reported = override_target(found.override) or found.device
            has_rules = bool(hazards.rules_for(found.device, reported))
            self._chips[device] = (found.device, reported) if has_rules else None
        return self._chips[device]

    def _kernels(self, spec: ConvSpec, strategy: Strategy, card: str) -> bool | None:
        known = self._known.get((strategy.name, spec))
        if known is None:
            codes = strategy.machine_code(spec)
            if codes is None:
                return None
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[strategy.name, spec] = all(_is_clean(code, card) for code in codes)
        return known

    def _blas_of(self, chips: tuple[str, str]) -> bool | None:
        if chips not in self._blas:
            kept = Kept(self._environ, *chips)
            harm = kept.harm(blas_places(self._build, self._root), chips[1])
            kept.close()
            self._blas[chips] = None if harm is None else not harm.harmful
            if harm is not None and harm.harmful:
                LOGGER.info(
                    "%s: of %d kernels of the BLAS library %d are not safe", chips[0], harm.examined, harm.harmful
                )
        return self._blas[chips]


def blas_places(build: TorchBuild | None, root: str = "/") -> list[Path]:
    """The files and folders with the BLAS library's code that a torch would use."""
    folder = find_libraries(build, root).rocblas_folder
    if not folder:
        return []
    beside = Path(folder).parents[1]
    return [Path(folder), *sorted(beside.glob("librocblas.so*"))]


@cache
def _is_clean(code: bytes, card: str) -> bool:
    read = elf.read_code_object(code)
    return read is None or not hazards.examine(code, read, card).is_harmful

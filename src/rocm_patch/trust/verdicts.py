"""What is known of a spec and a strategy: from this process's own experience, else from the machine's store."""

from __future__ import annotations

from collections.abc import Callable

from rocm_patch.conv.spec import ConvSpec
from rocm_patch.trust.fingerprint import Fingerprint
from rocm_patch.trust.journal import Call
from rocm_patch.trust.store import Store, Verdict

# A kind that only this process knows: it could not be tried, so it is left alone.
UNPROVEN = "unproven"
_MOST_KEPT = 8192


class Verdicts:
    """The verdicts of this process's machine.

    Args:
        store: where they are kept; None keeps them for the life of the process.
        machine_of: the fingerprint of a device, by torch's name of it.
    """

    def __init__(self, store: Store | None, machine_of: Callable[[str], Fingerprint]) -> None:
        self.store = store
        self._machine_of = machine_of
        self._machines: dict[str, Fingerprint] = {}
        self._here: dict[tuple[ConvSpec, str], Verdict] = {}

    def call(self, spec: ConvSpec, strategy: str) -> Call:
        """The pair as the store and the journal know it."""
        machine = self._machines.get(spec.device)
        if machine is None:
            machine = self._machines[spec.device] = self._machine_of(spec.device)
        return Call(machine, spec.to_json(), str(spec), strategy)

    def of(self, spec: ConvSpec, strategy: str) -> Verdict | None:
        """The verdict, None where there is none."""
        known = self._here.get((spec, strategy))
        if known is None and self.store is not None:
            call = self.call(spec, strategy)
            known = self.store.get(call.machine, call.spec, strategy)
            if known is not None:
                self._keep(spec, strategy, known)
        return known

    def enter(self, spec: ConvSpec, strategy: str, verdict: Verdict) -> None:
        """Keep a verdict; one that says UNPROVEN stays in this process."""
        self._keep(spec, strategy, verdict)
        if self.store is not None and verdict.kind != UNPROVEN:
            call = self.call(spec, strategy)
            self.store.put(call.machine, call.spec, call.label, strategy, verdict)

    def _keep(self, spec: ConvSpec, strategy: str, verdict: Verdict) -> None:
        # A program with ever new shapes does not fill the memory; the store has what is dropped.
        if len(self._here) >= _MOST_KEPT:
            self._here.clear()
        self._here[spec, strategy] = verdict

    def suspect(self, spec: ConvSpec, strategy: str, evidence: str) -> None:
        """Have a pair tried in the sandbox before it is used again, by the processes after this one."""
        if self.store is not None:
            call = self.call(spec, strategy)
            self.store.suspect(call.machine, call.spec, call.label, strategy, evidence)

    def withdraw(self, spec: ConvSpec, strategy: str) -> None:
        """Take a verdict back that turned out to be none."""
        self._here.pop((spec, strategy), None)
        if self.store is not None:
            call = self.call(spec, strategy)
            self.store.forget(call.machine, call.spec, strategy)

    def suspicion(self, spec: ConvSpec, strategy: str) -> str | None:
        """Why this pair is under suspicion, None if it is not."""
        if self.store is None:
            return None
        call = self.call(spec, strategy)
        return self.store.suspicion(call.machine, call.spec, strategy)

    def hard(self, spec: ConvSpec, strategy: str) -> int:
        """How many convolutions have crashed or hung on this machine with this strategy."""
        return 0 if self.store is None else self.store.hard(self.call(spec, strategy).machine, strategy)

"""The rules: each a function from a script to its findings, in the file of its subject."""

from __future__ import annotations

from rocm_patch.tools.check.finding import Rule
from rocm_patch.tools.check.rules import order, pickling, start, touching, versions

RULES: tuple[Rule, ...] = (
    order.torch_before_environment,
    start.missing_guard,
    start.fork_asked_for,
    pickling.lambda_to_loader,
    pickling.handle_to_loader,
    touching.gpu_at_import,
    touching.gpu_in_worker,
    versions.v1_api,
)
RULE_NAMES: tuple[str, ...] = (*(rule.__name__.replace("_", "-") for rule in RULES), "unreadable", "unknown-rule")

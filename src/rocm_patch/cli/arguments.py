"""Where the options of `rocm-patch run` end and the program begins.

An option parser would take the program's options for ours, so the line is cut before it sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rocm_patch.launch.run import Target

# The options of `run` that take a value; a test holds this list to the command's own.
VALUE_OPTIONS = (
    "--backend", "--conv", "--start-method", "--profile", "--log", "--unset", "--hang-limit", "--workspace",
)  # fmt: skip


def split_run(arguments: Sequence[str]) -> tuple[list[str], Target | None]:
    """The arguments of `run` as ours and the program's; no target where none is given."""
    ours: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest[0]
        if word == "--":
            return ours, Target("command", tuple(rest[1:])) if rest[1:] else None
        if word in ("-m", "-c"):
            kind = "module" if word == "-m" else "code"
            return ours, Target(kind, tuple(rest[1:])) if rest[1:] else None
        if word == "-" or not word.startswith("-"):
            return ours, Target("script", tuple(rest))
        ours.append(rest.pop(0))
        if word in VALUE_OPTIONS and rest:
            ours.append(rest.pop(0))
    return ours, None

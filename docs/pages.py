"""The pages of the site: which files of the repository they are, and those that are made from code and catalog.

MkDocs reads this as a hook (mkdocs.yml). Every page and file goes by the path that it has in the repository, so that
one link holds there and on the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from rocm_patch.cli.main import app  # noqa: E402
from rocm_patch.machine import catalog  # noqa: E402
from rocm_patch.machine.catalog import KnownIssue  # noqa: E402

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "src/patches/miopen_bypass/README.md",
         "tests/machines/README.md", "examples/thermal_detection/README.md")  # fmt: skip
# What pages show or link to as it is.
FILES = (
    "LICENSE", "Dockerfile", "benchmarks/results/*.json", "benchmarks/results/*.png", "examples/**/*.py",
    "examples/**/*.txt", "examples/**/*.png", "tests/programs/*.py", "tests/programs/*.ipynb",
)  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """The site's files: those of docs/ that MkDocs has found, those that lie elsewhere, those that are made."""
    paths = [path for pattern in (*PAGES, *FILES) for path in sorted(ROOT.glob(pattern))]
    made = {
        "docs/commands.md": commands(),
        "docs/known_failures.md": known_failures(),
        "architecture.md": architecture(),
    }
    found = [file for file in files if file.src_uri != Path(__file__).name]
    return Files(
        [
            *(_file(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path) for file in found),
            *(_file(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in paths),
            *(_file(config, name, content=text) for name, text in made.items()),
        ]
    )


def _file(config: Any, place: str, **source: Any) -> File:
    """A file of the site, named by its path in the repository; its address leaves `docs/` out."""
    address = "readme.md" if place == "README.md" else place.removeprefix("docs/")  # MkDocs takes README for index
    there = File.generated(config, address, **source)
    file = File.generated(config, place, **source)
    file.dest_uri, file.url = there.dest_uri, there.url
    return file


def architecture() -> str:
    """The README's section, where it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## (Architecture\n.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError("README.md has no section `## Architecture`")
    return f"# {section[1]}"


def commands() -> str:
    """Every command with its arguments and options, as the code declares them."""
    group = typer.main.get_command(app)
    lines = [
        "# Commands", "", "Made from the code of `rocm-patch`; `rocm-patch COMMAND --help` says the same.", "",
        *_command(group, "rocm-patch", 2),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _command(command: Any, name: str, level: int) -> list[str]:
    context = command.context_class(command, info_name=name)
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    lines = [f"{'#' * level} {name}", "", *(command.help or "").splitlines(), "", "```", usage, "```", ""]
    rows = [row for parameter in command.params if (row := _parameter(parameter, context))]
    if rows:
        lines += ["| option | |", "| --- | --- |", *rows, ""]
    for part, sub in sorted(getattr(command, "commands", {}).items()):
        if not sub.hidden:
            lines += _command(sub, f"{name} {part}", level + 1)
    return lines


def _parameter(parameter: Any, context: Any) -> str:
    record = parameter.get_help_record(context)
    if record is None:
        return ""
    name, text = record
    return f"| `{' '.join(name.split())}` | {_cell(text)} |"


def known_failures() -> str:
    """Every failure that the catalog knows: first an index by chip, then each with its cause and its cure."""
    issues = catalog.issues()
    chips = sorted({chip for issue in issues for chip in issue.archs if chip != "*"})
    lines = [
        "# Known failures", "",
        "What users of AMD cards report, from the [catalog](CATALOG.md), with its sources. `rocm-patch doctor FILE` "
        "finds these in a log. Nothing here was seen by us: rocm-patch has not yet run on AMD hardware.", "",
        "| chip | known failures |", "| --- | --- |",
        *(f"| {chip} | {_links(issues, chip)} |" for chip in chips),
        f"| any | {_links(issues, '*')} |", "",
        *(line for issue in issues for line in _issue(issue)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _links(issues: tuple[KnownIssue, ...], chip: str) -> str:
    return "<br>".join(f"[{issue.title}](#{issue.id})" for issue in issues if chip in issue.archs)


def _issue(issue: KnownIssue) -> list[str]:
    confirmed = "users say that it helps" if issue.confirmed else "not confirmed"
    rows = {
        "chips": ", ".join(issue.archs).replace("*", "any"),
        "versions": issue.versions,
        "cause": issue.cause,
        "what helps": issue.workaround,
        "whether it does": confirmed,
    }
    return [
        f"## {issue.title} {{ #{issue.id} }}", "",
        "| | |", "| --- | --- |", *(f"| {name} | {_cell(text)} |" for name, text in rows.items() if text), "",
        *(["```sh", issue.fix, "```", ""] if issue.fix else []),
        *(f"- {_source(source)}" for source in issue.sources), "",
    ]  # fmt: skip


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _source(source: str) -> str:
    return f"<{source}>" if source.startswith("https://") else source

"""The documentation as a site, and what its pages tell people to type."""

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import typer

from conftest import ROOT, clean_environ, python
from rocm_patch.cli.arguments import split_run
from rocm_patch.cli.main import app
from rocm_patch.machine import catalog

pytestmark = pytest.mark.torch_free
PAGES = [
    path
    for folder in ("", "docs/**/", "src/**/", "examples/**/")
    for path in sorted(ROOT.glob(f"{folder}*.md"))
    if "PATCHES_V1.1" not in path.name  # test_document.py runs that one's
]
BLOCK = re.compile(r"^(?P<note><!-- not run: .* -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(kind):
    """(page, whether it is said not to run, text) of every block of code of a kind."""
    return [
        (path.relative_to(ROOT), bool(found["note"]), found["text"])
        for path in PAGES
        for found in BLOCK.finditer(path.read_text())
        if found["kind"] == kind
    ]


# The site ----------------------------------------------------------------------------------------------------------


class Asked(HTMLParser):
    """What a page asks a browser to fetch at once, and where its links go."""

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.text = [], set(), []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag in ("script", "img", "iframe", "source"):
            self.fetched.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.fetched.append(given.get("href") or "")

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    page = Asked()
    page.feed(path.read_text())
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make site` builds it: a broken link, anchor or a page that is in no menu is an error."""
    pytest.importorskip("mkdocs", reason="the tools of the extra `docs` are not installed")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env=clean_environ(NO_MKDOCS_2_WARNING="1"), check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_and_asks_nobody_else_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for path in pages:
        for address in read(path).fetched:
            assert not re.match(r"(https?:)?//", address), (path, address)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


def test_every_command_with_every_option_is_on_its_page(site):
    text = "".join(read(site / "commands/index.html").text)

    def walk(command, name):
        assert name in text
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else []:
                assert option in text, (name, option)
        for part, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{name} {part}")

    walk(typer.main.get_command(app), "rocm-patch")


def test_every_known_failure_has_its_place(site):
    page = read(site / "known_failures/index.html")
    assert {issue.id for issue in catalog.issues()} <= page.ids
    for issue in catalog.issues():
        assert issue.title in "".join(page.text)


# What pages tell people to type -------------------------------------------------------------------------------------


def commands():
    """(page, words) of every line of a shell block; a line that ends in a backslash goes on."""
    for page, _, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield page, words


def ours(words):
    """The words from `rocm-patch` on, also behind a path, srun or the like; empty where there is none."""
    at = [n for n, word in enumerate(words) if word.rpartition("/")[2] == "rocm-patch" and words[0] != "docker"]
    return words[at[0] + 1 :] if at else []


def test_commands_on_pages_exist_with_their_options():
    group = typer.main.get_command(app)
    tried = 0
    for page, words in commands():
        if not (rest := ours(words)) or "COMMAND" in rest or rest[0].startswith("-"):
            continue
        command, rest = group, list(rest)
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, (page, words)
            command = command.commands[rest.pop(0)]
        if command.name == "run":
            rest = list(split_run(rest)[0])
        print(f"{page}: {' '.join(words)}")  # shown if the parser refuses it
        command.make_context(command.name, rest)
        tried += 1
    assert tried > 40


def test_files_and_targets_on_pages_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in commands():
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, (page, words)
        for word in words:
            if re.fullmatch(r"(benchmarks|examples|tests|docs)/[\w./]+\.\w+", word):
                assert (ROOT / word).exists(), (page, word)
    for path in PAGES:
        for target in re.findall(r"`make ([\w-]+)`", path.read_text()):
            assert target in targets, (path, target)


def test_python_on_pages_runs(tmp_path):
    """The blocks of a page one after the other, in one process: what a reader would paste."""
    pages = {}
    for page, is_not_run, text in blocks("python"):
        compile(text, str(page), "exec")
        if not is_not_run:
            pages.setdefault(page, []).append(text)
    assert len(pages) >= 5
    for page, texts in pages.items():
        script = tmp_path / "page.py"
        script.write_text("\n".join(texts))
        done = python(str(script), check=False, cwd=tmp_path, ROCM_PATCH_BACKEND="cpu")
        assert done.returncode == 0, (page, done.stderr)


def test_other_blocks_can_be_read():
    yaml = pytest.importorskip("yaml")
    for page, _, text in blocks("yaml"):
        assert yaml.safe_load(text), page
    tomllib = pytest.importorskip("tomllib")
    for page, _, text in blocks("toml"):
        assert tomllib.loads(text) is not None, page
    for page, _, text in blocks("sh"):
        done = subprocess.run(
            ["bash", "-n"], input=text, text=True, capture_output=True, check=False, env=dict(os.environ)
        )
        assert done.returncode == 0, (page, text, done.stderr)

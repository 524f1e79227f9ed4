"""Scan the ROCm builds that package registries offer, and write down what they carry.

    python benchmarks/scan_real.py OUT.json [--keep FOLDER] [--page docs/REAL_BUILDS.md] [--only PACKAGE]

Downloads each package (PyPI's wheels by pip, Debian's by apt-get) into FOLDER, unpacks it, and scans it for an RDNA1
card: which cards each library serves, the hazards of its gfx1030 code on gfx1010 under the 10.3.0 override, and, to
compare, those of its own gfx1010 code. The page gets the tables between its markers. 1.5 GB are downloaded, and up to
3 GB unpacked at a time.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from rocm_patch.machine import catalog
from rocm_patch.machine.scan.scanning import Question, scan
from rocm_patch.tools.scan import document

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
QUESTION, NATIVE = Question("gfx1010", "10.3.0"), Question("gfx1010")
DEBIAN = {"librocsparse0": "Debian 12", "librocrand1": "Debian 12"}
# Each with the Python for which its newest wheels are.
WHEELS = {
    "cupy-rocm-4-3": "3.11", "cupy-rocm-5-0": "3.11", "cupy-rocm-7-0": "3.12", "jax-rocm60-plugin": "3.11",
    "jax-rocm60-pjrt": "3.11", "jax-rocm7-plugin": "3.12", "jax-rocm7-pjrt": "3.12", "tensorflow-rocm": "3.11",
    "onnxruntime-rocm": "3.11", "bitsandbytes": "3.11", "pyg-lib-rocm": "3.11",
}  # fmt: skip
SHOWN = ("inst-prefetch", "smem-then-vector", "vmem-then-scalar", "exec-read-then-cmpx", "lds-branch-vmem")
# Cards whose answer is asked for: one of each kind that a build may or may not serve.
CARDS = ("gfx900", "gfx906", "gfx90c", "gfx1010", "gfx1012", "gfx1030", "gfx1032", "gfx1036", "gfx1100", "gfx1102",
         "gfx1103", "gfx1150", "gfx1151", "gfx1201")  # fmt: skip


def fetched(name, folder):
    """The file of a package, downloaded where it is not there yet."""
    stem = f"{name}_" if name in DEBIAN else name.replace("-", "_") + "-"
    found = [path for path in folder.iterdir() if path.name.startswith(stem)]
    if not found and name in DEBIAN:
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    elif not found:
        python = WHEELS[name]
        platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in ("2_28", "2_27", "2_17", "2_32", "2_35")]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms,
             "--platform=manylinux2014_x86_64", "--platform=manylinux2010_x86_64", f"--python-version={python}",
             "-d", str(folder), name], check=True,
        )  # fmt: skip
    return next(path for path in folder.iterdir() if path.name.startswith(stem))


def unpacked(path, folder):
    if path.suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(path), str(folder)], check=True)
        return
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)


def measured(name, keep):
    package = fetched(name, keep)
    with tempfile.TemporaryDirectory(dir=keep) as folder:
        unpacked(package, folder)
        started = time.perf_counter()
        found = scan([Path(folder)], QUESTION, {"ROCM_PATCH_CACHE_DIR": f"{folder}/cache"})
        seconds = time.perf_counter() - started
        rows = [library for library in found.libraries if library.has_code]
        answers = {library.folder: {card: library.answer(Question(card)).kind for card in CARDS} for library in rows}
        shown = document(found)
        natives = {}
        if any("gfx1010" in library.content.targets for library in rows):
            native = document(scan([Path(folder)], NATIVE, {"ROCM_PATCH_CACHE_DIR": f"{folder}/cache"}))
            own = [row for row in native["libraries"] if row["answer"] == "native"]
            natives = {row["path"]: row["hazards"] for row in own if row["hazards"]}
    usage = [resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    libraries = []
    for row in shown["libraries"]:
        if Path(row["path"]) in answers:
            native = natives.get(row["path"])
            for harm in filter(None, (row["hazards"], native)):
                harm["kernels"] = [{**kernel, "name": kernel["name"][:120]} for kernel in harm["kernels"][:5]]
            path = Path(row["path"])
            shown_row = {**row, "path": str(path.relative_to(folder)), "answers": answers[path]}
            libraries.append({**shown_row, "hazards_of_gfx1010_code": native})
    return {
        "package": name, "file": package.name, "bytes": shown["bytes"], "seconds": round(seconds, 1),
        "peak_MiB": {"this process": usage[0], "largest worker so far": usage[1]}, "libraries": libraries,
        "notes": [note for row in shown["libraries"] for note in row["notes"]],
    }  # fmt: skip


def version(row):
    parts = row["file"].split("_" if row["file"].endswith(".deb") else "-")
    return parts[1]


def tables(rows):
    lines = ["| package | version | libraries with code | kernels | chips |", "| --- | --- | ---: | ---: | --- |"]
    for row in rows:
        kernels = sum(t["kernels"] for library in row["libraries"] for t in library["targets"].values())
        chips = sorted({t for library in row["libraries"] for t in library["targets"]}, key=lambda t: (len(t), t))
        lines.append(
            f"| {row['package']} | {version(row)} | {len(row['libraries'])} | {kernels:,} | {' '.join(chips)} |"
        )
    cards = [(card, catalog.arch(card)) for card in CARDS]
    lines += [
        "",
        "Which have code that a card could load: its own (`native`), another chip's under the override that the",
    ]
    lines += [
        "catalog knows for the card (its value; that the code is there does not say that it runs, and this torch or"
    ]
    lines += [
        "ROCm may be too new for the override), or none (`-`); `in part` where some libraries have other code.",
        "",
    ]
    lines += ["| package | " + " | ".join(CARDS) + " |", "| --- |" + " --- |" * len(CARDS)]
    for row in rows:
        cells = []
        for card, known in cards:
            kinds = {library["answers"][card] for library in row["libraries"]}
            best = next((kind for kind in ("native", "compiled", "override") if kind in kinds), "-")
            worst = "" if len(kinds) == 1 else " in part"
            cells.append((known.override if best == "override" else best) + (worst if best != "-" else ""))
        lines.append(f"| {row['package']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Their code for gfx1030, which the override to 10.3.0 loads, on gfx1010: kernels by what was found in them.",
        "",
    ]
    lines += [
        "| library | kernels and functions | with instructions that it lacks | with a hardware bug | nothing found | "
        + " | ".join(f"`{rule}`" for rule in SHOWN)
        + " |",
        "| --- |" + " ---: |" * (4 + len(SHOWN)),
    ]
    for row in rows:
        for library in row["libraries"]:
            harm = library["hazards"]
            if harm and harm["examined"]:
                by_rule = harm["kernels_by_rule"]
                cells = [harm["examined"], harm["cannot_encode"], harm["with_bug"], harm["clean"]]
                cells += [by_rule.get(rule, 0) for rule in SHOWN]
                name = f"{row['package']}: {library['name']}"
                lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    lines += ["", "To compare, the code that some of them have for gfx1010 itself:", ""]
    lines += [
        "| library | kernels and functions | with a hardware bug | nothing found | by rule |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        for library in row["libraries"]:
            harm = library["hazards_of_gfx1010_code"]
            if harm:
                kinds = ", ".join(f"{count} `{rule}`" for rule, count in harm["kernels_by_rule"].items())
                cells = f"{harm['examined']:,} | {harm['cannot_encode'] + harm['with_bug']:,} | {harm['clean']:,}"
                lines.append(f"| {row['package']}: {library['name']} | {cells} | {kinds} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "rocm-builds")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only", action="append", metavar="PACKAGE")
    chosen = parser.parse_args()
    chosen.keep.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in chosen.only or [*DEBIAN, *WHEELS]:
        rows.append(measured(name, chosen.keep))
        print(f"{name}: {len(rows[-1]['libraries'])} libraries, {rows[-1]['seconds']} s", file=sys.stderr, flush=True)
    shown = {
        "card": QUESTION.card, "override": QUESTION.override, "processors": os.cpu_count(),
        "python": platform.python_version(), "command": "python benchmarks/scan_real.py OUT.json",
        "date": time.strftime("%Y-%m-%d"), "packages": rows,
    }  # fmt: skip
    chosen.out.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    if chosen.page:
        text = chosen.page.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        said = f"Scanned on {shown['date']} with Python {shown['python']} on {shown['processors']} processors."
        chosen.page.write_text(
            "\n".join([before + BEGIN, said, "", *tables(rows), "", END + after]), encoding="utf-8"
        )


if __name__ == "__main__":
    main()

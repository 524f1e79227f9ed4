"""Compile the kernels that strategies launch on AMD cards, for cards that are not here; registers and spills.

    python tests/kernels_compiled.py gfx1010 [--all]         a JSON document on stdout
    python tests/kernels_compiled.py --write docs/KERNELS.md  all of them, for all cards, as the tables of that page

Needs Triton on the path. Every kernel is compiled in a child process, as the package does it for a program.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rocm_patch.conv import STRATEGIES, direct, fused, implicit_gemm, likeliest
from rocm_patch.conv.cases import CASES, LAYERS
from rocm_patch.conv.spec import DIRECTIONS
from rocm_patch.kernels import launch
from rocm_patch.kernels.compiling import COMPILER
from rocm_patch.kernels.variant import Target, resources, triton_version
from rocm_patch.machine.scan import elf, hazards

ARCHS = ("gfx1010", "gfx1030", "gfx1100", "gfx1151", "gfx1201")
# What the cost model finds so many times slower than the likeliest is launched by nobody.
FAR_BEHIND = 6.0
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def pretend(arch):
    """Strategies plan for a card that is not here."""
    target = Target("hip", arch, 32)
    for module in (launch, implicit_gemm, direct):
        module.target_of = lambda device: target
    fused.missing = lambda: None
    return target


def variants(of_all):
    """What is launched for the 18 layers; with `of_all` for the small cases, bfloat16 and channels_last too.

    Of variants that differ only in the divisors of their sizes the one with the widest loads, which takes the most
    registers.
    """
    plans = {strategy.run.__self__ for strategy in STRATEGIES if hasattr(strategy.run, "__self__")}
    found = {}
    for case in (*LAYERS, *CASES) if of_all else LAYERS:
        for dtype in ("float32", "float16", "bfloat16") if of_all else ("float32", "float16"):
            for last in (False, True) if of_all and len(case.image) > 3 else (False,):
                for direction in DIRECTIONS:
                    spec = case.spec(direction, dtype, "cuda:0", last)
                    ranked = likeliest(spec)
                    for strategy in ranked:
                        owner = getattr(strategy.run, "__self__", None)
                        if owner not in plans or strategy.seconds(spec) > FAR_BEHIND * ranked[0].seconds(spec):
                            continue
                        for each in owner._plan(spec).launches:
                            variant = each.variant
                            key = (
                                variant.module, variant.name, variant.types, variant.constants, variant.warps,
                                variant.stages,
                            )  # fmt: skip
                            if key not in found or len(variant.divisors) > len(found[key].divisors):
                                found[key] = variant
    return list(found.values())


def compiled(arch, of_all):
    """A row per variant: what it is, and what it takes or why it cannot be had."""
    target = pretend(arch)
    rows = []
    asked = [(variant, COMPILER.ask(variant, target, is_to_run=False)) for variant in variants(of_all)]
    for variant, compilation in asked:
        compilation.over.wait()
        row = {"kernel": f"{variant.module}.{variant.name}", "types": list(variant.types)}
        row |= {"constants": dict(variant.constants), "warps": variant.warps, "stages": variant.stages}
        row["failure"] = compilation.failure
        if compilation.failure is None:
            kernel = variant.compiled(target)  # from Triton's cache, where the child has put it
            row |= resources(kernel)
            row["hazards_on_gfx1010"] = harm(kernel.asm["hsaco"])
        rows.append(row)
    return rows


def harm(code):
    """What gfx1010 cannot run safely of a kernel: rule to the number of places."""
    return hazards.examine(code, elf.read_code_object(code), "gfx1010").places


# What tells block shapes apart; the rest are the convolution's own sizes.
SHAPES = (
    "FILTERS", "CHANNELS", "ROWS", "POSITIONS", "COLUMNS", "SUMMED", "HIGH", "TAPS", "TILES", "ENTRIES", "SIDE",
)  # fmt: skip


HEADS = ("kernel", "block", "warps", "stages", "variants")
TAKES = (
    ("VGPRs", "vgprs"), ("SGPRs", "sgprs"), ("LDS bytes", "lds_bytes"), ("SGPR spills", "sgpr_spills"),
    ("VGPR spills", "vgpr_spills"), ("scratch bytes", "scratch_bytes"),
)  # fmt: skip


def tables(rows_of):
    """Markdown: a table per card, a line per kernel and block, with the most that any variant takes."""
    lines = []
    for arch, rows in rows_of.items():
        heads = (*HEADS, *(head for head, _ in TAKES))
        lines += [f"### {arch}", "", "| " + " | ".join(heads) + " |"]
        lines += ["| --- | --- |" + " ---: |" * (len(heads) - 2)]
        groups = {}
        for row in rows:
            block = " ".join(f"{name}={row['constants'][name]}" for name in SHAPES if name in row["constants"])
            groups.setdefault((row["kernel"], block, row["warps"], row["stages"]), []).append(row)
        for key in sorted(groups):
            found = groups[key]
            most = [max(row[name] for row in found) for _, name in TAKES]
            lines.append("| " + " | ".join(map(str, (*key, len(found), *most))) + " |")
        lines.append("")
    return lines


def write(path):
    rows_of = {arch: compiled(arch, True) for arch in ARCHS}
    failed = [row for rows in rows_of.values() for row in rows if row["failure"]]
    if failed:
        sys.exit(f"{len(failed)} kernels cannot be compiled, the first: {failed[0]}")
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    version = ".".join(map(str, triton_version()))
    said = [f"Compiled with Triton {version}. Numbers are the most that any of the variants takes.", ""]
    path.write_text("\n".join([before + BEGIN, *said, *tables(rows_of), END + after]), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="?", choices=ARCHS)
    parser.add_argument("--all", action="store_true", help="bfloat16, channels_last and the small cases too")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables into a page")
    chosen = parser.parse_args()
    if chosen.write:
        write(chosen.write)
    else:
        json.dump({"triton": triton_version(), "rows": compiled(chosen.arch, chosen.all)}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # children that wait for more are not waited for


if __name__ == "__main__":
    main()

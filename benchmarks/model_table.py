"""The page of documentation that is made of the JSON file."""

from __future__ import annotations

from typing import Any

from model_compare import BOUND, FIRST_STEP, MARGIN, PARTS, STEPS, ZERO

INTRODUCTION = """\
# Whole models, patched and native

Every model below was made from its configuration with random weights and trained twice from the same weights, on the
same inputs: natively, and with each of its convolutions served by rocm-patch (`backend="cpu"`, policy `bypass`). For
each run it was counted how many results and gradients of convolutions the model asks aten for, and that rocm-patch
served just as many, none of them by aten's own kernels. This was run on a CPU; no AMD card was involved.

This page is made by two commands, the first of which takes {minutes:.0f} minutes{threads}:

    python benchmarks/models.py {path}
    python benchmarks/models.py --table {path} > docs/MODELS.md

{versions}

## What the figures are

- The error of a tensor is the Frobenius norm of its difference, relative to the norm of the native float64 tensor.
  The table has the worst tensor of each model.
- *forward*: all outputs in training mode (of detectors their losses). *backward*: the gradients of all parameters and
  of the inputs. *{steps} steps*: all parameters and buffers after {steps} steps of SGD with momentum, at a rate with
  which the first step moves the weights by {first_step:g} of their norm.
- Some tensors are zero but for rounding, such as the gradient of a bias before a batch norm. Those with less than
  {zero:g} of the norm of all tensors together are judged relative to that norm: {zeros:.1%} of all compared.
- *float64* is patched against native, and the columns that decide: the bound is {bound:g}. A model that amplifies
  rounding to more than that is compared with what happens to native when its weights are moved by one unit in their
  last place, which is the figure in brackets; the bound is then {margin:g} times that.
- *float32* is the distance from the native float64 result: patched / native. Rounding moves the input of one ReLU or
  another across zero, or has a detector draw another box, in the patched run or in the native one as chance has it;
  deep networks with batch norm over few pixels amplify that, until biases that start at zero hold nothing else. So
  one pair of figures says little where they are large; over all models neither side is nearer to the exact result.
- Dropout and stochastic depth are on, with the same seed on both sides.

## What was made smaller

Images have 32 to 128 pixels a side (SSD's 300) and come in batches of 1 to 4. AlexNet and VGG have few features in
their classifiers, torchvision's ViT, MaxViT and MViT few and narrow blocks, S3D the pooling that its small images
need, detectors few boxes per image, the diffusers models two or three narrow blocks. The others are whole; of timm it
is a small member of each family. Where torchvision's C++ part does not fit the torch at hand, `nms` and `roi_align`
are those of `benchmarks/model_zoo.py`.

## Result

{result}
"""


def cell(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def models_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    plain, both = [f"{part} f64" for part in PARTS], [f"{part} f32, patched / native" for part in PARTS]
    heads = ["model", "convolutions", *(head.replace("steps", f"{STEPS} steps") for head in plain + both)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, row in rows.items():
        cells = [name.split("/")[-1]]
        if "float64" in row:
            double, single = row["float64"], row["float32"]
            cells += [str(double["convolutions"])]
            for part in PARTS:
                moved = f" ({cell(double['native_moved'][part]['error'])})" if "native_moved" in double else ""
                cells.append(cell(double["against_native"][part]["error"]) + moved)
            for part in PARTS:
                ours, native = single["against_float64"][part], single["native_against_float64"][part]
                cells.append(f"{cell(ours['error'])} / {cell(native['error'])}")
        if "failed" in row:
            cells[0] += f" (**{row['failed']}**)".replace("\n", " ").replace("|", "/")
        cells += [""] * (len(heads) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def compiled_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    heads = ["model", "type", "convolutions", "graphs", "graph breaks"]
    heads += [f"{part}, patched / native".replace("steps", f"{STEPS} steps") for part in PARTS]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for name, row in rows.items():
        title = name.removeprefix("torch.compile ")
        if "failed" in row:
            lines.append(f"| {title} (**{row['failed']}**)".replace("\n", " ") + " |" * len(heads))
        for dtype in ("float64", "float32"):
            if dtype in row:
                one = row[dtype]
                cells = [title, dtype, str(one["convolutions"]), str(one["graphs"]), str(one["breaks"])]
                for part in PARTS:
                    ours, native = one["against_eager"][part]["error"], one["native_against_eager"][part]["error"]
                    cells.append(f"{cell(ours)} / {cell(native)}")
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary(rows: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """What is to be said of all models, and the share of tensors that are zero but for rounding."""
    done = {name: row for name, row in rows.items() if "float64" in row}
    failed = [name for name, row in rows.items() if "failed" in row]
    served: dict[str, int] = {}
    tensors = zeros = 0
    for row in done.values():
        for dtype in ("float64", "float32"):
            for strategy, calls in row.get(dtype, {}).get("served_by", {}).items():
                served[strategy] = served.get(strategy, 0) + calls
        for part in row["float64"]["against_native"].values():
            tensors, zeros = tensors + part["tensors"], zeros + part["zero_but_for_rounding"]
    by_calls = sorted(served.items(), key=lambda item: -item[1])
    lines = [
        f"{len(rows) - len(failed)} of {len(rows)} models hold" + (f"; not {', '.join(failed)}." if failed else "."),
        f"Served: {sum(served.values())} results and gradients of convolutions, by "
        + ", ".join(f"{strategy} {calls}" for strategy, calls in by_calls)
        + ". The worst float64 error:",
        "",
    ]
    for part in PARTS:
        name, row = max(done.items(), key=lambda item: item[1]["float64"]["against_native"][part]["error"])
        worst = row["float64"]["against_native"][part]
        title = part.replace("steps", f"{STEPS} steps")
        lines.append(f"- {title}: {cell(worst['error'])} ({name}, `{worst['tensor']}`)")
    lines += ["", "In float32 the patched run is nearer to the exact result than native, or farther from it:", ""]
    for part in PARTS:
        pairs = [
            (
                row["float32"]["against_float64"][part]["error"],
                row["float32"]["native_against_float64"][part]["error"],
            )
            for row in done.values()
            if "against_float64" in row.get("float32", {})
        ]
        factors = sorted(ours / max(native, 1e-12) for ours, native in pairs)
        nearer, farther = sum(ours < native for ours, native in pairs), sum(ours > native for ours, native in pairs)
        middle, title = factors[len(factors) // 2] if factors else 1.0, part.replace("steps", f"{STEPS} steps")
        lines.append(
            f"- {title}: nearer for {nearer} models, farther for {farther}; median of patched / native {middle:.2f}"
        )
    return "\n".join(lines), zeros / max(tensors, 1)


def page(report: dict[str, Any], path: str = "benchmarks/results/models_cpu.json") -> str:
    """The page, in Markdown."""
    rows, versions = report["models"], dict(report["versions"])
    result, zeros = summary(rows)
    threads = versions.pop("threads")
    text = INTRODUCTION.format(
        minutes=sum(row["seconds"] for row in rows.values()) / 60,
        threads=f" on {threads} core{'s' if threads != '1' else ''} of the machine below",
        path=path,
        versions="\n".join(f"- {name}: {version}" for name, version in versions.items()),
        steps=STEPS,
        first_step=FIRST_STEP,
        zero=ZERO,
        bound=BOUND,
        margin=MARGIN,
        zeros=zeros,
        result=result,
    )
    lines = [text]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        chosen = {name: row for name, row in rows.items() if row["family"] == family}
        if family == "torch.compile":
            lines += [
                "## Compiled",
                "",
                "With inductor, `fullgraph=True` for ResNet-18, nothing taken from a cache. Graphs, graph breaks and",
                "their reasons are native's, which is asserted; the errors are those against the native eager run of",
                "the same type.",
                "",
                *compiled_table(chosen),
            ]
        else:
            lines += [f"## {family[0].upper()}{family[1:]}", "", *models_table(chosen), ""]
    return "\n".join(lines).rstrip() + "\n"

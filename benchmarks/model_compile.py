"""The same comparison for models compiled by inductor: also the graphs, and where they break."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from model_compare import KEYS, Counter, inputs_for, served, train, worst_error
from model_zoo import ZOO

import rocm_patch


class Compiled(NamedTuple):
    """A model of the zoo, whether it has to be one graph, and in which types; one takes minutes to compile."""

    of: str
    fullgraph: bool
    dtypes: tuple[torch.dtype, ...]


COMPILED = {
    "torch.compile resnet18": Compiled("torchvision/resnet18", True, (torch.float64, torch.float32)),
    "torch.compile yolov8n": Compiled("yolov8n", False, (torch.float64,)),
}


def compare_compiled(compiled: Compiled, device: str) -> dict[str, Any]:
    """The report on one model.

    Raises:
        AssertionError: a convolution was not served, or the graphs are not native's.
    """
    from torch._dynamo.utils import counters

    backend, key = KEYS[device]
    rocm_patch.disable_all_patches()
    entry, fullgraph = ZOO[compiled.of], compiled.fullgraph
    model, inputs = inputs_for(entry.make, entry.shapes, device)
    report: dict[str, Any] = {}
    for dtype in compiled.dtypes:
        torch.set_default_dtype(dtype)
        rocm_patch.disable_all_patches()
        with Counter() as counter:
            eager, rate = train(model, inputs, dtype, None)
        traces, graphs = {}, {}
        for side in ("native", "ours"):
            torch._dynamo.reset()
            counters.clear()
            if side == "ours":
                assert rocm_patch.enable_miopen_bypass(backend=backend)
            # Nothing may be taken over from the other side.
            with torch._inductor.config.patch(force_disable_caches=True):
                wrap = lambda m: torch.compile(m, fullgraph=fullgraph)  # noqa: E731
                traces[side], _ = train(model, inputs, dtype, rate, wrap)
            graphs[side] = {
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
                "reasons": sorted(reason[:200] for reason in counters["graph_break"]),
            }
        calls = served(key)
        rocm_patch.disable_all_patches()
        assert counter.asked and "native" not in calls and sum(calls.values()) == counter.asked, (
            f"of {counter.asked} convolutions the override has served {calls}"
        )
        assert graphs["ours"] == graphs["native"], graphs
        report[str(dtype).removeprefix("torch.")] = {
            "convolutions": counter.asked,
            "served_by": calls,
            "against_native": worst_error(eager, traces["ours"], traces["native"]),
            "against_eager": worst_error(eager, traces["ours"], eager),
            "native_against_eager": worst_error(eager, traces["native"], eager),
            **graphs["ours"],
        }
    return report

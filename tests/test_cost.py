"""The cost model against the times that were measured on an H200 (benchmarks/directions.py)."""

import json
import math

import pytest

from conftest import ROOT
from rocm_patch.conv import DEPTHWISE, STRATEGIES, cost, fused, likeliest
from rocm_patch.conv.cases import LAYERS
from rocm_patch.conv.cost import Rates, Work

ROWS = json.loads((ROOT / "benchmarks" / "results" / "directions_h200.json").read_text(encoding="utf-8"))["rows"]
CASES = {case.why: case for case in LAYERS}


@pytest.fixture
def an_h200(monkeypatch):
    """Where no GPU can be asked the model takes an H200's rates; its Triton has to be taken for granted."""
    monkeypatch.setattr(fused, "missing", lambda: None)


def regrets():
    """How many times longer than the fastest the likeliest strategy takes, for each direction of each layer."""
    for row in ROWS:
        spec = CASES[row["layer"]].spec(row["direction"], row["dtype"], "cuda:0", row["channels_last"])
        yield row, row["ms"][likeliest(spec)[0].name] / min(row["ms"].values())


@pytest.mark.usefixtures("an_h200")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_likeliest_is_hardly_slower_than_the_fastest(dtype):
    found = [math.log(regret) for row, regret in regrets() if row["dtype"] == dtype]
    assert len(found) == len(LAYERS) * 2 * 3
    assert math.exp(sum(found) / len(found)) < 1.05


@pytest.mark.usefixtures("an_h200")
def test_no_choice_is_far_off():
    far = {(row["layer"], row["dtype"], row["direction"]): regret for row, regret in regrets() if regret > 2}
    assert far == {}


@pytest.mark.usefixtures("an_h200")
def test_estimates_are_of_the_right_size():
    off = []
    for row in ROWS:
        spec = CASES[row["layer"]].spec(row["direction"], row["dtype"], "cuda:0", row["channels_last"])
        strategy = likeliest(spec)[0]
        off.append(abs(math.log(1e3 * strategy.seconds(spec) / row["ms"][strategy.name])))
    assert math.exp(sum(off) / len(off)) < 1.5


def test_more_work_takes_longer():
    spec = CASES["r50.3x3b"].spec("forward", device="cuda:0")
    base = Work(flops=1e9, efficiency=0.5, bytes=1e6, launches=3, loads=1e6)
    before = cost.seconds(spec, base)
    for more in ({"flops": 2e9}, {"efficiency": 0.25}, {"bytes": 1e9}, {"launches": 30}, {"loads": 1e9}):
        assert cost.seconds(spec, base._replace(**more)) > before


def test_every_card_has_rates_and_no_strategy_is_free():
    assert all(isinstance(value, Rates) and min(value) > 0 for value in (*cost._FAMILIES.values(), cost._CPU))
    for case in LAYERS:
        for strategy in STRATEGIES:
            spec = case.spec("forward")
            if strategy.rejects(spec) is None:
                assert strategy.seconds(spec) > 0, (strategy.name, case.why)
    assert DEPTHWISE.seconds(CASES["dw.3x3"].spec("forward")) < 1

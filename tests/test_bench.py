"""`rocm-patch bench`: what it measures, what it refuses to give a time, and what it says of an older measurement."""

import importlib.util
import json
import math

import pytest
import torch

from conftest import python, rocm_patch
from rocm_patch import api
from rocm_patch.conv import STRATEGIES
from rocm_patch.conv.cases import CASES, LAYERS
from rocm_patch.conv.native import NATIVE_RTOL
from rocm_patch.overrides.aten import ACTIVE
from rocm_patch.tools import bench, bench_layers, bench_means, bench_peers

STRATEGY_NAMES = [strategy.name for strategy in STRATEGIES]
MODES = {"forward": ("forward",), "forward_backward": ("forward", "grad_input", "grad_weight")}
MODEL = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2),
    )

number = 7
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run over everything: the process, its document, and the file that it wrote."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    done = rocm_patch("bench", "--quick", "--json", "--backend", "cpu", "--out", str(path))
    return done, json.loads(done.stdout), path


def small(*arguments, **options):
    """A run over one tiny layer that takes no longer than it must."""
    return rocm_patch(
        "bench", "--quick", "--backend", "cpu", "--layer", "r50.3x3d", "--strategies", "none", "--peers", "none",
        *arguments, **options,
    )  # fmt: skip


def test_the_document(quick):
    done, document, path = quick
    assert done.stderr == "" and json.loads(path.read_text()) == document
    assert document["schema_version"] == 1 and document["device"] and document["stopped"] is None
    assert document["versions"]["torch"] == torch.__version__
    assert document["command"].startswith("rocm-patch bench --quick --json")
    rates = document["rates"]
    assert rates["gemm_tflops"].keys() == {"float32"} and rates["gemm_tflops"]["float32"] > 0
    assert rates["copy_gb_per_s"] > 0 and min(rates["host_us"]["ours"], rates["host_us"]["native"]) > 0
    names = ["ours", *STRATEGY_NAMES, "vendor", "vendor_off", "unfold_matmul", "cpu_fallback"]
    asked = [(case.why, name, mode) for case in LAYERS for name in names for mode in MODES]
    assert [(row["layer"], row["contender"], row["mode"]) for row in document["rows"]] == asked
    assert all(row["mib"] is None and row["device_ms"] is None for row in document["rows"])
    found = document["summary"]["float32"]["forward_backward"]
    assert found["ours_over_vendor"]["layers"] == 18 and found["memory_ours_over_vendor"] is None
    assert found["ours_without_a_time"] == []


def test_every_strategy_that_accepts_a_layer_is_right_and_the_others_say_why_not(quick):
    cases = {layer.name: layer.case for layer in bench_layers.standard_layers(quick=True)}
    bounds = {strategy.name: strategy.rtol for strategy in STRATEGIES}
    ran = set()
    for row in quick[1]["rows"]:
        if row["kind"] != "strategy":
            continue
        strategy = STRATEGIES[STRATEGY_NAMES.index(row["contender"])]
        specs = [cases[row["layer"]].spec(direction) for direction in MODES[row["mode"]]]
        reasons = [why for why in map(strategy.rejects, specs) if why is not None]
        if reasons:
            assert row["ms"] is None and row["why"].startswith(f"rejected: {reasons[0]}"), row
        else:
            assert row["bound"] == bounds[row["contender"]]["float32"]
            assert row["error"] <= row["bound"] and row["ms"] > 0 and row["why"] is None, row
            assert row["strategy"] == row["contender"]
            ran.add(row["contender"])
    assert {"pointwise", "winograd_f43", "winograd_f23", "depthwise", "grouped", "taps", "im2col"} <= ran


def test_what_is_right_has_a_time_and_nothing_else(quick):
    for row in quick[1]["rows"]:
        is_right = row["error"] is not None and row["error"] <= row["bound"]
        assert (row["ms"] is not None) == is_right == (row["why"] is None), row
        assert is_right or row["why"].partition(":")[0] in ("rejected", "not on this device"), row
        assert row["contender"] not in ("ours", "vendor", "vendor_off", "unfold_matmul") or is_right
        if is_right:
            case = next(c for c in bench_layers.standard_layers(quick=True) if c.name == row["layer"])
            rates = quick[1]["rates"]
            best = max(case.flops() / rates["gemm_tflops"]["float32"] / 1e9,
                       4 * case.elements() / rates["copy_gb_per_s"] / 1e6)  # fmt: skip
            assert row["roofline"] == pytest.approx(len(MODES[row["mode"]]) * best / row["ms"])


def test_work_counted_by_hand():
    layers = {layer.name: layer for layer in bench_layers.standard_layers()}
    assert layers["r50.3x3a"].flops() == 2 * (32 * 56 * 56 * 64) * (64 * 9)
    assert layers["dw.3x3"].flops() == 2 * (32 * 56 * 56 * 144) * 9
    assert layers["r50.3x3bs2"].elements() == 32 * 128 * 56 * 56 + 128 * 128 * 9 + 32 * 128 * 28 * 28


def test_quick_layers_are_tiny_ones_of_the_same_kind():
    for layer, case in zip(bench_layers.standard_layers(quick=True), LAYERS, strict=True):
        tiny = layer.case
        assert layer.name == case.why and tiny.image[0] == 1 and max(tiny.image[2:]) <= 17
        assert max(tiny.image[1], tiny.weight[0]) <= 32 and tiny.weight[2:] == case.weight[2:]
        assert tiny.image[1] == tiny.weight[1] * tiny.groups and tiny.weight[0] % tiny.groups == 0
        assert (tiny.groups > 1) == (case.groups > 1) and (tiny.weight[1] == 1) == (case.weight[1] == 1)
        assert min(layer.out) > 0 and tiny.stride == case.stride


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, image):
        return image.clone()

    @staticmethod
    def backward(context, grad):
        return 1.5 * grad


def too_large(case):
    return lambda image, weight: 1.001 * bench_peers.plain(case)(image, weight)


def not_finite(case):
    return lambda image, weight: bench_peers.plain(case)(image, weight) + math.nan


def cut_off(case):
    return lambda image, weight: bench_peers.plain(case)(image, weight)[..., :-1]


def wrong_gradient(case):
    return lambda image, weight: bench_peers.plain(case)(WrongGradient.apply(image), weight)


def broken(case):
    raise RuntimeError("miopenStatusUnknownError\nand more")


@pytest.mark.parametrize(
    ("prepare", "whys"),
    [
        (too_large, ("wrong: error 1.0e-03 over 1e-05",) * 2),
        (not_finite, ("wrong: not finite, or of another shape",) * 2),
        (cut_off, ("wrong: not finite, or of another shape", "failed: RuntimeError: Mismatch in shape")),
        (wrong_gradient, (None, "wrong: error 5.0e-01 over 1e-05")),
        (broken, ("failed: RuntimeError: miopenStatusUnknownError",) * 2),
    ],
)
def test_a_wrong_result_has_no_time(prepare, whys, one_thread):
    layers = bench_layers.standard_layers(["r50.3x3d"], quick=True)
    contender = bench_peers.Contender("other", "peer", {"float32": 1e-5}, prepare)
    rows = list(bench.Bench("cpu", layers, ["float32"], [contender], quick=True).rows())
    assert len(rows) == 2
    for row, why in zip(rows, whys, strict=True):
        assert (row.why or "").startswith(why or "") and bool(row.why) == bool(why), row
        assert (row.ms is None) == (why is not None) == (row.roofline is None)


def test_everything_is_as_it_was_afterwards(one_thread):
    api.enable_miopen_bypass(backend="cpu")
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.enabled)
    measured = bench.Bench(
        "cpu", bench_layers.standard_layers(["3x3d"], quick=True), ["float32", "bfloat16"],
        bench_peers.contenders("cpu", ["taps"], ["vendor_off"]), channels_last=True, quick=True,
    )  # fmt: skip
    seen = []
    for row in measured.rows():
        seen.append((row.contender, row.dtype, row.mode, row.channels_last, bool(ACTIVE)))
        assert row.ms is not None, row
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert seen == [
        (name, dtype, mode, True, name != "vendor_off")
        for dtype in ("float32", "bfloat16") for name in ("ours", "taps", "vendor_off") for mode in MODES
    ]  # fmt: skip
    assert len(measured) == len(seen)
    after = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.enabled)
    assert after == before and not ACTIVE and not any(api.patch_status().values())


@pytest.mark.parametrize("case", [case for case in CASES if len(case.stride) == 2], ids=lambda case: case.why)
def test_unfold_and_matmul_is_a_convolution(case):
    image, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (case.image, case.weight))
    right = bench_peers.plain(case)(image, weight)
    found = bench_peers.unfold_matmul(case)(image, weight)
    grad = torch.randn_like(right)
    of_right = torch.autograd.grad(right, (image, weight), grad)
    of_found = torch.autograd.grad(found, (image, weight), grad)
    for a, b in zip((right, *of_right), (found, *of_found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_peers_have_natives_bound_and_ours_the_widest_of_the_strategies():
    found = {contender.name: contender for contender in bench_peers.contenders("cpu")}
    assert found["vendor"].rtol == NATIVE_RTOL and "compile_triton" not in found
    assert found["ours"].rtol["float32"] == max(s.rtol["float32"] for s in STRATEGIES)
    assert [c.name for c in bench_peers.contenders("cuda:0", [], None)] == ["ours", *bench_peers.PEERS]


def row_of(layer, contender, ms, mib=None, **other):
    return {
        "layer": layer, "image": [1], "weight": [1], "stride": [1], "padding": [0], "dilation": [1], "groups": 1,
        "channels_last": False, "dtype": "float32", "mode": "forward", "contender": contender, "ms": ms, "mib": mib,
        "why": None if ms else "wrong: error 1", **other,
    }  # fmt: skip


def test_means_are_geometric_over_the_layers_that_have_both_times():
    rows = [
        row_of("a", "ours", 2.0, 4), row_of("a", "vendor", 1.0, 1), row_of("a", "vendor_off", 1.0),
        row_of("b", "ours", 8.0, 9), row_of("b", "vendor", 1.0, 1), row_of("b", "vendor_off", 9.0),
        row_of("c", "ours", 8.0, 0), row_of("c", "vendor", None, 1), row_of("c", "vendor_off", None),
        row_of("d", "ours", None), row_of("d", "vendor", 1.0),
    ]  # fmt: skip
    found = bench_means.summary(rows)["float32"]["forward"]
    assert found["ours_over_vendor"] == {"mean": pytest.approx(4.0), "layers": 2}
    assert found["vendor_off_over_ours"] == {"mean": pytest.approx(0.75), "layers": 2}
    assert found["memory_ours_over_vendor"] == {"mean": pytest.approx(6.0), "layers": 2}
    assert found["unfold_matmul_over_ours"] is None
    assert found["slower_than_vendor_off"] == ["a"] and found["ours_without_a_time"] == ["d"]


def test_regressions_are_of_ours_alone_and_more_than_a_tenth():
    old = [row_of("a", name, 1.0) for name in ("ours", "vendor")] + [row_of("b", "ours", 1.0)]
    old += [row_of("c", "ours", None), row_of("d", "ours", 1.0), row_of("e", "ours", 1.0, stride=[2])]
    new = [row_of("a", "ours", 1.11), row_of("a", "vendor", 3.0), row_of("b", "ours", 1.09)]
    new += [row_of("c", "ours", 1.0), row_of("d", "ours", None), row_of("e", "ours", 9.0)]
    changes = bench_means.compare(old, new)
    assert [(change.label.split()[0], change.ratio, change.is_regression) for change in changes] == [
        ("a", 1.11, True), ("a", 3.0, False), ("b", 1.09, False), ("c", None, False), ("d", None, True),
    ]  # fmt: skip


def test_compare_exits_1_and_names_what_became_slower(quick, tmp_path):
    document = json.loads(json.dumps(quick[1]))
    slower = {"forward": 1e-9, "forward_backward": 1e9}
    for row in document["rows"]:
        row["ms"] = row["ms"] and slower[row["mode"]]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document))
    done = small("--compare", str(old), check=False)
    assert done.returncode == 1
    named = [line for line in done.stdout.splitlines() if "SLOWER" in line]
    assert len(named) == 1 and "r50.3x3d float32 forward ours" in named[0]
    for row in document["rows"]:
        row["ms"] = row["ms"] and 1e9
    old.write_text(json.dumps(document))
    done = small("--compare", str(old), "--json")
    assert json.loads(done.stdout)["rows"] and "r50.3x3d float32 forward_backward ours" in done.stderr


def test_the_layers_of_a_model_in_a_file(tmp_path):
    (tmp_path / "nets.py").write_text(MODEL)
    done = rocm_patch(
        "bench", "--model", "nets.py:net", "--input-shape", "3x12x10", "--batch", "2", "--backend", "cpu", "--json",
        "--strategies", "im2col", "--peers", "vendor", cwd=tmp_path,
    )  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    assert {(tuple(row["image"]), tuple(row["weight"]), row["count"]) for row in rows} == {
        ((2, 3, 12, 10), (8, 3, 3, 3), 1), ((2, 8, 12, 10), (8, 8, 3, 3), 2), ((2, 4, 24, 20), (8, 4, 2, 2), 1),
    }  # fmt: skip
    assert len(rows) == 3 * 3 * 2 and all(row["ms"] > 0 for row in rows)
    torch.save(torch.nn.Conv1d(2, 3, 3), tmp_path / "net.pt")
    model, shapes = bench_layers.load_model(str(tmp_path / "net.pt"), [(2, 9)])
    layers = bench_layers.model_layers(model, [(4, *shapes[0])], channels_last=False)
    assert [(layer.case.image, layer.case.weight, layer.count) for layer in layers] == [((4, 2, 9), (3, 2, 3), 1)]


def test_the_table_says_it_in_words(tmp_path):
    done = rocm_patch(
        "bench", "--quick", "--backend", "cpu", "--layer", "3x3d", "--layer", "1x1d", "--dtype", "float32"
    )
    for words in ("r50.3x3d", "r50.1x1d", "forward + backward, ms", "ours/vendor", "geometric means: ours takes",
                  "Measured here: products", "us ours"):  # fmt: skip
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "r51"], "no layer is called 'r51'; there are r50.stem, "),
        (["--strategies", "im2col,fft"], "unknown strategy 'fft'; it can be pointwise, "),
        (["--peers", "cudnn"], "unknown peer 'cudnn'; it can be vendor, "),
        (["--dtype", "int8"], "unknown type 'int8'; it can be float32, "),
        (["--model", "nets.py:number", "--input-shape", "3x8x8"], "is a int, not a torch.nn.Module"),
        (["--model", "nets.py:net"], "the inputs of nets.py:net are not known"),
        (["--model", "nets.py:net", "--input-shape", "5x8x8"], "does not take inputs of 8x5x8x8"),
        (["--compare", "nets.py"], "'nets.py' is not JSON"),
    ],
)
def test_usage_errors_list_the_choices(arguments, words, tmp_path):
    (tmp_path / "nets.py").write_text(MODEL)
    done = rocm_patch("bench", "--backend", "cpu", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and "\nhint: " in done.stderr


def test_a_package_that_is_missing_is_named_with_its_remedy(tmp_path):
    # A package that cannot be imported stands in for one that is not installed, whatever this machine has.
    for name in ("timm", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    model = ["-m", "rocm_patch", "bench", "--backend", "cpu", "--model", "timm:resnet18"]
    plot = ["-m", "rocm_patch", "bench", "--backend", "cpu", "--quick", "--plot", "x.png"]
    for arguments, name in ((model, "timm"), (plot, "matplotlib")):
        done = python(*arguments, cwd=tmp_path, check=False, PYTHONPATH=str(tmp_path))
        assert done.returncode == 2 and f"hint: pip install {name}" in done.stderr, done.stderr


def test_plot_writes_a_picture_where_matplotlib_is(tmp_path):
    done = small("--plot", "out.png", cwd=tmp_path, check=False)
    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode == 2 and "hint: pip install matplotlib" in done.stderr
        assert not (tmp_path / "out.png").exists()
    else:
        assert done.returncode == 0 and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

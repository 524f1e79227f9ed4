"""`rocm-patch tune`, and what programs make of its timings.

No test depends on which strategy is the fastest here: where that matters, the seconds in the store are rewritten.
"""

import dataclasses
import inspect
import json
import re
import shutil
import time
from typing import NamedTuple

import pytest
import torch

from conftest import rocm_patch
from rocm_patch import tuning
from rocm_patch.cli import tune as command
from rocm_patch.errors import UsageError
from rocm_patch.launch.run import Target
from rocm_patch.settings import Settings
from rocm_patch.tools import tune as tool
from rocm_patch.trust.store import Store
from rocm_patch.trust.timings import bucket

MODEL = """
from torch import nn

print("a line of the model's own")

def small():
    return nn.Conv2d(3, 8, 3, padding=1)

def several():
    return nn.Sequential(small(), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 2, 2, stride=2))

def endless():
    return nn.Conv2d(1, 1, 1, padding=500_000_000)

linear = nn.Linear(2, 2)
number = 7
"""
# The convolution of small(), on sides of the first argument; says what served them in which direction.
PROGRAM = """
import json, os, sys
import torch

if "deterministic" in sys.argv:
    torch.use_deterministic_algorithms(True)
torch.backends.cudnn.benchmark = "benchmark" in sys.argv
for side in map(int, sys.argv[1].split(",")):
    image = torch.randn(2, 3, side, side, requires_grad=True)
    torch.nn.Conv2d(3, 8, 3, padding=1)(image).sum().backward()
overriding = sys.modules.get("rocm_patch.overrides.aten")
taken = overriding.ACTIVE["CPU"].routes.taken() if overriding and overriding.ACTIVE else []
served = {}
for route in taken:
    served.setdefault(route.spec.image[2], {})[route.spec.direction] = route.strategy.name
print(json.dumps({"arguments": sys.argv[1:], "served": served, "asked": os.environ.get("ROCM_PATCH_TUNE")}))
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""
DIRECTIONS = {"forward", "grad_input", "grad_weight"}
TUNED = "is the fastest of"  # what the log says of each convolution that is timed


class Place(NamedTuple):
    """A folder with the model and the program, and a store."""

    folder: object

    def command(self, *arguments, check=True, **environ):
        return rocm_patch(
            *arguments, cwd=self.folder, check=check, ROCM_PATCH_CACHE_DIR=str(self.folder / "cache"),
            ROCM_PATCH_LOG="info", **environ,
        )  # fmt: skip

    def tune(self, side, *arguments):
        """The rows of small() on images of such a side, and what was logged."""
        done = self.command(
            "tune", "nets.py:small", "--input", f"3x{side}x{side}", "--batch", "2", "--backend", "cpu", "--json",
            *arguments,
        )  # fmt: skip
        document = json.loads(done.stdout)
        assert document["schema_version"] == 1 and document["device"] == "cpu"
        return document["rows"], done.stderr

    def run(self, sides, *arguments, **environ):
        """What serves the program by direction, on each of the sides, and what was logged."""
        done = self.command("run", "--backend", "cpu", "program.py", sides, *arguments, **environ)
        said = json.loads(done.stdout)
        assert said["asked"] == environ.get("ROCM_PATCH_TUNE")
        return [said["served"][side] for side in sides.split(",")], done.stderr

    def timed(self):
        """The timings in the store by (spec, strategy)."""
        rows = Store(self.folder / "cache").rows()
        return {(row.spec, row.strategy): row for row in rows if row.verdict.evidence == "timed"}


def made(folder):
    (folder / "nets.py").write_text(MODEL)
    (folder / "program.py").write_text(PROGRAM)
    return Place(folder)


@pytest.fixture
def place(tmp_path):
    """With nothing in the store."""
    return made(tmp_path)


@pytest.fixture(scope="module")
def tuned_once(tmp_path_factory):
    there = made(tmp_path_factory.mktemp("tuned"))
    return there, *there.tune(15)


@pytest.fixture
def tuned(tuned_once, tmp_path):
    """A copy of a place where small() on images of side 15 is tuned; and the rows of that tuning."""
    shutil.copytree(tuned_once[0].folder, tmp_path / "copy")
    return Place(tmp_path / "copy"), tuned_once[1]


@pytest.fixture
def planted(tuned):
    """Likewise; the store names other winners than the cost model does, by direction."""
    there, rows = tuned
    store, winners = Store(there.folder / "cache"), {}
    for row in rows:
        others = [
            found
            for (_, strategy), found in there.timed().items()
            if json.loads(found.spec) == row["spec"] and strategy != row["without_tuning"]
        ]
        assert others, f"only {row['without_tuning']} was timed for {row['label']}"
        chosen = others[0]
        verdict = dataclasses.replace(chosen.verdict, seconds=1e-9, when=time.time())
        assert store.put(chosen.machine, chosen.spec, chosen.label, chosen.strategy, verdict)
        winners[row["spec"]["direction"]] = chosen.strategy
    return there, rows, winners


def by_direction(rows, name):
    return {row["spec"]["direction"]: row[name] for row in rows}


def test_the_winners_are_in_the_store(tuned_once):
    there, rows, said = tuned_once
    assert {row["spec"]["direction"] for row in rows} == DIRECTIONS and len(rows) == 3
    assert said.count(TUNED) == 3 and "a line of the model's own" in said
    timed = there.timed()
    for row in rows:
        assert row["is_new"] and row["why"] is None
        assert row["spec"]["image"] == [2, 3, 15, 15] and row["spec"]["weight"] == [8, 3, 3, 3]
        found = {key[1]: kept for key, kept in timed.items() if json.loads(key[0]) == row["spec"]}
        assert len(found) > 1 and row["label"] == found[row["fastest"]].label
        assert row["seconds"] == found[row["fastest"]].verdict.seconds
        assert 0 < row["seconds"] == min(kept.verdict.seconds for kept in found.values())
        # The best by estimate is always tried.
        assert row["without_tuning"] in found
    assert len(timed) == len(Store(there.folder / "cache").rows())


def test_without_tuning_the_cost_models_strategy_serves(tuned_once, place):
    """What the rows say of it is what an untuned program does."""
    (served,), log = place.run("15")
    assert served == by_direction(tuned_once[1], "without_tuning")
    assert TUNED not in log and place.timed() == {}


def test_a_second_tune_finds_nothing_new(tuned):
    there, rows = tuned
    before = there.timed()
    again, said = there.tune(15)
    assert [{**row, "is_new": True} for row in again] == rows and not any(row["is_new"] for row in again)
    assert TUNED not in said and there.timed() == before


def test_again_times_it_once_more(tuned):
    there, _ = tuned
    before = there.timed()
    rows, said = there.tune(15, "--again")
    assert all(row["is_new"] for row in rows) and said.count(TUNED) == 3
    after = there.timed()
    renewed = {key for key, row in after.items() if key not in before or row.verdict.when > before[key].verdict.when}
    assert {(json.dumps(row["spec"], separators=(",", ":")), row["fastest"]) for row in rows} <= renewed


def test_a_later_program_takes_the_winners_without_timing(planted):
    there, rows, winners = planted
    before = there.timed()
    (served,), log = there.run("15")
    assert served == winners and TUNED not in log and there.timed() == before
    assert not winners.items() & by_direction(rows, "without_tuning").items()


def test_a_bad_verdict_goes_before_a_timing(planted):
    """A winner that failed since serves no longer."""
    there, _, winners = planted
    store = Store(there.folder / "cache")
    for (_, strategy), row in there.timed().items():
        if strategy == winners[json.loads(row.spec)["direction"]]:
            bad = dataclasses.replace(row.verdict, kind="wrong", when=time.time())
            assert store.put(row.machine, row.spec, row.label, strategy, bad)
    (served,), _ = there.run("15")
    assert served.keys() == winners.keys() and not served.items() & winners.items()


def test_torchs_own_flag_tunes(place):
    (found,), log = place.run("15", "benchmark")
    assert found.keys() == DIRECTIONS and log.count(TUNED) == 3
    timed = place.timed()
    assert {json.loads(spec)["direction"] for spec, _ in timed} == DIRECTIONS
    for direction, served in found.items():
        seconds = {
            strategy: row.verdict.seconds
            for (spec, strategy), row in timed.items()
            if json.loads(spec)["direction"] == direction
        }
        assert served == min(seconds, key=seconds.get)


def test_a_deterministic_program_neither_tunes_nor_takes_timings(planted):
    there, rows, winners = planted
    before = there.timed()
    # The first is timed already, the second is not.
    (served, _), log = there.run("15,40", "deterministic", "benchmark", ROCM_PATCH_TUNE="1")
    assert served == by_direction(rows, "without_tuning") and not served.items() & winners.items()
    assert TUNED not in log and there.timed() == before
    # It is the mode that keeps it from both.
    (served, _), log = there.run("15,40", "benchmark", ROCM_PATCH_TUNE="1")
    assert served == winners and log.count(TUNED) == 3


def test_convolutions_of_a_bucket_share_their_timings(planted):
    there, _, winners = planted
    before = there.timed()
    rows, said = there.tune(16)
    assert not any(row["is_new"] for row in rows) and by_direction(rows, "fastest") == winners
    assert TUNED not in said and there.timed() == before
    (served,), _ = there.run("16", ROCM_PATCH_TUNE="1")
    assert served == winners and there.timed() == before


def test_other_buckets_do_not(planted):
    there, rows, winners = planted
    (served,), _ = there.run("17")
    assert served == by_direction(rows, "without_tuning") and not served.items() & winners.items()
    found, said = there.tune(17)
    assert all(row["is_new"] for row in found) and said.count(TUNED) == 3


def test_buckets_are_powers_of_two_and_three_quarters_of_them(tuned_once):
    from rocm_patch.conv.spec import ConvSpec

    spec = ConvSpec.from_json(json.dumps(tuned_once[1][0]["spec"]))

    def of(batch, side):
        found = bucket(dataclasses.replace(spec, image=(batch, 3, side, side), out=(side, side)))
        assert found == dataclasses.replace(spec, image=found.image, out=found.image[2:]) and found.image[1] == 3
        return found.image[0], found.image[2]

    assert [of(n, n)[1] for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 16, 24, 24, 32,
    ]  # fmt: skip
    assert of(5, 15) == (6, 16)


def test_a_script_runs_with_its_arguments_and_exit_code_and_is_timed(place):
    """Whatever follows it is its own, the names of our options too."""
    done = place.command(
        "tune", "--backend", "cpu", "program.py", "15", "--json", "--again", "--input", "x", "--help",
        check=False, EXIT_CODE="7",
    )  # fmt: skip
    assert done.returncode == 7
    said = json.loads(done.stdout)
    assert said["arguments"] == ["15", "--json", "--again", "--input", "x", "--help"] and said["asked"] == "1"
    assert done.stderr.count(TUNED) == 3 and said["served"]["15"].keys() == DIRECTIONS
    assert {json.loads(spec)["direction"] for spec, _ in place.timed()} == DIRECTIONS
    assert "rocm-patch: convolutions bypass on cpu" in done.stderr and "nothing will be timed" not in done.stderr


@pytest.mark.parametrize(
    ("environ", "why", "hint"),
    [
        ({"ROCM_PATCH": "0"}, "nothing will be timed: switched off by ROCM_PATCH=0", "leave ROCM_PATCH=0 out"),
        (
            {"ROCM_PATCH_BACKEND": "cpu", "ROCM_PATCH_CONV": "guarded"},
            "nothing will be timed, convolutions go by the policy guarded",
            "ROCM_PATCH_CONV=bypass",
        ),
    ],
)
def test_a_script_that_will_not_be_timed_says_so(place, environ, why, hint):
    done = place.command("tune", "program.py", "15", **environ)
    assert why in done.stderr and f"\nhint: {hint}" in done.stderr and TUNED not in done.stderr
    assert place.timed() == {}


def test_a_whole_model_as_a_table(place):
    arguments = ["tune", "net.pt", "--input", "3x12x12", "--batch", "2", "--backend", "cpu", "--channels-last"]
    arguments += ["--dtype", "float64", "--dtype", "float32"]
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)), place.folder / "net.pt")
    done = place.command(*arguments)
    lines = [line for line in done.stdout.splitlines() if "2x3x12x12 by 8x3x3x3" in line]
    assert len(lines) == 6 and all("channels_last" in line and " now " in line for line in lines)
    assert [sum(dtype in line for line in lines) for dtype in ("float64", "float32")] == [3, 3]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("12 convolutions: ")
    assert last.endswith("0 were known already, 12 were timed now, 0 could not be")
    known = place.command(*arguments).stdout.splitlines()
    assert known[-1].endswith("12 were known already, 0 were timed now, 0 could not be")
    assert known[-1].split(";")[0] == last.split(";")[0]


def test_what_cannot_be_timed_is_reported_and_the_exit_code(place, monkeypatch, capsys):
    """Results and operands that no machine has the memory for."""
    model = "nets.py:endless"
    done = place.command(
        "tune", model, "--input", "1x8x8", "--batch", "1", "--backend", "cpu", "--json", check=False
    )  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    assert done.returncode == 1 and by_direction(rows, "fastest") == dict.fromkeys(DIRECTIONS)
    why = by_direction(rows, "why")
    assert why["forward"].startswith("no strategy computed it")
    assert "can't allocate memory" in why["grad_input"] and "can't allocate memory" in why["grad_weight"]
    assert place.timed() == {}
    monkeypatch.chdir(place.folder)
    specs = tool.of_model("cpu", model, [(1, 8, 8)], 1, ["float32"], False)
    capsys.readouterr()
    command._print_table(list(tool.rows(specs, Settings())), "cpu")
    table = capsys.readouterr().out
    assert table.count("could not be timed: ") == 3 and table.count(" now ") == 0
    assert table.splitlines()[-1].endswith("0 were known already, 0 were timed now, 3 could not be")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "nothing to tune"),
        ("missing.py 1", "cannot run 'missing.py': no such file\nhint: rocm-patch tune MODEL"),
        ("broken.py", "cannot run 'broken.py': "),
        ("--json program.py 15", "--json is for a model, and program.py is a script"),
        ("--channels-last program.py", "--channels-last is for a model"),
        ("nets.py:small --input eight", "'eight' is not the shape of an input"),
        ("nets.py:small --input 3x8x8 --dtype int8", "unknown type 'int8'; it can be float32, "),
        ("nets.py:small --input 3x8x8 --backend tpu", "unknown backend 'tpu'"),
    ],
)
def test_usage_errors_come_with_a_hint(place, line, message):
    (place.folder / "broken.py").write_text("def\n")
    done = place.command("tune", *line.split(), check=False)
    # As `run` has it for a script that Python would refuse.
    assert done.returncode == (1 if "broken" in line else 2) and done.stdout == ""
    assert message in done.stderr and "\nhint: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("nets.py:small", [], "the inputs of nets.py:small are not known"),
        ("nets.py:none", [(3, 8, 8)], "cannot make the model 'nets.py:none'"),
        ("nets.py:number", [(3, 8, 8)], "is a int, not a torch.nn.Module"),
        ("nets.py:linear", [(2,)], "nets.py:linear has no convolution"),
        ("nets.py:small", [(2, 8, 8)], "nets.py:small does not take inputs of 8x2x8x8"),
        ("nowhere", [(3, 8, 8)], "there is no model 'nowhere'"),
    ],
)
def test_models_that_cannot_be_tuned(place, monkeypatch, name, shapes, message):
    monkeypatch.chdir(place.folder)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        tool.of_model("cpu", name, shapes, 8, ["float32"], False)
    # The options of another command are no help.
    assert "--model" not in caught.value.hint and "--input-shape" not in caught.value.hint


@pytest.mark.parametrize(
    ("line", "ours", "target"),
    [
        ("program.py -q --input x", "", ("program.py", "-q", "--input", "x")),
        ("--backend cpu program.py nets.py", "--backend cpu", ("program.py", "nets.py")),
        ("--backend=cpu program.py", "--backend=cpu", ("program.py",)),
        ("--input program.py", "--input program.py", None),
        ("nets.py:small --input 3x8x8", "nets.py:small --input 3x8x8", None),
        ("nets.py:small program.py", "nets.py:small program.py", None),
        ("--again missing.py a", "--again", ("missing.py", "a")),
        ("--help", "--help", None),
        ("--batch", "--batch", None),
    ],
)
def test_where_a_script_begins(line, ours, target):
    assert command.split(line.split()) == (ours.split(), target and Target("script", target))


def test_names_that_are_written_twice_are_the_same():
    assert command.TUNE_VARIABLE == tuning.TUNE_VARIABLE
    flags = {"context", "target", "channels_last", "again", "as_json"}
    assert {f"--{name}" for name in set(inspect.signature(command.tune).parameters) - flags} == set(
        command.VALUE_OPTIONS
    )

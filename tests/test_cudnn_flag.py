"""Programs see and set their own cudnn flag while aten's is off; torch's norms and RNNs get the truth."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.backends import cudnn

from conftest import clean_environ, python
from rocm_patch.overrides import cudnn_flag
from rocm_patch.overrides.cudnn_flag import real_flag

TWO = int(torch.__version__.split(".")[0]) >= 2
with_dynamo = pytest.mark.skipif(not TWO, reason="torch 1.13 has no torch.compile")
SHIELD = """
import torch
from rocm_patch.overrides import cudnn_flag
undo = cudnn_flag.shield()
"""


def objects():
    """The very objects that the shield may replace."""
    prop = vars(type(cudnn))["enabled"]
    names = ("set_flags", "flags", "is_acceptable")
    return [
        torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, prop, prop.getter, prop.setter,
        torch.backends.flags_frozen, *(getattr(cudnn, name) for name in names),
    ]  # fmt: skip


@pytest.fixture
def shielded():
    assert cudnn.enabled and real_flag()
    undo = cudnn_flag.shield()
    yield undo
    undo()
    cudnn.enabled = True
    assert real_flag()


def norm_arguments(graph):
    """The constant cudnn_enabled of each norm in a TorchScript graph."""
    kinds = ("aten::batch_norm", "aten::instance_norm", "aten::layer_norm", "aten::group_norm")
    return {
        kind.partition("::")[2]: list(node.inputs())[-1].toIValue()
        for kind in kinds
        for node in graph.findAllNodes(kind)
    }


def norms():
    return torch.nn.Sequential(
        torch.nn.BatchNorm2d(4),
        torch.nn.InstanceNorm2d(4),
        torch.nn.GroupNorm(2, 4),
        torch.nn.LayerNorm(5),
    ).eval()


def test_a_program_sees_its_own_value_and_aten_has_the_flag_off(shielded):
    assert torch.backends.cudnn.enabled is True
    assert torch._C._get_cudnn_enabled() is True
    assert type(cudnn).enabled is True and getattr(cudnn, "enabled") is True  # noqa: B009
    assert not real_flag()
    torch.backends.cudnn.enabled = False
    assert torch.backends.cudnn.enabled is False and not real_flag()
    cudnn.enabled = True
    assert torch.backends.cudnn.enabled is True and not real_flag()
    torch._C._set_cudnn_enabled(False)
    assert cudnn.enabled is False
    sys.modules["torch.backends.cudnn"].enabled = True
    assert cudnn.enabled is True and not real_flag()


@pytest.mark.parametrize("last", [True, False])
def test_undo_restores_the_very_objects_and_the_value_the_program_set_last(last):
    before = objects()
    undo = cudnn_flag.shield()
    assert torch._C._get_cudnn_enabled is not before[0]
    kept_get, kept_set = torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled
    cudnn.enabled = not last
    cudnn.enabled = last
    assert not real_flag()
    undo()
    try:
        assert all(now is then for now, then in zip(objects(), before, strict=True))
        assert real_flag() is last and cudnn.enabled is last
        kept_set(not last)  # a program that kept the functions of the shield goes on with aten's
        assert real_flag() is not last and kept_get() is not last
        undo()
        assert real_flag() is not last
    finally:
        cudnn.enabled = True


def test_the_shield_starts_with_the_value_that_was_there():
    cudnn.enabled = False
    undo = cudnn_flag.shield()
    try:
        assert cudnn.enabled is False
    finally:
        undo()
        assert not real_flag()
        cudnn.enabled = True


def test_a_second_shield_and_its_undo_change_nothing(shielded):
    cudnn_flag.shield()()
    assert cudnn.enabled and not real_flag()
    shielded()
    assert real_flag()


def test_the_shield_can_be_put_up_again(shielded):
    shielded()
    again = cudnn_flag.shield()
    shielded()  # the old undo does not take the new shield down
    assert not real_flag()
    again()
    assert real_flag()


def test_flags_sets_and_restores_the_programs_value_and_the_other_flags_for_real(shielded):
    with cudnn.flags(enabled=False):
        assert not cudnn.enabled
        with cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=False):
            assert cudnn.enabled and not real_flag()
            assert torch._C._get_cudnn_benchmark() and torch._C._get_cudnn_deterministic()
            assert not torch._C._get_cudnn_allow_tf32()
        assert not cudnn.enabled and not torch._C._get_cudnn_benchmark()
    assert cudnn.enabled and not real_flag()
    with pytest.raises(ZeroDivisionError), cudnn.flags(enabled=False):
        raise ZeroDivisionError
    assert cudnn.enabled
    cudnn.benchmark = True
    assert torch._C._get_cudnn_benchmark()
    cudnn.benchmark = False


def test_set_flags_returns_the_programs_value(shielded):
    before = cudnn.set_flags(False)
    assert before[0] is True and cudnn.enabled is False
    assert cudnn.set_flags(*before)[0] is False
    assert cudnn.enabled is True and not real_flag()


def test_what_is_no_bool_gets_torchs_own_error():
    def complaint():
        with pytest.raises((TypeError, RuntimeError)) as error:
            cudnn.enabled = 1
        return error.type, str(error.value)

    plain = complaint()
    undo = cudnn_flag.shield()
    try:
        assert complaint() == plain
        assert cudnn.enabled and not real_flag()
    finally:
        undo()


def test_norms_hand_aten_the_truth(shielded):
    x = torch.zeros(2, 4, 3, 5)
    everywhere = dict.fromkeys(("batch_norm", "instance_norm", "layer_norm", "group_norm"), False)
    assert norm_arguments(torch.jit.trace(norms(), x).inlined_graph) == everywhere
    assert norm_arguments(torch.jit.script(norms()).inlined_graph) == everywhere
    shielded()
    assert set(norm_arguments(torch.jit.trace(norms(), x).inlined_graph).values()) == {True}


def test_a_value_that_the_program_hands_over_itself_is_its_own(shielded):
    def direct(x):
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled)

    assert norm_arguments(torch.jit.trace(direct, torch.randn(2, 4, 3)).graph) == {"batch_norm": True}


def test_results_of_norms_and_rnns_stay(shielded):
    x = torch.randn(2, 4, 3, 5)
    lstm, sequence = torch.nn.LSTM(5, 3), torch.randn(7, 2, 5)
    with_shield = norms()(x), lstm(sequence)[0]
    shielded()
    for one, other in zip(with_shield, (norms()(x), lstm(sequence)[0]), strict=True):
        torch.testing.assert_close(one, other)


def test_is_acceptable_knows_the_truth(shielded):
    # A CPU build gets as far as its warning if the flag is on.
    like_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cudnn.is_acceptable(like_cuda) is False
        shielded()
        if not cudnn.is_available():
            with pytest.raises(UserWarning, match="without cuDNN"):
                cudnn.is_acceptable(like_cuda)


def test_threads_share_one_value_and_none_switches_aten_on(shielded):
    seen, wrong = [], []

    def flip():
        for turn in range(2000):
            cudnn.enabled = bool(turn % 2)
            if real_flag():
                wrong.append(turn)

    def last():
        for thread in threads:
            thread.join()
        cudnn.enabled = False
        seen.append(cudnn.enabled)

    threads = [threading.Thread(target=flip) for _ in range(3)]
    for thread in threads:
        thread.start()
    after = threading.Thread(target=last)
    after.start()
    after.join()
    assert not wrong and seen == [False] and cudnn.enabled is False


def test_the_function_in_place_of_atens_pickles_and_copies(shielded):
    get = torch._C._get_cudnn_enabled
    assert copy.deepcopy(get) is get
    assert pickle.loads(pickle.dumps(get)) is get


def test_pytest_and_program_idioms(shielded, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert not cudnn.enabled
    monkeypatch.undo()
    assert cudnn.enabled and not real_flag()
    names = {"__name__": "program"}
    exec(
        "import torch.backends.cudnn as cudnn\nfrom torch.backends import cudnn as again\n"
        "cudnn.benchmark = True\ncudnn.enabled = False\nassert not again.enabled\n"
        "again.enabled = True\nassert cudnn.enabled\ncudnn.benchmark = False\n",
        names,
    )
    assert names["cudnn"].enabled and not real_flag()


def test_frozen_flags_stay_frozen_but_for_the_context_manager():
    python(
        "-c",
        SHIELD + "torch.backends.disable_global_flags()\n"
        "try: torch.backends.cudnn.enabled = False\n"
        "except RuntimeError as error: assert 'flags() context manager' in str(error), error\n"
        "else: raise AssertionError('it could be set')\n"
        "with torch.backends.cudnn.flags(enabled=False): assert not torch.backends.cudnn.enabled\n"
        "assert torch.backends.cudnn.enabled and not cudnn_flag.real_flag()\n"
        "undo(); assert cudnn_flag.real_flag()\n",
    )


def test_a_packaged_module_is_a_program(tmp_path):
    (tmp_path / "packaged_one.py").write_text("import torch\ndef read(): return torch.backends.cudnn.enabled\n")
    code = (
        "import torch.package as package\n"
        "with package.PackageExporter('one.pt') as out:\n"
        "    out.extern('torch.**'); out.intern('packaged_one'); out.save_module('packaged_one')\n"
        "read = package.PackageImporter('one.pt').import_module('packaged_one').read\n"
        "assert read() is True and not cudnn_flag.real_flag()\n"
        "torch.backends.cudnn.enabled = False\nassert read() is False\n"
    )
    script = tmp_path / "program.py"
    script.write_text(SHIELD + code)
    python(str(script), cwd=tmp_path)


def test_a_torch_whose_property_is_another_is_shielded_beneath_it():
    code = """
import logging, torch
module = torch.backends.cudnn
type(module).enabled = property(lambda self: torch._C._get_cudnn_enabled())
logging.basicConfig(level="DEBUG")
from rocm_patch.settings import LOGGER
LOGGER.setLevel("DEBUG")
from rocm_patch.overrides import cudnn_flag
undo = cudnn_flag.shield()
assert module.enabled is True and not cudnn_flag.real_flag()
undo()
assert cudnn_flag.real_flag()
"""
    assert "left alone" in python("-c", code).stderr


def test_a_module_imported_anew_under_a_shield_still_knows_the_truth():
    code = """
import sys
del sys.modules["rocm_patch.overrides.cudnn_flag"]
from rocm_patch.overrides import ledger
import importlib
anew = importlib.import_module("rocm_patch.overrides.cudnn_flag")
assert anew is not cudnn_flag and not anew.real_flag()
undo_anew = anew.shield()
assert torch.backends.cudnn.enabled and not anew.real_flag()
undo_anew()
assert torch.backends.cudnn.enabled and not anew.real_flag()
undo()
assert cudnn_flag.real_flag() and anew.real_flag()
"""
    python("-c", SHIELD + code)


COMPILED = """
from torch._dynamo.testing import CompileCounter
compiles = CompileCounter()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)) == 1  # dynamo's tables are made
"""


def run_compiled(tmp_path, code, first=SHIELD, second=COMPILED):
    """Run a program from a file, since dynamo wants sources."""
    script = tmp_path / "compiled.py"
    script.write_text("import torch\n" + first + second + code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=clean_environ()
    )
    assert done.returncode == 0, done.stderr
    assert "recompile" not in done.stderr, done.stderr


@with_dynamo
@pytest.mark.parametrize("order", [(SHIELD, COMPILED), (COMPILED, SHIELD)], ids=["shield first", "dynamo first"])
def test_compiled_programs_read_and_set_their_own_value(tmp_path, order):
    code = """
def read(x):
    return x + (1 if torch.backends.cudnn.enabled else 0)

def beneath(x):
    return x + (1 if torch._C._get_cudnn_enabled() else 0)

def within(x):
    with torch.backends.cudnn.flags(enabled=False, benchmark=True):
        y = x + (1 if torch.backends.cudnn.enabled else 0)
        assert torch._C._get_cudnn_benchmark()
    return y

def off_beneath(x):
    torch._C._set_cudnn_enabled(False)
    y = x + (1 if torch.backends.cudnn.enabled else 0)
    torch._C._set_cudnn_enabled(True)
    return y

def off(x):
    torch.backends.cudnn.enabled = False
    return x + 1

zero = torch.zeros(1)
for fullgraph in (False, True):
    compiled = torch.compile(read, backend=compiles, fullgraph=fullgraph)
    assert compiled(zero) == 1 and compiled(zero) == 1
    torch.backends.cudnn.enabled = False
    assert compiled(zero) == 0
    torch.backends.cudnn.enabled = True
    assert compiled(zero) == 1
    torch._dynamo.reset()
assert torch.compile(beneath, backend=compiles)(zero) == 1
torch.backends.cudnn.enabled = False
assert torch.compile(beneath, backend=compiles)(zero) == 0
torch.backends.cudnn.enabled = True
assert torch.compile(off_beneath, backend=compiles)(zero) == 0
assert torch.backends.cudnn.enabled
assert torch.compile(within, backend=compiles)(zero) == 0
assert torch.backends.cudnn.enabled and not torch._C._get_cudnn_benchmark()
assert torch.compile(off, backend=compiles)(zero) == 1
assert not torch.backends.cudnn.enabled
torch.backends.cudnn.enabled = True
assert not cudnn_flag.real_flag()
undo()
assert cudnn_flag.real_flag()
"""
    run_compiled(tmp_path, code, *order)


@with_dynamo
def test_guards_agree_with_the_trace_from_whatever_frame_they_are_evaluated(tmp_path):
    # After a graph break the parts of a model are compiled for themselves, and called from frames of the model,
    # of torch.nn.modules and of dynamo: a guard that saw another value there would compile at every call.
    code = """
class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.norm(x) if torch.backends.cudnn.enabled else x
        torch._dynamo.graph_break()
        return y + (1 if torch.backends.cudnn.enabled else 0)

class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        torch._dynamo.graph_break()
        x = self.inner(x)
        torch._dynamo.graph_break()
        return plain(x)

def plain(x):
    torch._dynamo.graph_break()
    return x * (2 if torch.backends.cudnn.enabled else 1)

model, x = Outer(), torch.randn(2, 3, 4, 4)
expected = model(x)
compiled = torch.compile(model, backend=compiles)
torch.testing.assert_close(compiled(x), expected)
after_one = compiles.frame_count
assert after_one > 1
for _ in range(3):
    torch.testing.assert_close(compiled(x), expected)
assert compiles.frame_count == after_one, (compiles.frame_count, after_one)
"""
    run_compiled(tmp_path, code)


@with_dynamo
def test_inductor_and_export_leave_the_programs_value(tmp_path):
    code = """
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x) * (2 if torch.backends.cudnn.enabled else 1)

model, x = Model().eval(), torch.randn(2, 3, 4, 4)
with torch.no_grad():
    expected = model(x)
    torch.testing.assert_close(torch.compile(model)(x), expected)
    # Export sets the flag to False while it traces, and what it found afterwards.
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected / 2)
assert torch.backends.cudnn.enabled and not cudnn_flag.real_flag()
"""
    run_compiled(tmp_path, code)

"""The calls and orders of calls of the document's code, in our own words, under both names."""

import textwrap

import pytest

from conftest import python, rocm_patch
from rocm_patch import __version__

NAMES = ("patches", "rocm_patch")
DATASET = """
import torch
from torch.utils.data import DataLoader, TensorDataset
dataset = TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 2)
"""


def run(tmp_path, text, **environ):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(text))
    return python(str(path), **environ)


@pytest.mark.parametrize("name", NAMES)
def test_by_hand_in_the_documents_order(tmp_path, name):
    """Start method, variables, torch, loader, SafeConv2d: the first three by the user, the rest by us."""
    text = f"""
    import multiprocessing as mp
    import os
    mp.set_start_method("spawn", force=True)
    os.environ["MIOPEN_DEBUG_CONV_IMPLICIT_GEMM"] = "1"
    os.environ["HSA_OVERRIDE_GFX_VERSION"] = "10.3.0"
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from {name} import patch_dataloader
    patch_dataloader()
    from {name}.miopen_bypass.conv2d_fallback import SafeConv2d

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = SafeConv2d(3, 4, kernel_size=3)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, images):
            return self.head(self.conv(images).mean((2, 3)))

    def train():
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        dataset = TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 2)
        loader = DataLoader(dataset, batch_size=2, num_workers=4)
        assert loader.persistent_workers and loader.multiprocessing_context.get_start_method() == "spawn"
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("trained")

    if __name__ == "__main__":
        train()
    """
    assert run(tmp_path, text).stdout == "trained\n"


@pytest.mark.parametrize("name", NAMES)
def test_one_call_does_everything(tmp_path, name):
    """The document's snippet has no guard: its loader iterates all the same."""
    text = f"""
    from {name} import enable_all_patches
    status = enable_all_patches()
    assert status["multiprocessing"] and status["environment"] and status["dataloader"]
    import multiprocessing as mp, os
    {textwrap.indent(DATASET, "    ").strip()}
    loader = DataLoader(dataset, num_workers=4)
    print(len(list(loader)) == len(dataset), "batches")
    assert mp.get_start_method() == "spawn" and os.environ["HSA_USE_SVM"] == "0"
    print(status)
    """
    shown = run(tmp_path, text).stdout
    assert shown.count("applied") == 4 and "miopen_bypass" in shown and shown.count("True batches") == 1


@pytest.mark.parametrize("name", NAMES)
def test_known_issue_1_right_order_is_silent_wrong_order_warns_and_works(tmp_path, name):
    right = f"""
    from {name} import setup_multiprocessing
    assert setup_multiprocessing()
    import torch
    """
    assert run(tmp_path, right).stderr == ""
    wrong = f"""
    import torch, multiprocessing, warnings
    from {name} import setup_multiprocessing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert setup_multiprocessing() is True
    assert [w.category for w in caught] == [RuntimeWarning]
    assert multiprocessing.get_start_method() == "spawn"
    """
    run(tmp_path, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_known_issue_3_layer_by_layer_or_the_whole_model(tmp_path, name):
    text = f"""
    import torch
    from torch import nn
    from {name}.miopen_bypass.conv2d_fallback import SafeConv2d, patch_model
    conv = SafeConv2d(3, 64, kernel_size=3)
    assert conv(torch.randn(1, 3, 8, 8)).shape == (1, 64, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1)))
    patch_model(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Conv2d)] == [SafeConv2d, SafeConv2d]
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    """
    run(tmp_path, text)


@pytest.mark.parametrize("name", NAMES)
def test_migration_the_old_order_of_calls_still_works(tmp_path, name):
    text = f"""
    import multiprocessing as mp
    mp.set_start_method("spawn", force=True)
    import os
    os.environ["MIOPEN_DEBUG_CONV_IMPLICIT_GEMM"] = "1"
    {textwrap.indent(DATASET, "    ").strip()}
    from {name} import patch_dataloader
    patch_dataloader()
    from {name}.miopen_bypass.conv2d_fallback import (
        Conv2dBypassConfig, FallbackStrategy, SafeConv2d, enable_miopen_bypass, patch_model, patch_torch_nn,
        print_bypass_report,
    )
    loader = DataLoader(dataset, num_workers=4)
    assert len(list(loader)) == len(dataset)  # the document's code has no guard
    assert not enable_miopen_bypass(strategy=None) and not enable_miopen_bypass(FallbackStrategy.AUTO)
    patch_torch_nn(Conv2dBypassConfig(verbose=True))
    torch.nn.Conv2d(3, 2, 3)(torch.randn(1, 3, 8, 8))
    print_bypass_report()
    """
    done = run(tmp_path, text)
    assert "1  im2col     forward 1x3x8x8 by 2x3x3x3 float32 cpu" in done.stdout
    assert "-> im2col" in done.stderr


def test_real_world_validation_an_unguarded_script_that_asks_for_spawn_itself(tmp_path):
    """The document's "after" snippet, which Python by itself would start again in every worker."""
    path = tmp_path / "train.py"
    path.write_text(
        "import multiprocessing as mp\nmp.set_start_method('spawn', force=True)\n"
        + DATASET
        + "loader = DataLoader(dataset, num_workers=4)\nprint(len(list(loader)), mp.get_start_method())\n"
    )
    assert python(str(path), check=False).returncode
    assert rocm_patch("run", "-q", "--backend", "cpu", str(path)).stdout == "8 spawn\n"


def test_a_users_own_patches_folder_still_imports(tmp_path):
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "mine.py").write_text("value = 5")
    text = "import patches.mine, patches; print(patches.mine.value, patches.__version__)"
    assert run(tmp_path, text).stdout == f"5 {__version__}\n"
    (tmp_path / "patches" / "__init__.py").write_text("own = True")
    assert run(tmp_path, "import patches, patches.mine; print(patches.own, patches.mine.value)").stdout == "True 5\n"

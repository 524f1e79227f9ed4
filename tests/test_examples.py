"""The examples as a user starts them."""

import re

import pytest

from conftest import ROOT, python, rocm_patch


def test_complete_setup_trains_with_0_and_4_workers():
    shown = python(str(ROOT / "examples/complete_setup.py")).stdout
    losses = [float(x) for x in re.findall(r"workers=\d epoch \d: loss ([\d.]+)", shown)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "1 layers are Safe ones" in shown and "im2col" in shown
    assert "multiprocessing  applied" in shown and "dataloader       applied" in shown


def test_train_digits_is_the_same_plain_and_patched():
    script = str(ROOT / "examples/train_digits.py")
    assert "rocm_patch" not in (ROOT / "examples/train_digits.py").read_text()
    arguments = (script, "--epochs", "3", "--workers", "0", "--device", "cpu")
    plain = python(*arguments)
    patched = rocm_patch("run", "-q", "--backend", "cpu", "--log", "info", *arguments)
    numbers = [[float(n) for n in re.findall(r"([\d.]+)$", done.stdout, re.MULTILINE)] for done in (plain, patched)]
    (*losses, accuracy), (*patched_losses, patched_accuracy) = numbers
    assert len(losses) == 3 and patched_losses == pytest.approx(losses, rel=1e-3)
    assert abs(accuracy - patched_accuracy) < 0.01
    assert accuracy > 0.9
    assert "-> im2col" in patched.stderr and "-> im2col" not in plain.stderr


def test_train_digits_with_four_workers_under_run():
    script = str(ROOT / "examples/train_digits.py")
    done = rocm_patch("run", "-q", "--backend", "cpu", script, "--epochs", "1", "--device", "cpu")
    assert "test accuracy" in done.stdout

"""Whole models trained with the override and without, from the same weights: the same outputs, gradients, weights.

docs/MODELS.md has the large ones, by the same comparison.
"""

import sys

import pytest
import torch

from conftest import ROOT
from rocm_patch.overrides.aten import ACTIVE

sys.path.insert(0, str(ROOT / "benchmarks"))
import model_compare
from model_small import SMALL

BOUND = 1e-10


def assert_same(make, shape):
    """compare() itself asserts that every convolution was served."""
    report = model_compare.compare(make, (shape,), dtypes=(torch.float64,))["float64"]
    for part in model_compare.PARTS:
        worst = report["against_native"][part]
        assert worst["error"] <= BOUND, (part, worst)
        # A comparison in which nearly everything counts as zero would find nothing.
        assert worst["zero_but_for_rounding"] < worst["tensors"] / 2
    return report


@pytest.mark.parametrize("name", SMALL)
def test_small_models_train_as_natively(name):
    make, shape = SMALL[name]
    layers = sum(hasattr(layer, "dilation") and hasattr(layer, "weight") for layer in make().modules())
    report = assert_same(make, shape)
    # Results, gradients of inputs and of weights, of every layer, in every step.
    assert report["convolutions"] == 3 * layers * model_compare.STEPS


@pytest.mark.parametrize(("name", "side"), [("resnet18", 32), ("segmentation.lraspp_mobilenet_v3_large", 64)])
def test_torchvisions_models_train_as_natively(name, side):
    if not torch.__version__.startswith("1."):
        pytest.skip("the environment of the tests has a torchvision that fits torch on torch 1.13 only")
    models = pytest.importorskip("torchvision").models
    where, _, kind = name.rpartition(".")
    options = {"weights_backbone": None} if where else {}

    def make():
        return getattr(getattr(models, where) if where else models, kind)(weights=None, num_classes=5, **options)

    assert_same(make, (4, 3, side, side))


class Crooked(torch.nn.Module):
    """Does under the override what it does not natively."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(3, 2, 3), how

    def forward(self, x):
        x = self.first(x)
        if ACTIVE and self.how == "gradient":
            x.register_hook(lambda grad: grad * (1 + 1e-7))
        if ACTIVE and self.how == "one more":
            self.first(x[:, :2].detach())
        return self.second(x)


def test_a_gradient_that_is_slightly_wrong_is_found():
    report = model_compare.compare(lambda: Crooked("gradient"), ((2, 2, 8, 8),), dtypes=(torch.float64,))
    errors = {part: worst["error"] for part, worst in report["float64"]["against_native"].items()}
    assert errors["forward"] <= 1e-14
    assert errors["backward"] == pytest.approx(1e-7, rel=1e-3)
    assert errors["steps"] > BOUND / 10


def test_a_convolution_that_native_does_not_have_is_found():
    with pytest.raises(AssertionError, match="of 18 convolutions the override has served"):
        model_compare.compare(lambda: Crooked("one more"), ((2, 2, 8, 8),))
    assert not ACTIVE

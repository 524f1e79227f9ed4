"""The models that are compared: each made from its configuration with random weights, nothing is downloaded.

Images are small, so that all of it runs on a CPU in minutes. Batches are of four where a batch norm sees one pixel
per image: over two values it returns plus and minus one whatever comes in, and its gradient is rounding.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision_operators
from model_small import SMALL
from torch import nn


@dataclass(frozen=True)
class Entry:
    """Which group of the table a model is in, what makes it, and the shapes of its inputs."""

    family: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


class Called(nn.Module):
    """A model whose call takes more than tensors that have gradients."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self.model, *inputs)


def install_missing_operators() -> None:
    """What has to be set before these packages are imported, and what torchvision may lack."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torchvision_operators.on_import()


def torchvision_model(name: str, where: str = "", **options: Any) -> nn.Module:
    module = importlib.import_module(f"torchvision.models{where}")
    return getattr(module, name)(weights=None, **options)  # type: ignore[no-any-return]


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)  # type: ignore[no-any-return]


def narrow(name: str) -> nn.Module:
    """AlexNet or VGG with few features in its classifier, whose whole has nearly all its weights there."""
    model = torchvision_model(name)
    first = next(number for number, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear))
    wide = model.classifier[first].in_features
    model.classifier = nn.Sequential(nn.Linear(wide, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return model


def s3d() -> nn.Module:
    """With the pooling that 64x64 pixels need, in place of that for 224x224."""
    model = torchvision_model("s3d", ".video", num_classes=10)
    model.avgpool = nn.AvgPool3d(2)
    return model


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    sizes = {"stem_channels": 16, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8}
    return MaxVit((64, 64), partition_size=4, stochastic_depth_prob=0.1, num_classes=10, **sizes)


def mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    # Heads, channels in and out, and how queries, keys and values are pooled, by convolutions.
    blocks = [
        MSBlockConfig(1, 32, 64, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 64, 64, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(2, 64, 64, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    return MViT((64, 64), 8, blocks, residual_pool=False, residual_with_cls_embed=True, rel_pos_embed=False,
                proj_after_attn=False, num_classes=10)  # fmt: skip


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def resnet18_channels_last() -> nn.Module:
    model = torchvision_model("resnet18", num_classes=10).to(memory_format=torch.channels_last)
    return Called(model, lambda m, x: m(x.contiguous(memory_format=torch.channels_last)))


def detector(name: str, side: int = 96, **options: Any) -> nn.Module:
    """Returns the losses for two boxes per image."""
    if side != 300:
        options.update(min_size=side, max_size=side)
    model = torchvision_model(name, ".detection", weights_backbone=None, num_classes=5, **options)

    def call(model: nn.Module, images: torch.Tensor) -> Any:
        boxes = torch.tensor([[8.0, 10.0, 50.0, 60.0], [30.0, 20.0, 80.0, 70.0]], device=images.device).to(images)
        target = {"boxes": boxes, "labels": torch.tensor([1, 3], device=images.device)}
        target["masks"] = torch.zeros((2, *images.shape[2:]), dtype=torch.uint8, device=images.device)
        target["masks"][0, 10:60, 8:50] = target["masks"][1, 20:70, 30:80] = 1
        points = torch.rand((2, 17, 2), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(images)
        points = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])
        target["keypoints"] = torch.cat([points, torch.ones_like(points[..., :1])], 2).float()
        if name.startswith("keypoint"):
            target["labels"] = torch.ones_like(target["labels"])
        return model(list(images), [dict(target) for _ in images])

    return Called(model, call)


def yolo() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False)  # type: ignore[no-any-return]


def diffusers_unet(conditioned: bool) -> nn.Module:
    import diffusers

    options: dict[str, Any] = {"sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1}
    options["norm_num_groups"] = 8
    if conditioned:
        options.update(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16)
        options.update(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8)
        model = diffusers.UNet2DConditionModel(**options)
    else:
        options.update(down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8)
        options.update(up_block_types=("AttnUpBlock2D", "UpBlock2D"), in_channels=4, out_channels=4)
        model = diffusers.UNet2DModel(**options)
    return Called(model, lambda m, x, *more: m(x, torch.tensor([10, 500], device=x.device), *more))


def diffusers_vae() -> nn.Module:
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return diffusers.AutoencoderKL(block_out_channels=(32, 32, 64), norm_num_groups=8, **blocks)


CLASSIFIERS = [
    "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "wide_resnet50_2",
]  # fmt: skip
SEGMENTERS = ["deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
DETECTORS = [
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
]  # fmt: skip
VIDEO = ["mc3_18", "r3d_18", "r2plus1d_18", "swin3d_t"]
# One of each family, and what it is made with.
TIMM: dict[str, dict[str, Any]] = {
    name: {}
    for name in (
        "botnet26t_256", "coat_lite_tiny", "convformer_s18", "convmixer_768_32", "convnext_atto", "convnextv2_atto",
        "cs3darknet_s", "densenet121", "dla46_c", "dpn48b", "edgenext_xx_small",
        "efficientformerv2_s0", "efficientnet_b0", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim",
        "fasternet_t0", "fastvit_t8", "gernet_s", "ghostnet_050", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small",
        "inception_next_atto", "inception_resnet_v2", "inception_v4", "lambda_resnet26t", "lcnet_035",
        "legacy_seresnet18", "legacy_xception", "levit_conv_128s", "mambaout_femto", "mixnet_s",
        "mobilenetv3_small_050", "mobilevit_xxs", "mobilevitv2_050", "nasnetalarge", "nfnet_l0", "pnasnet5large",
        "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9",
        "res2net50_14w_8s", "resnest14d", "resnet10t", "resnetv2_18", "rexnet_100", "selecsls42", "shvit_s1",
        "skresnet18", "starnet_s050", "swiftformer_xs", "test_maxvit", "tresnet_m", "vit_tiny_patch16_224",
        "xception41", "xcit_nano_12_p16_224",
    )
}  # fmt: skip
SIZED = (
    "coat_lite_tiny", "efficientformerv2_s0", "efficientvit_m0", "levit_conv_128s", "test_maxvit",
    "vit_tiny_patch16_224", "botnet26t_256", "lambda_resnet26t",
)  # fmt: skip
# Batch norm over one pixel per image.
FOURS = {
    "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large", "resnest14d", "shvit_s1",
    "skresnet18",
}  # fmt: skip
OTHER_SIZES = {
    "inception_resnet_v2": 128,
    "inception_v4": 128,
    "nasnetalarge": 96,
    "pnasnet5large": 96,
}


def _shape(name: str, side: int = 64) -> tuple[tuple[int, ...], ...]:
    side = OTHER_SIZES.get(name, side)
    return ((4 if name in FOURS else 2, 3, side, side),)


def _zoo() -> dict[str, Entry]:
    zoo: dict[str, Entry] = {}

    def add(family: str, name: str, make: Callable[..., nn.Module], shapes: Any, *args: Any, **options: Any) -> None:
        key = {"timm": "timm/", "torchvision classification": "torchvision/"}.get(family, "") + name
        zoo[key] = Entry(family, lambda: make(*args, **options), shapes)

    family = "torchvision classification"
    for name in CLASSIFIERS:
        add(family, name, torchvision_model, _shape(name), name, num_classes=10)
    for name in ("alexnet", "vgg11", "vgg11_bn"):
        add(family, name, narrow, _shape(name), name)
    plain = {"num_classes": 10, "init_weights": True}
    add(family, "googlenet", torchvision_model, _shape(""), "googlenet", aux_logits=False, **plain)
    add(family, "inception_v3", torchvision_model, ((2, 3, 128, 128),), "inception_v3", aux_logits=False, **plain)
    add(family, "maxvit", maxvit, _shape(""))
    add(family, "vit", vit, _shape(""))
    add(family, "resnet18 channels_last", resnet18_channels_last, _shape(""))
    for name in SEGMENTERS:
        options = {"weights_backbone": None, "num_classes": 5}
        add("torchvision segmentation", name, torchvision_model, _shape(name), name, ".segmentation", **options)
    for name in DETECTORS:
        few = {"box_batch_size_per_image": 4, "rpn_pre_nms_top_n_train": 200} if "rcnn" in name else {}
        add("torchvision detection", name, detector, _shape("", 96), name, **few)
    for name in ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"):
        add("torchvision detection", name, detector, ((2 if "lite" in name else 1, 3, 96, 96),), name, 300)
    for name in VIDEO:
        add("torchvision video", name, torchvision_model, ((2, 3, 8, 32, 32),), name, ".video", num_classes=10)
    add("torchvision video", "mvit", mvit, ((2, 3, 8, 64, 64),))
    add("torchvision video", "s3d", s3d, ((2, 3, 16, 64, 64),))
    for name, options in TIMM.items():
        sized = {"img_size": _shape(name)[0][-1]} if name in SIZED else {}
        add("timm", name, timm_model, _shape(name), name, **options, **sized)
    add("ultralytics", "yolov8n", yolo, _shape(""))
    add("diffusers", "UNet2DModel", diffusers_unet, ((2, 4, 32, 32),), False)
    add("diffusers", "UNet2DConditionModel", diffusers_unet, ((2, 4, 32, 32), (2, 6, 16)), True)
    add("diffusers", "AutoencoderKL", diffusers_vae, ((2, 3, 32, 32),))
    for name, (make, shape) in SMALL.items():
        add("written here", name, make, (shape,))
    return zoo


ZOO = _zoo()

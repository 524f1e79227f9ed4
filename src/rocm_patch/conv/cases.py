"""Convolutions that tests, verification and benchmarks share: small ones, each for a reason, and real layers."""

from __future__ import annotations

from dataclasses import dataclass

from rocm_patch.conv.spec import ConvSpec, output_size


@dataclass(frozen=True)
class Case:
    """A plain convolution: shapes as in `ConvSpec`, and why it is tried."""

    why: str
    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def spec(
        self, direction: str, dtype: str = "float32", device: str = "cpu", channels_last: bool = False
    ) -> ConvSpec:
        """The case as a `ConvSpec`."""
        out = output_size(self.image[2:], self.weight[2:], self.stride, self.padding, self.dilation)
        return ConvSpec(
            direction, self.image, self.weight, self.stride, self.padding, self.dilation, self.groups, out,
            dtype, device, channels_last,
        )  # fmt: skip


CASES: tuple[Case, ...] = (
    Case("one tap", (3, 6, 9, 7), (5, 6, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("one tap with stride: skips positions", (2, 6, 9, 8), (5, 6, 1, 1), (2, 3), (0, 0), (1, 1)),
    Case("one tap with padding: not pointwise", (2, 4, 5, 5), (3, 4, 1, 1), (1, 1), (1, 2), (1, 1)),
    Case("3x3 as in every network", (4, 5, 11, 9), (7, 5, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("3x3 stride 2, last column unused", (2, 5, 10, 9), (4, 5, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("7x7 stride 2 stem", (2, 3, 23, 21), (8, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    Case("patches: stride equals kernel", (2, 3, 16, 16), (6, 3, 4, 4), (4, 4), (0, 0), (1, 1)),
    Case("dilated, unequal sides", (2, 4, 13, 15), (3, 4, 3, 2), (1, 2), (2, 1), (2, 3)),
    Case("even kernel", (2, 3, 8, 8), (4, 3, 2, 4), (1, 1), (1, 2), (1, 1)),
    Case("grouped", (2, 6, 8, 8), (9, 2, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    Case("depthwise with multiplier 2", (2, 4, 9, 9), (8, 1, 3, 3), (2, 2), (1, 1), (1, 1), 4),
    Case("padding beyond the kernel", (1, 2, 4, 4), (3, 2, 2, 2), (1, 1), (3, 3), (1, 1)),
    Case("one channel, one filter", (2, 1, 6, 6), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("42x42, where RDNA1 was reported to hang", (1, 3, 42, 42), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("1-d", (3, 4, 17), (6, 4, 5), (2,), (2,), (1,)),
    Case("1-d grouped, dilated", (2, 6, 20), (4, 3, 3), (1,), (4,), (4,), 2),
    Case("1-d one tap", (2, 4, 9), (3, 4, 1), (1,), (0,), (1,)),
    Case("3-d", (2, 3, 6, 7, 5), (4, 3, 3, 2, 3), (1, 1, 1), (1, 0, 1), (1, 1, 1)),
    Case("3-d strided, dilated, grouped", (2, 4, 9, 8, 7), (6, 2, 3, 3, 2), (2, 1, 2), (1, 2, 0), (1, 2, 1), 2),
    Case("3-d one tap with stride", (2, 3, 4, 5, 6), (4, 3, 1, 1, 1), (2, 1, 2), (0, 0, 0), (1, 1, 1)),
)

# The layers that convolution speed is judged by: of ResNet-50 at batch 32, YOLOv8n at 8, Stable Diffusion's UNet and
# VAE, two depthwise ones and one of ResNeXt. `why` is their name.
LAYERS: tuple[Case, ...] = (
    Case("r50.stem", (32, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    Case("r50.1x1a", (32, 64, 56, 56), (256, 64, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("r50.3x3a", (32, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("r50.3x3b", (32, 128, 28, 28), (128, 128, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("r50.3x3bs2", (32, 128, 56, 56), (128, 128, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("r50.3x3c", (32, 256, 14, 14), (256, 256, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("r50.3x3d", (32, 512, 7, 7), (512, 512, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("r50.1x1d", (32, 2048, 7, 7), (512, 2048, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case("yolo.stem", (8, 3, 640, 640), (16, 3, 3, 3), (2, 2), (1, 1), (1, 1)),
    Case("yolo.c2f", (8, 32, 160, 160), (32, 32, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("yolo.p4", (8, 128, 40, 40), (128, 128, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("sd.unet64", (2, 320, 64, 64), (320, 320, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("sd.unet16", (2, 1280, 16, 16), (1280, 1280, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("sd.vae256", (1, 256, 256, 256), (256, 256, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("sd.vae512", (1, 128, 512, 512), (128, 128, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case("dw.3x3", (32, 144, 56, 56), (144, 1, 3, 3), (1, 1), (1, 1), (1, 1), 144),
    Case("dw.5x5s2", (32, 240, 28, 28), (240, 1, 5, 5), (2, 2), (2, 2), (1, 1), 240),
    Case("grp32.3x3", (32, 128, 56, 56), (128, 4, 3, 3), (1, 1), (1, 1), (1, 1), 32),
)

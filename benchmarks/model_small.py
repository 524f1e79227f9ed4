"""Small models in plain torch, of the kinds that the zoo's packages do not have; the tests train them too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class UNet3d(nn.Module):
    """Two levels down and up: strided 3-d convolutions, transposed ones back, skip connections."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()

        def block(c_in: int, c_out: int) -> nn.Module:
            first, second = nn.Conv3d(c_in, c_out, 3, padding=1), nn.Conv3d(c_out, c_out, 3, padding=1)
            return nn.Sequential(first, nn.BatchNorm3d(c_out), nn.ReLU(), second, nn.InstanceNorm3d(c_out), nn.SiLU())

        sizes = [channels, 2 * channels, 4 * channels]
        self.enter = block(1, sizes[0])
        self.shrink = nn.ModuleList([nn.Conv3d(c, c, 2, stride=2) for c in sizes[:2]])
        self.down = nn.ModuleList([block(sizes[0], sizes[1]), block(sizes[1], sizes[2])])
        self.grow = nn.ModuleList([nn.ConvTranspose3d(2 * c, c, 2, stride=2) for c in reversed(sizes[:2])])
        self.up = nn.ModuleList([block(2 * c, c) for c in reversed(sizes[:2])])
        self.leave = nn.Conv3d(sizes[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        kept = []
        for shrink, down in zip(self.shrink, self.down, strict=True):
            kept.append(x)
            x = down(shrink(x))
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([grow(x), kept.pop()], 1))
        return self.leave(x)


class WaveNet(nn.Module):
    """Gated, dilated 1-d convolutions with padding on the left only, residual and skip connections."""

    def __init__(self, channels: int = 8, depth: int = 6, classes: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, channels, 1)
        self.gated = nn.ModuleList([nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(depth)])
        self.residual = nn.ModuleList([nn.Conv1d(channels, channels, 1) for _ in range(depth)])
        self.skip = nn.ModuleList([nn.Conv1d(channels, channels, 1) for _ in range(depth)])
        self.leave = nn.Sequential(
            nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, classes, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        total = torch.zeros_like(x)
        for gated, residual, skip in zip(self.gated, self.residual, self.skip, strict=True):
            signal, gate = gated(F.pad(x, (gated.dilation[0], 0))).chunk(2, 1)
            out = torch.tanh(signal) * torch.sigmoid(gate)
            total = total + skip(out)
            x = x + residual(out)
        # The last state too, so that no layer is without a gradient.
        return self.leave(total + x)


def dcgan_generator(noise: int = 16, channels: int = 8) -> nn.Module:
    """From (N, noise, 1, 1) to images of 32x32 by transposed convolutions."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(noise, 4 * channels, 4, bias=False)]
    for c_in, c_out in ((4 * channels, 2 * channels), (2 * channels, channels)):
        layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.ConvTranspose2d(channels, 3, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers)


def mobile_net(channels: int = 8) -> nn.Module:
    """Expansion, depthwise, grouped and pointwise convolutions, strided, with and without dilation."""

    def block(c_in: int, c_out: int, kernel: int, stride: int, dilation: int = 1) -> list[nn.Module]:
        hidden, padding = 4 * c_in, dilation * (kernel // 2)
        return [
            nn.Conv2d(c_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel, stride, padding, dilation, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, c_out, 1, groups=2, bias=False), nn.BatchNorm2d(c_out),
        ]  # fmt: skip

    stem = [nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.Hardswish()]
    body = [*block(channels, channels, 3, 1), *block(channels, 2 * channels, 5, 2), *block(2 * channels, 16, 3, 1, 2)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10))


class ResidualBlock(nn.Module):
    """The block of a ResNet that halves the image, with its 1x1 shortcut, in channels_last throughout."""

    def __init__(self, c_in: int = 8, c_out: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, 2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(c_out) for _ in range(3)])
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.norms[0](self.first(x)).relu()
        y = self.norms[1](self.second(y)) + self.norms[2](self.shortcut(x))
        return y.relu()


# What makes each, and the shape of its input.
SMALL = {
    "unet3d": (UNet3d, (2, 1, 16, 16, 8)),
    "wavenet": (WaveNet, (2, 1, 200)),
    "dcgan": (dcgan_generator, (4, 16, 1, 1)),
    "mobilenet_like": (mobile_net, (4, 3, 24, 24)),
    "residual_block_channels_last": (ResidualBlock, (2, 8, 14, 14)),
}

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy==2.4.6"]
#
# [tool.programs]
# about = "A 1-d GAN vocoder as HiFi-GAN: transposed and dilated convolutions with weight norm, mel loss by stft"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 120
# ///
import argparse
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

RATE, N_FFT, HOP, MELS = 8000, 256, 64, 40


def mel_filters():
    def mel(hz):
        return 2595 * torch.log10(1 + torch.as_tensor(hz) / 700)

    edges = 700 * (10 ** (torch.linspace(0, mel(RATE / 2).item(), MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, N_FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


class MelSpectrogram(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("filters", mel_filters())
        self.register_buffer("window", torch.hann_window(N_FFT))

    def forward(self, audio):
        pad = (N_FFT - HOP) // 2
        audio = F.pad(audio, (pad, pad), mode="reflect").squeeze(1)
        spectrum = torch.stft(audio, N_FFT, HOP, window=self.window, center=False, return_complex=True)
        magnitude = (torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9).sqrt()
        return torch.log((self.filters @ magnitude).clamp(min=1e-3))


class ResBlock(nn.Module):
    def __init__(self, channels, kernel, dilations=(1, 3, 5)):
        super().__init__()
        self.dilated = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2))
            for d in dilations
        )
        self.plain = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, padding=kernel // 2)) for _ in dilations
        )

    def forward(self, x):
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nn.Module):
    def __init__(self, channels=48, rates=(8, 4, 2), kernels=(3, 7)):
        super().__init__()
        self.pre = weight_norm(nn.Conv1d(MELS, channels, 7, padding=3))
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            up = nn.ConvTranspose1d(channels, channels // 2, 2 * rate, stride=rate, padding=rate // 2)
            channels //= 2
            self.ups.append(weight_norm(up))
            self.blocks.append(nn.ModuleList(ResBlock(channels, kernel) for kernel in kernels))
        self.post = weight_norm(nn.Conv1d(channels, 1, 7, padding=3))

    def forward(self, mel):
        x = self.pre(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(block(x) for block in blocks) / len(blocks)
        return torch.tanh(self.post(F.leaky_relu(x)))


class PeriodDiscriminator(nn.Module):
    def __init__(self, period):
        super().__init__()
        self.period = period
        sizes = [1, 8, 16, 32]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0))) for a, b in pairwise(sizes)
        )
        self.post = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, audio):
        audio = F.pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect")
        x = audio.view(*audio.shape[:2], -1, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.post(x).flatten(1), features


class ScaleDiscriminator(nn.Module):
    """Strided, grouped convolutions with long kernels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                spectral_norm(nn.Conv1d(1, 16, 15, padding=7)),
                spectral_norm(nn.Conv1d(16, 32, 41, stride=4, groups=4, padding=20)),
                spectral_norm(nn.Conv1d(32, 64, 41, stride=4, groups=16, padding=20)),
                spectral_norm(nn.Conv1d(64, 64, 5, padding=2)),
            ]
        )
        self.post = spectral_norm(nn.Conv1d(64, 1, 3, padding=1))

    def forward(self, audio):
        x, features = audio, []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.post(x).flatten(1), features


def utterances(count, length, generator):
    """Sums of a few harmonics with a slow vibrato."""
    t = torch.arange(length) / RATE
    pitch = 120 + 200 * torch.rand(count, 1, generator=generator)
    vibrato = 1 + 0.02 * torch.sin(2 * torch.pi * 5 * t)
    phase = 2 * torch.pi * torch.cumsum(pitch * vibrato / RATE, 1)
    audio = sum(torch.sin(n * phase) / n for n in range(1, 6))
    return (0.3 * audio + 0.01 * torch.randn(count, length, generator=generator))[:, None]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = args.device

    mel = MelSpectrogram().to(device)
    generator = Generator().to(device)
    critics = nn.ModuleList([*(PeriodDiscriminator(p) for p in (2, 3, 5)), ScaleDiscriminator()]).to(device)
    options = {"lr": 2e-4, "betas": (0.8, 0.99)}
    optim_g = torch.optim.AdamW(generator.parameters(), **options)
    optim_d = torch.optim.AdamW(critics.parameters(), **options)
    data = torch.Generator().manual_seed(1)
    for step in range(5):
        real = utterances(2, 2048, data).to(device)
        spectrum = mel(real)
        fake = generator(spectrum)

        loss_d = 0
        for critic in critics:
            loss_d = loss_d + (critic(real)[0] - 1).pow(2).mean() + critic(fake.detach())[0].pow(2).mean()
        optim_d.zero_grad()
        loss_d.backward()
        optim_d.step()

        loss_mel = F.l1_loss(mel(fake), spectrum)
        loss_adversarial, loss_feature = 0, 0
        for critic in critics:
            score, features = critic(fake)
            with torch.no_grad():
                wanted = critic(real)[1]
            loss_adversarial = loss_adversarial + (score - 1).pow(2).mean()
            loss_feature = loss_feature + sum(F.l1_loss(a, b) for a, b in zip(features, wanted, strict=True))
        loss_g = 45 * loss_mel + 2 * loss_feature + loss_adversarial
        optim_g.zero_grad()
        loss_g.backward()
        optim_g.step()
        print(
            f"step {step}: discriminators {loss_d.item():.6f} mel {loss_mel.item():.6f} "
            f"features {loss_feature.item():.6f} adversarial {loss_adversarial.item():.6f}"
        )

    generator.eval()
    with torch.inference_mode():
        audio = generator(mel(utterances(1, 4096, data).to(device)))
    print(f"generated {tuple(audio.shape)} rms {audio.pow(2).mean().sqrt():.6f} peak {audio.abs().max():.6f}")


if __name__ == "__main__":
    main()

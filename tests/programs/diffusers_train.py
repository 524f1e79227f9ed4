# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1",
#   "anyio==4.16.0", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3", "click==8.5.1", "h11==0.16.0",
#   "hf-xet==1.8.0", "httpcore2==2.16.2", "httpx2==2.16.2", "huggingface-hub==2.4.0", "idna==3.20",
#   "importlib-metadata==10.2.0", "lazy-importer==0.1.0", "numpy==2.4.6", "packaging==26.4", "pillow==13.0.0",
#   "pyyaml==6.0.4", "regex==2026.11.19", "requests==2.34.2", "safetensors==0.8.0", "tqdm==4.70.1",
#   "truststore==0.10.5", "urllib3==2.8.0", "zipp==4.1.2",
# ]
#
# [tool.programs]
# about = "diffusers: an unconditional and a latent, conditioned model trained, saved, loaded, sampled, decoded"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 80
# ///
import argparse

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.nn import functional as F


def describe(what, tensor):
    tensor = tensor.float()
    print(f"{what}: mean {tensor.mean():.6f} std {tensor.std():.6f} min {tensor.min():.5f} max {tensor.max():.5f}")


def gradients(count, size, generator):
    """Smooth images between -1 and 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    weights = torch.rand(count, 3, 2, generator=generator) * 2 - 1
    return torch.tanh(weights[..., 0, None, None] * x + weights[..., 1, None, None] * y)


def unconditional(device):
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    ).to(device)  # fmt: skip
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=5)
    ema = EMAModel(model.parameters(), decay=0.9)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        clean = gradients(4, 32, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (4,), generator=generator)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps).to(device)
        loss = F.mse_loss(model(noisy, timesteps.to(device), return_dict=False)[0], noise.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        print(f"step {step} loss {loss.item():.6f}")
    ema.copy_to(model.parameters())

    DDPMPipeline(unet=model, scheduler=noise_scheduler).save_pretrained("ddpm")
    pipeline = DDPMPipeline.from_pretrained("ddpm", local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=6, output_type="np", generator=torch.Generator().manual_seed(2)
    ).images
    describe("DDPM images", torch.from_numpy(images))


def latent(device):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=8, sample_size=64,
    ).to(device)  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    ).to(device)  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    images = gradients(4, 64, generator).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4)
    for step in range(3):
        posterior = vae.encode(images).latent_dist
        loss = F.mse_loss(vae.decode(posterior.mode()).sample, images) + 1e-4 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"autoencoder step {step} loss {loss.item():.6f}")

    vae.requires_grad_(False)
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    prompts = torch.randn(4, 6, 32, generator=generator).to(device)
    unet.train()
    for step in range(4):
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps = torch.randint(0, 1000, (4,), generator=generator).to(device)
        loss = F.mse_loss(unet(scheduler.add_noise(latents, noise, timesteps), timesteps, prompts).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"latent step {step} loss {loss.item():.6f}")

    unet.eval()
    scheduler.set_timesteps(5)
    sample = torch.randn(1, 4, 16, 16, generator=generator).to(device) * scheduler.init_noise_sigma
    context = torch.cat([torch.zeros_like(prompts[:1]), prompts[:1]])
    with torch.no_grad():
        for t in scheduler.timesteps:
            without, with_prompt = unet(torch.cat([sample] * 2), t, encoder_hidden_states=context).sample.chunk(2)
            sample = scheduler.step(without + 3 * (with_prompt - without), t, sample).prev_sample
        describe("latents", sample)
        vae.enable_tiling()
        describe("decoded image", vae.decode(sample / vae.config.scaling_factor).sample)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    unconditional(args.device)
    latent(args.device)


if __name__ == "__main__":
    main()

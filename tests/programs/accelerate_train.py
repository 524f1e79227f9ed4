# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "accelerate==1.15.0",
#   "anyio==4.16.0", "click==8.5.1", "h11==0.16.0", "hf-xet==1.8.0", "httpcore2==2.16.2", "httpx2==2.16.2",
#   "huggingface-hub==2.4.0", "idna==3.20", "numpy==2.4.6", "packaging==26.4", "psutil==7.2.2", "pyyaml==6.0.4",
#   "safetensors==0.8.0", "tqdm==4.70.1", "truststore==0.10.5",
# ]
#
# [tool.programs]
# about = "accelerate, by `accelerate launch`: its loaders with workers, accumulated and clipped gradients, metrics"
# command = [
#   "accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
#   "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "{program}",
# ]
# rtol = 1e-3
# atol = 1e-4
# routes = 20
# ///
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Waves(Dataset):
    """Noisy two-channel signals; the class is the frequency."""

    def __init__(self, length, offset=0):
        self.length, self.offset = length, offset

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.offset + index)
        label = index % 4
        t = torch.linspace(0, 6.28, 128)
        phase = 6.28 * torch.rand(2, 1, generator=generator)
        return torch.sin((2 + 3 * label) * t + phase) + 0.3 * torch.randn(2, 128, generator=generator), label


class Block(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(channels, channels, 1)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 32, 7, stride=2, padding=3),
            *(Block(32, 2**n) for n in range(4)),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(3)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_loader = DataLoader(Waves(96), batch_size=8, shuffle=True, num_workers=2)
    eval_loader = DataLoader(Waves(22, offset=1000), batch_size=8, num_workers=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=24)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    accelerator.print(f"{accelerator.num_processes} process, {accelerator.distributed_type}")
    for epoch in range(2):
        model.train()
        for step, (signals, labels) in enumerate(train_loader):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(signals), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    accelerator.print(f"gradient norm {norm:.6f}")
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            mean = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.print(f"epoch {epoch} step {step} loss {mean:.6f}")
        model.eval()
        correct, total, losses = 0, 0, []
        for signals, labels in eval_loader:
            with torch.no_grad():
                logits = model(signals)
            logits, labels = accelerator.gather_for_metrics((logits, labels))
            correct += (logits.argmax(1) == labels).sum().item()
            total += len(labels)
            losses.append(F.cross_entropy(logits, labels).item())
        accelerator.print(f"accuracy {correct / total:.4f} of {total}, loss {sum(losses) / len(losses):.6f}")
    accelerator.wait_for_everyone()
    accelerator.save_model(model, "saved")
    accelerator.end_training()


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "lightning==2.6.6",
#   "aiohappyeyeballs==2.7.1", "aiohttp==3.14.5", "aiosignal==1.4.0", "attrs==26.1.0", "frozenlist==1.8.0",
#   "idna==3.20", "lightning-utilities==0.15.3", "multidict==7.2.1", "numpy==2.4.6", "packaging==26.4",
#   "propcache==0.5.4", "pytorch-lightning==2.6.6", "pyyaml==6.0.4", "torchmetrics==1.9.0", "tqdm==4.70.1",
#   "yarl==1.25.1",
# ]
#
# [tool.programs]
# about = "Lightning: Trainer.fit, validate and predict with persistent workers, a checkpoint and torchmetrics"
# devices = ["cpu", "cuda"]
# rtol = 1e-3
# atol = 1e-4
# routes = 12
# ///
import argparse
import logging

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class Digits(Dataset):
    """Noisy 28x28 images of bars; the class is how many."""

    def __len__(self):
        return 160

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 5
        image = 0.3 * torch.randn(1, 28, 28, generator=generator)
        for bar in range(label):
            image[:, :, 3 + 5 * bar : 5 + 5 * bar] += 1
        return image, label


class DigitsData(L.LightningDataModule):
    def setup(self, stage):
        self.train, self.val = random_split(Digits(), [128, 32], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True, num_workers=2, persistent_workers=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=16, num_workers=2, persistent_workers=True)


class ConvNet(L.LightningModule):
    def __init__(self, width=16, lr=0.02):
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, 2 * width, 1),
            nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 5, stride=2, padding=2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, 5)
        self.accuracy = MulticlassAccuracy(num_classes=5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y), on_epoch=True)
        self.log("val_accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Printer(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print(f"epoch {trainer.current_epoch} batch {batch_idx} loss {outputs['loss'].item():.6f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    L.seed_everything(7, workers=True, verbose=False)
    checkpoint = ModelCheckpoint(dirpath="checkpoints", monitor="val_loss", filename="{epoch}")
    trainer = L.Trainer(
        max_epochs=3, accelerator="gpu" if args.device == "cuda" else "cpu", devices=1, logger=False,
        callbacks=[checkpoint, Printer()], enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, gradient_clip_val=1.0,
    )  # fmt: skip
    model, data = ConvNet(), DigitsData()
    trainer.fit(model, datamodule=data)
    metrics = trainer.validate(model, datamodule=data, verbose=False)[0]
    print(" ".join(f"{name} {value:.6f}" for name, value in sorted(metrics.items())))

    best = ConvNet.load_from_checkpoint(checkpoint.best_model_path, weights_only=True)
    print("best", checkpoint.best_model_path.rsplit("/", 1)[-1], f"{checkpoint.best_model_score:.6f}")
    predictions = torch.cat(trainer.predict(best, DataLoader(torch.stack([Digits()[n][0] for n in range(4)]))))
    for row in predictions.cpu().tolist():
        print("logits", " ".join(f"{value:.5f}" for value in row))


if __name__ == "__main__":
    main()

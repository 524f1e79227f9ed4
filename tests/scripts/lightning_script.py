import lightning as L
import torch
from torch.utils.data import DataLoader


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.zeros(64, 4), batch_size=8, num_workers=4)


trainer = L.Trainer(max_epochs=1)
train_loader = DataLoader(torch.zeros(64, 4), batch_size=8, num_workers=4)
trainer.fit(Module(), train_loader)  # expect: missing-guard

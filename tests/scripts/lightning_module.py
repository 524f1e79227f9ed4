import lightning as L
import torch
from torch.utils.data import DataLoader


class Loader(DataLoader):
    def __init__(self, data):
        super().__init__(data, num_workers=2)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def train_dataloader(self):
        return Loader(torch.zeros(64, 4))

    def training_step(self, batch, index):
        return self.layer(batch).mean()


module = Module()
L.Trainer(max_epochs=1).fit(module)  # expect: missing-guard

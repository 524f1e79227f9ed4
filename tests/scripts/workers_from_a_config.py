import yaml
from torch.utils.data import DataLoader

with open("config.yaml") as file:
    config = yaml.safe_load(file)


def loop(loader):
    return [batch for batch in loader]


loaders = {split: DataLoader(range(8), num_workers=config["workers"]) for split in ("train", "valid")}
loop(loaders["train"])  # expect: missing-guard

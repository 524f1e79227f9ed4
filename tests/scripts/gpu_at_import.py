import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.cuda.set_device(0)  # expect: gpu-at-import
device = "cuda:0"
model = nn.Sequential(
    nn.Linear(4, 4),
).to(device)  # expect: gpu-at-import
mean = torch.tensor([0.5], device=device)  # expect: gpu-at-import
weights = torch.ones(4).cuda()  # expect: gpu-at-import
criterion = nn.CrossEntropyLoss()


def main():
    loader = DataLoader(TensorDataset(torch.zeros(8, 4)), num_workers=2)
    for (batch,) in loader:
        print(criterion(model(batch.cuda() - mean), weights.long()))


if __name__ == "__main__":
    main()

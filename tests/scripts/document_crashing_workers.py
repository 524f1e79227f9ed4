import torch
from torch.utils.data import DataLoader, TensorDataset

dataset = TensorDataset(torch.zeros(8))
# DataLoader with workers crashes
loader = DataLoader(dataset, num_workers=4)
for batch in loader:  # expect: missing-guard
    print(batch)

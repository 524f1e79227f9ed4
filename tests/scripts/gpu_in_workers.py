import torch
from torch.utils.data import DataLoader, Dataset

device = torch.device("cuda:0")


class OnGpu(Dataset):
    def __init__(self, device="cuda"):
        self.device = device
        self.table = torch.zeros(8)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = self.table[index].to(self.device)  # expect: gpu-in-worker
        return row + torch.ones(1, device=device)  # expect: gpu-in-worker


def collate(rows):
    return torch.stack(rows).cuda()  # expect: gpu-in-worker


def prepare(worker):
    torch.cuda.set_device(0)  # expect: gpu-in-worker


def main():
    loader = DataLoader(OnGpu(), num_workers=2, collate_fn=collate, worker_init_fn=prepare)
    for batch in loader:
        print(batch.to(device))


if __name__ == "__main__":
    main()

import torch
import torch.utils.data as data
from tqdm import tqdm


class Squares(data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.tensor(index**2)


def make_loader(workers=4):
    return data.DataLoader(Squares(), batch_size=10, num_workers=workers)


def main():
    loader = make_loader()
    for epoch in range(2):
        for step, batch in enumerate(tqdm(loader)):
            print(epoch, step, batch.sum())


main()  # expect: missing-guard

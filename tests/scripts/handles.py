import sqlite3
import threading

import h5py
import torch
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, path):
        self.file = h5py.File(path)  # expect: handle-to-loader
        self.lock = threading.Lock()  # expect: handle-to-loader
        with open(path) as lines:
            self.lines = lines.read()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with self.lock:
            return torch.from_numpy(self.file["rows"][index])


class Records(Dataset):
    def __init__(self, database):
        self.database = database

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.database.execute("select x from t where id = ?", (index,)).fetchone()


if __name__ == "__main__":
    for loader in (
        DataLoader(Rows("rows.h5"), num_workers=2),
        DataLoader(Records(sqlite3.connect("t.db")), num_workers=2),  # expect: handle-to-loader
    ):
        print(list(loader))

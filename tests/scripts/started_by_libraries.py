"""Commands and threads that iterate."""

import threading

import torch
import typer
from torch.utils.data import DataLoader

app = typer.Typer()


@app.command()
def train(workers: int = 2):
    for batch in DataLoader(torch.zeros(8), num_workers=workers):
        print(batch)


def look():
    print(torch.__version__)


threading.Thread(target=look).start()
app()  # expect: missing-guard

import multiprocessing as mp

import torch

mp.set_start_method("spawn")  # expect: torch-before-environment


def main():
    print(torch.zeros(1))


if __name__ == "__main__":
    main()

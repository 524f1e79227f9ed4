"""Forks where no worker touches the GPU, and says so: clean."""

from torch.utils.data import DataLoader


def main():
    loader = DataLoader(
        list(range(8)),
        num_workers=2,
        multiprocessing_context="fork",  # rocm-patch: ignore[fork-asked-for]
    )
    print(list(loader))
    print(list(DataLoader([1], num_workers=2, multiprocessing_context="spawn")))


if __name__ == "__main__":
    main()

import argparse
import os
from os import environ


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gfx", default="10.3.0")
    return parser.parse_args()


def configure(gfx):
    environ["HSA_OVERRIDE_GFX_VERSION"] = gfx  # expect: torch-before-environment


def never_called():
    os.environ["MIOPEN_FIND_MODE"] = "FAST"


def main():
    arguments = parse()
    import torchvision.models as models

    configure(arguments.gfx)
    print(models.resnet18())


main()

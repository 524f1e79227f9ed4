import torch
from patches import setup_multiprocessing
setup_multiprocessing()  # expect: torch-before-environment

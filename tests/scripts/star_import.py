from torch.utils.data import *
from torch import *

data = TensorDataset(zeros(8))
while True:
    batches = [batch for batch in DataLoader(data, 2, True, None, None, 4)]  # expect: missing-guard
    break

"""The tests import the five files from the folder above."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)             # most matrices here are so small that a second thread costs more than it gives

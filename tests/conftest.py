"""The tests import the five files from the folder above."""
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)             # most matrices here are so small that a second thread costs more than it gives
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job, as CI may be, ignores Ctrl-C

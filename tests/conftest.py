"""What all tests share."""

import torch
from hypothesis import settings

# The tensors here are small: a second thread costs more than it brings, above all on busy machines.
torch.set_num_threads(1)

# Machines that run tests are noisy: how long an example takes says nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

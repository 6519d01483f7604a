"""A tiny random M3 (float32, CPU) whose answers depend on everything it has read."""

import pytest
import torch
from engine_tiny import tiny_config

from openm3.model import M3


@pytest.fixture(scope="session")
def model() -> M3:
    torch.manual_seed(0)
    model = M3(tiny_config()).eval()
    model.reset_parameters(std=0.15)
    return model

"""Fixed seeds for the samplers' tests; what they state holds for any."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

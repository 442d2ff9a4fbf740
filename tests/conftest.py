import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """Two workers share two cores, and every test draws the same numbers whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

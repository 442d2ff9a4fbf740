import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever test is first


@pytest.fixture(autouse=True)
def _reproducible():
    """Two workers share two cores, and every test draws the same numbers whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # as experiments leave it otherwise


@pytest.fixture
def nothing_compiled():
    """By tests before this one, nor by this one for others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

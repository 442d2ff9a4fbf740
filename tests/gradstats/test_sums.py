"""What raw sums are formed of."""

import pytest
import torch
from torch import Tensor, nn

from gradstats.sums import addressable


class Own(Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2), True),
        (nn.Parameter(torch.zeros(2)), True),  # optimizers give them to kernels
        (torch.zeros(2, 2).T, True),
        (torch.zeros(2).as_subclass(Own), False),
        (torch.zeros(2).to_sparse(), False),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, False),
        (torch._efficientzerotensor((2,)), False),
    ],
    ids=["tensor", "parameter", "view", "subclass", "sparse", "negated", "zeros"],
)
def test_addressable(x, expected):
    assert addressable(x) is expected

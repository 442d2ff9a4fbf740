"""What is refused or mended when a state is loaded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, attach
from gradstats.optim import (
    BatchInvariantAdam,
    BatchInvariantSGD,
)
from tests.gradstats.optim.problem import problem, train


def test_options_that_an_older_state_dict_lacks_are_the_defaults():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    train(model, optimizer, x, y, [8])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["amsgrad"], group["examples"]
    restored = BatchInvariantAdam(model.parameters(), batch_size=16)
    restored.load_state_dict(state)
    assert restored.param_groups[0]["amsgrad"] is False
    train(model, restored, x, y, [8])


def test_a_frozen_option_is_checked_when_loaded():
    model = nn.Linear(2, 2)
    state = BatchInvariantAdam(model.parameters()).state_dict()
    state["param_groups"][0]["average"] = "exponential"
    with pytest.raises(GradstatsError, match="debiased_ewma"):
        BatchInvariantAdam(model.parameters()).load_state_dict(state)


def test_states_of_others_are_refused():
    model, x, y = problem()
    F.cross_entropy(model(x), y).backward()
    theirs = torch.optim.Adam(model.parameters())
    theirs.step()
    optimizer = BatchInvariantAdam(model.parameters())
    with pytest.raises(GradstatsError, match=r"does not count examples.*from_torch"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state
    a, b = (nn.Parameter(torch.zeros(shape)) for shape in ((4, 5), (5, 4)))
    saved = BatchInvariantSGD([a, b], momentum=0.9)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    saved.step(batch_size=1)
    with pytest.raises(GradstatsError, match=r"'momentum_buffer' \(4, 5\).*shape \(5, 4\).*order"):
        BatchInvariantSGD([b, a], momentum=0.9).load_state_dict(saved.state_dict())

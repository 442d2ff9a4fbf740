"""What the states of many parameters have seen, in one piece of memory that stays the states' own."""

import copy
import io

import pytest
import torch
from torch import nn

import gradstats
from gradstats.optim import BatchInvariantAdam
from gradstats.optim.tally import Tally


def states(*counts):
    return [{"step": torch.tensor(count)} for count in counts]


def test_counts_are_the_states_own():
    """They are read wherever the states changed them, and the states see what is added."""
    tally, held = Tally(), states(3, 5)
    assert tally.of(held, "step") == [[3, 5]]
    tally.add(4)
    assert [int(state["step"]) for state in held] == [7, 9]
    held[0]["step"].fill_(20)
    held[1]["step"] += 1
    assert tally.of(held, "step") == [[20, 10]]
    assert all(state["step"].dtype == torch.int64 and state["step"].shape == () for state in held)


def test_several_counts_of_a_state():
    """Each by its own number; and of those that come later, from where they are."""
    tally, held = Tally(), states(3, 5)
    tally.of(held, "step")
    tally.add(1)
    for state in held:
        state["later"] = torch.tensor(10)
    assert tally.of(held, "step", "later") == [[4, 6], [10, 10]]
    tally.add(2, 7)
    assert [(int(state["step"]), int(state["later"])) for state in held] == [(6, 17), (8, 17)]
    held[1]["later"] = torch.tensor(0)
    assert tally.of(held, "step", "later") == [[6, 8], [17, 0]]


def test_others_are_counted_apart():
    """A state that is not asked for keeps what it had seen, and one that was replaced is read anew."""
    tally, held = Tally(), states(1, 2, 3)
    tally.of(held, "step")
    assert tally.of(held[:2], "step") == [[1, 2]]
    tally.add(10)
    assert [int(state["step"]) for state in held] == [11, 12, 3]
    held[0]["step"] = torch.tensor(100)
    assert tally.of(held, "step") == [[100, 12, 3]]


def test_copies_and_files_have_numbers_of_their_own():
    tally, held = Tally(), states(1, 2)
    tally.of(held, "step")
    copied, file = copy.deepcopy(held), io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    loaded = torch.load(file)
    tally.add(5)
    for other in (copied, loaded):
        assert Tally().of(other, "step") == [[1, 2]] and [int(state["step"]) for state in held] == [6, 7]


def move(steps):
    """What is done to all tensors of a state, to have them on another device."""
    for step in steps:
        step.data = step.data.clone()


def swap(steps):
    torch.utils.swap_tensors(steps[1], torch.tensor(70))


@pytest.mark.parametrize(("change", "seen"), [(move, [7, 9]), (swap, [7, 70])])
def test_counts_that_were_moved(change, seen):
    """The states hold the same tensors, whose numbers are elsewhere from then on."""
    tally, held = Tally(), states(3, 5)
    tally.of(held, "step")
    tally.add(4)
    change([state["step"] for state in held])
    assert tally.of(held, "step") == [seen]
    tally.add(4)
    assert [int(state["step"]) for state in held] == [count + 4 for count in seen]


def test_counts_that_are_shared_with_another_process():
    """As what a queue sends to one is: it sees every step that is taken here."""
    model = nn.Linear(3, 2)
    gradstats.attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=1e-3, batch_size=2)
    for step in range(3):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            shared = [optimizer.state[p]["step"].share_memory_() for p in model.parameters()]
    assert [int(count) for count in shared] == [15, 15]
    assert all(optimizer.state[p]["step"] is count for p, count in zip(model.parameters(), shared, strict=True))


@pytest.mark.parametrize("missing", [0, 2])
def test_a_parameter_that_misses_a_step(missing):
    """It is as old as its own steps, whatever memory its count shared before."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    gradstats.attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=1e-3, batch_size=2)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        if step == 2:
            model[missing].weight.grad = None
        optimizer.step()
    ages = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert ages == {name: 15 if name == f"{missing}.weight" else 20 for name in ages}


def test_states_keep_their_counts_from_step_to_step():
    """One tally for each of several kinds, which every step finds again."""
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1).double(), nn.Linear(3, 1)])
    stats = gradstats.attach(model)
    groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2].parameters()), "lr": 1e-2}]
    optimizer = BatchInvariantAdam(groups, lr=1e-3, batch_size=2)

    def step(x):
        optimizer.zero_grad()
        stats.new_examples()
        sum(layer(x.to(layer.weight.dtype)).square().mean().double() for layer in model).backward()
        optimizer.step()
        return [optimizer.state[p]["step"] for p in model.parameters()]

    first, second = step(torch.randn(5, 3)), step(torch.randn(5, 3))
    assert all(one is other and int(one) == 10 for one, other in zip(first, second, strict=True))
    assert [len(tally) for tally in optimizer.tallies.values()] == [2, 2, 2]

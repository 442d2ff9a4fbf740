import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import attach
from tests import oracle

B, T, WORDS = 6, 5, 11


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(self.words(x).mean(1))


def batch():
    return torch.randint(WORDS, (B, T)), torch.randint(3, (B,))


def backpropagate(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def table(stats):
    """What autograd has accumulated."""
    return stats.accounts["words.weight"].shadows["sum_of_squares"].grad


def test_the_memory_of_a_table_is_written_over_in_the_next_window():
    model = Bag()
    stats = attach(model, *oracle.STATISTICS)
    backpropagate(model, *batch())
    places = set()
    for _ in range(4):
        x, y = batch()
        backpropagate(model, x, y)
        assert oracle.exact(stats, oracle.contributions(bag_of(model), F.cross_entropy, x, y))
        places.add(table(stats).data_ptr())
    assert len(places) == 1


def bag_of(model):
    plain = Bag()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize(
    "hold",
    [
        lambda found: found,
        lambda found: found[0],
        lambda found: found.detach(),
        lambda found: found.numpy(),
        lambda found: memoryview(found.numpy()),
        lambda found: torch.ones_like(found).requires_grad_() * found,  # saved for a backward pass
    ],
    ids=["name", "view", "alias", "array", "buffer", "graph"],
)
def test_what_somebody_has_is_not_written_over(hold):
    model = Bag()
    stats = attach(model)
    backpropagate(model, *batch())
    backpropagate(model, *batch())
    held, place = hold(table(stats)), table(stats).data_ptr()
    backpropagate(model, *batch())
    assert table(stats).data_ptr() != place
    del held


def test_what_was_read_stays():
    model = Bag()
    stats = attach(model, loss_reduction="sum")
    backpropagate(model, *batch())
    backpropagate(model, *batch())
    found = stats.second_moment["words.weight"]
    before = found.clone()
    backpropagate(model, *batch())
    assert torch.equal(found, before)


def test_memory_of_another_shape_or_kind_is_let_go():
    model = Bag()
    stats = attach(model)
    for rows in (WORDS, WORDS + 2):
        model.words.weight, model.words.num_embeddings = nn.Parameter(torch.randn(rows, 4).double()), rows
        for _ in range(2):
            x, y = batch()
            backpropagate(model, x, y)
            assert not stats.accounts["words.weight"]._memory
        assert table(stats).shape == (rows, 4)
    model.float()
    x, y = batch()
    backpropagate(model, x, y)
    assert table(stats).dtype == torch.float32 and not stats.accounts["words.weight"]._memory


def test_no_window_holds_two_tables():
    model, (x, y) = Bag(), batch()
    stats = attach(model, every=2)
    account = stats.accounts["words.weight"]
    for _ in range(6):
        backpropagate(model, x, y)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        assert len(account._memory) + (table(stats) is not None) == 1

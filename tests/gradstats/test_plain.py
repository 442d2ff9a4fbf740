"""Which examples count where nothing is gathered: each layer tells, since what the model returns need not."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstats import CoverageError, LifetimeError, attach, graph, plain

B = 4


def batch(n=B):
    return torch.randn(n, 5).double(), torch.randint(3, (n,))


def network(depth=1):
    body = [layer for _ in range(depth) for layer in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*body, nn.Linear(5, 3)).double()


def in_plain_window(model, **options):
    """Statistics of the model, whose first window is over, and with it the last one that is gathered."""
    stats = attach(model, every=10**6, **options)
    x, y = batch()
    F.cross_entropy(logits(model(x)), y).backward()
    assert stats.gathered
    model.zero_grad()
    return stats


def logits(output):
    return output if isinstance(output, Tensor) else output.logits


@dataclass
class Output:
    """No tensor, and no container that torch knows."""

    logits: Tensor


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x):
        return Output(self.layer(x))


class Branches(nn.Module):
    """The second branch is the first call's only, and ends late in it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

    def forward(self, x, both=False):
        return self.second(x) + self.first(x) if both else self.first(x)


@pytest.mark.parametrize("make", [network, Hidden])
def test_examples_are_counted_whatever_the_model_returns(make):
    model = make()
    stats = in_plain_window(model)
    for i in range(1, 4):
        x, y = batch(i)
        F.cross_entropy(logits(model(x)), y).backward()
        assert not stats.gathered and stats.batch_size == sum(range(1, i + 1))
    model.zero_grad()
    x, y = batch(2)
    F.cross_entropy(logits(model(x)), y).backward()
    assert stats.batch_size == 2


def test_a_loss_beside_what_is_returned():
    model = network()
    stats = in_plain_window(model)
    features = []
    model[1].register_forward_hook(lambda module, args, output: features.append(output))
    model(batch(3)[0])
    features[0].square().mean().backward()
    assert stats.batch_size == 3 and stats.has("0.weight") and not stats.has("2.weight")


@pytest.mark.parametrize("both", [(True, False), (False, True)])
def test_forwards_of_different_examples_in_one_pass(both):
    model = Branches()
    stats = in_plain_window(model)
    losses = []
    for n, branch in zip((2, 3), both, strict=True):
        x, y = batch(n)
        losses.append(F.cross_entropy(model(x, both=branch), y))
        stats.new_examples()
    sum(losses).backward()
    assert not stats.gathered and stats.batch_size == 5
    assert stats.has("second.weight")


def test_only_the_forward_that_is_backpropagated_counts():
    model = network()
    stats = in_plain_window(model)
    (x, y), (other, _) = batch(2), batch(3)
    loss = F.cross_entropy(model(x), y)
    stats.new_examples()
    model(other)
    loss.backward()
    assert stats.batch_size == 2


@pytest.mark.parametrize("make", [network, Hidden])
def test_autograd_grad_counts_nothing(make):
    model = make()
    stats = in_plain_window(model)
    x, y = batch(2)
    loss = F.cross_entropy(logits(model(x)), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert stats.batch_size == B and stats.gathered  # the window before
    loss.backward()
    assert stats.batch_size == 2 and not stats.gathered


def test_a_forward_that_fails_leaves_nothing_behind():
    model = network()
    stats = in_plain_window(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 6).double())
    stats.zero()  # the next window is gathered
    x, y = batch(2)
    F.cross_entropy(model(x), y).backward()
    assert stats.gathered and stats.batch_size == 2


def test_a_parameter_that_is_replaced():
    model = network()
    stats = in_plain_window(model)
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
    x, y = batch(2)
    F.cross_entropy(model(x), y).backward()
    assert stats.has("0.weight") and not stats.gathered and stats.batch_size == 2
    model[0].weight.grad.mul_(2)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(LifetimeError, match="holds more than these statistics have seen"):
        stats.second_moment["0.weight"]


def test_a_graph_that_is_kept_counts_its_own_examples():
    model = network()
    stats = in_plain_window(model)
    (x, y), (other, z) = batch(2), batch(3)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    model.zero_grad()
    later = F.cross_entropy(model(other), z)
    loss.backward()
    assert stats.batch_size == 2
    later.backward()
    assert stats.batch_size == 5


def test_what_a_layer_does_not_use_ends_no_window():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = (nn.Parameter(torch.rand(5).double()) for _ in range(2))

        def forward(self, x, shifted):
            return x * self.scale + self.shift if shifted else x * self.scale

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Optional(), nn.Linear(5, 3).double()

        def forward(self, x, shifted):
            return self.second(self.first(x, shifted))

    model, gathered = Both(), []
    stats = attach(model, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(4):
        optimizer.zero_grad()
        for _ in range(3):
            x, y = batch(2)
            F.cross_entropy(model(x, i % 2 == 0), y).backward()
        assert stats.batch_size == 6
        gathered.append(stats.gathered)
        optimizer.step()
    assert gathered == [True, False, True, False]


def test_a_gradient_that_comes_without_a_forward_is_refused():
    model = network()
    stats = in_plain_window(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    sum(p.square().sum() for p in model.parameters()).backward()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(LifetimeError, match="holds more than these statistics have seen"):
        stats.second_moment["0.weight"]


def two_forwards(model, get):
    """Losses of forwards over 2 and 3 examples."""
    first = get(model(batch(2)[0]))
    yield first
    yield get(model(batch(3)[0]))


def of_view(output):
    """A view, which is changed in place: hooks on it are those of another node then."""
    output = output[:, :2]
    output -= 1
    return output.square().sum()


def of_hidden(output):
    return output.logits.sum()


@pytest.mark.parametrize(("make", "get"), [(Hidden, of_hidden), (network, of_view)], ids=["hidden", "view"])
def test_a_forward_whose_output_tells_nothing_counts_by_itself(make, get):
    model = make()
    stats = in_plain_window(model)
    first, _ = two_forwards(model, get)
    first.backward()
    assert stats.batch_size == 2
    model.zero_grad()
    losses = []
    for loss in two_forwards(model, get):
        losses.append(loss)
        stats.new_examples()
    sum(losses).backward()
    assert stats.batch_size == 5


@pytest.mark.parametrize("options", [{}, {"engine": "vmap"}])
def test_a_model_that_is_one_leaf(options):
    model = nn.Linear(5, 3).double() if not options else network()
    stats = in_plain_window(model, **options)
    first, _ = two_forwards(model, Tensor.sum)
    first.backward()
    assert stats.batch_size == 2


def test_parameters_outside_of_their_layers_do_not_matter_to_others():
    """As with a sampled softmax: what no layer computes with has no statistics, and needs none."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(5, 5), nn.Tanh()), "head": nn.Linear(5, 3)}).double()
    stats, gathered = attach(model, every=2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model["body"](x) @ model["head"].weight.T, y).backward()
        optimizer.step()
        gathered.append(stats.gathered)
    assert gathered == [True, False, True, False, True]


def test_frozen_parts_that_see_other_rows():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.maker = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
            self.judge = nn.Sequential(nn.Linear(5, 2), nn.ReLU()).double().requires_grad_(False)

    model = Critic()
    stats, counts = attach(model, every=2), []
    optimizer = torch.optim.SGD(model.maker.parameters(), lr=0.1)
    for _ in range(3):
        (x, _), (other, _) = batch(), batch()
        optimizer.zero_grad()
        model.judge(torch.cat([model.maker(x), other])).square().mean().backward()
        optimizer.step()
        counts.append(stats.batch_size)
    assert counts == [B, B, B]


def test_two_forwards_of_other_sizes_that_are_not_declared_new():
    model = network()
    in_plain_window(model)
    losses = [F.cross_entropy(model(x), y) for x, y in (batch(2), batch(3))]
    with pytest.raises(CoverageError, match="saw 2 examples where the layers before it in this backward pass saw 3"):
        sum(losses).backward()


def test_new_examples_within_a_forward():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(5, 3).double()

        def forward(self, x):
            first = self.encoder(x)
            stats.new_examples()
            return first - self.encoder(x.cos())

    model, counts = Siamese(), []
    stats = attach(model, every=2)
    for _ in range(4):
        model.zero_grad()
        model(batch(2)[0]).square().mean().backward()
        counts.append((stats.gathered, stats.batch_size))
    assert counts == [(True, 4), (False, 4)] * 2


@pytest.mark.parametrize("kind", ["computed", "leaves", "parameters"])
def test_functional_calls_between_forward_and_backward(kind):
    model = network()
    stats, gathered = attach(model, every=2), []
    for i in range(4):
        model.zero_grad()
        x, y = batch(2 + i)
        loss = F.cross_entropy(model(x), y)
        others = {name: 2 * p.detach() for name, p in model.named_parameters()}
        if kind == "computed":
            others = {name: 2 * p for name, p in model.named_parameters()}
        elif kind == "parameters":
            others = {name: nn.Parameter(p) for name, p in others.items()}
        else:
            others = {name: p.requires_grad_() for name, p in others.items()}
        if i % 2:
            torch.func.functional_call(model, others, x).sum()
        loss.backward()
        gathered.append(stats.gathered)
        assert stats.batch_size == 2 + i
    assert gathered == [True, False, True, False]


def test_what_is_used_outside_of_its_layer_only_is_not_followed():
    model = nn.ModuleDict({"front": nn.Linear(5, 5), "body": network()}).double()
    stats, gathered = attach(model, every=2), []
    optimizer = torch.optim.SGD(model["body"].parameters(), lr=0.1)
    for _ in range(4):  # the gradient of the front is kept
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model["body"](x @ model["front"].weight.T), y).backward()
        optimizer.step()
        gathered.append(stats.gathered)
    assert gathered == [True, False, True, False] and not stats.has("front.weight")


def test_a_layer_that_is_unfrozen_within_the_forward():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            self.second.requires_grad_(x.shape[0] == 2)
            return self.second(self.first(x))

    model = Late()
    model.second.requires_grad_(False)
    stats = attach(model, every=10**6)
    for n in (3, 2):
        model.zero_grad()
        x, y = batch(n)
        F.cross_entropy(model(x), y).backward()
    assert not stats.gathered and stats.has("second.weight")


def test_what_autograd_grad_asks_does_not_grow_with_the_square_of_the_depth(monkeypatch):
    asked = []
    monkeypatch.setattr(plain, "will_accumulate", lambda p: asked.append(p) or graph.will_accumulate(p))
    model = network(depth=20)
    in_plain_window(model)
    x, y = batch()
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert len(asked) == len(list(model.parameters()))


def test_a_call_that_is_refused_leaves_nothing_behind(monkeypatch):
    model = network()
    stats = in_plain_window(model)

    def refuse(*_):
        raise RuntimeError("refused")

    x, y = batch(3)
    with monkeypatch.context() as context:
        context.setattr(type(stats.lifetime), "begin_forward", refuse)
        with pytest.raises(RuntimeError, match="refused"):
            model(batch(2)[0])
    F.cross_entropy(model(x), y).backward()
    assert stats.batch_size == 3

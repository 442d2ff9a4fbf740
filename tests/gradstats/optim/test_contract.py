"""What torch and its ecosystem ask of an optimizer, for every row of the table: options, groups, and steps."""

import copy
import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from gradstats import GradstatsError, attached, optim
from gradstats.optim.base import ExampleOptimizer
from tests.gradstats.optim.problem import problem, train, vector
from tests.optimizers import ROWS

SIZES = [16, 4, 4, 16]
KEPT_IN_GROUPS = {"examples", "iterations", "measured", "gradient_squared", "trace"}  # state rather than options
every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# The first row of every class, for what its settings make no difference to.
every_class = pytest.mark.parametrize("row", {row.kind: row for row in ROWS[::-1]}.values(), ids=lambda row: row.name)


def attached_problem(row, dtype=torch.float64, **attachment):
    model, x, y = problem(dtype)
    row.attach(model, **attachment)
    return model, x, y


def run(row, sizes=SIZES, **options):
    model, x, y = attached_problem(row)
    return train(model, row(model.parameters(), **options), x, y, sizes)


plain_runs: dict[str, torch.Tensor] = {}


def plain_run(row):
    """The same for all tests."""
    if row.name not in plain_runs:
        plain_runs[row.name] = run(row)
    return plain_runs[row.name]


def test_every_optimizer_has_a_row():
    exported = {getattr(optim, name) for name in optim.__all__}
    kinds = {kind for kind in exported if inspect.isclass(kind) and issubclass(kind, ExampleOptimizer)}
    assert kinds == {row.kind for row in ROWS}


# Options and groups


@every_class
def test_options_out_of_range_are_refused(row):
    model, _, _ = problem()
    optimizer = row(model[0].parameters())
    options = {name for name, value in optimizer.defaults.items() if not isinstance(value, bool)} - KEPT_IN_GROUPS
    for name in options:
        for wrong in (-1, float("nan"), "nonsense"):
            value = (wrong, wrong) if isinstance(optimizer.defaults[name], tuple) else wrong
            with pytest.raises(GradstatsError, match=name):
                row(model.parameters(), **{name: value})
            with pytest.raises(GradstatsError, match=name):
                optimizer.add_param_group({"params": model[3].parameters(), name: value})
    assert len(optimizer.param_groups) == 1


@every
def test_groups_have_options_of_their_own(row):
    """Two groups are two optimizers, unless their parameters see each other."""
    model, x, y = attached_problem(row)
    options = {"lr": 0.02, "weight_decay": 0.2, "batch_size": 2}
    first = [*model[0].parameters()]
    rest = [p for p in model.parameters() if p not in set(first)]
    if row.whole:
        options["lr"] = 0.0
        before = vector(model[0])
    optimizer = row([{"params": first, **options}, {"params": rest}])
    together = train(model, optimizer, x, y, SIZES)
    if row.whole:
        assert torch.equal(vector(model[0]), before) and optimizer.param_groups[0]["lr"] == 0
        return
    model, x, y = attached_problem(row)
    apart = row(model[0].parameters(), **options)
    rest = [p for p in model.parameters() if p not in set(model[0].parameters())]
    assert torch.equal(together, train(model, row(rest), x, y, SIZES, before=apart.step))


@every_class
def test_group_added_later(row):
    model, x, y = attached_problem(row)
    optimizer = row(model[0].parameters())
    optimizer.add_param_group({"params": [*model[2].parameters(), *model[3].parameters()], "weight_decay": 0.3})
    added = train(model, optimizer, x, y, SIZES)
    model, x, y = attached_problem(row)
    groups = [
        {"params": model[0].parameters()},
        {"params": [*model[2].parameters(), *model[3].parameters()], "weight_decay": 0.3},
    ]
    assert torch.equal(added, train(model, row(groups), x, y, SIZES))
    assert not torch.equal(added, plain_run(row))


@every_class
def test_group_added_in_the_middle_of_training(row):
    model, x, y = attached_problem(row)
    optimizer = row(model[0].parameters())
    train(model, optimizer, x, y, SIZES)
    before = vector(model[3])
    optimizer.add_param_group({"params": model[3].parameters()})
    train(model, optimizer, x, y, [16])
    assert not torch.equal(vector(model[3]), before)
    assert optimizer.state[model[3].weight]["step"] == row.count([16])
    assert optimizer.examples == optimizer.state[model[0].weight]["step"] == row.count([*SIZES, 16])


@every
def test_tensor_lr_is_a_number(row):
    assert torch.equal(run(row, lr=torch.tensor(0.01, dtype=torch.float64)), run(row, lr=0.01))


@every_class
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1)),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.02, 5, cycle_momentum="betas" in optimizer.defaults or "momentum" in optimizer.defaults
        ),
    ],
    ids=["lambda", "cosine", "one cycle"],
)
def test_torchs_schedulers(row, schedule):
    """Each step is one with the values that the scheduler left in the group."""
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    scheduler = schedule(optimizer)
    seen = []

    def after():
        scheduler.step()
        seen.append({name: optimizer.param_groups[0].get(name) for name in ("lr", "betas", "momentum")})

    scheduled = train(model, optimizer, x, y, SIZES, after)
    assert len({values["lr"] for values in seen}) == len(SIZES)
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    by_hand = iter(seen)
    schedule(optimizer)  # sets the values of the first step

    def set_by_hand():
        values = next(by_hand)
        optimizer.param_groups[0].update({name: value for name, value in values.items() if value is not None})

    assert torch.equal(scheduled, train(model, optimizer, x, y, SIZES, set_by_hand))


# Steps


@every_class
def test_closure(row):
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x[:16]), y[:16]))
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert torch.equal(vector(model), run(row, [16]))


@every
def test_maximize_is_descent_on_the_negated_loss(row):
    model, x, y = attached_problem(row)
    negated = train(model, row(model.parameters()), x, y, SIZES, sign=-1)
    assert torch.equal(run(row, maximize=True), negated)
    assert not torch.equal(plain_run(row), negated)


@every
def test_parameters_without_gradient_are_left_alone(row):
    model, x, y = attached_problem(row)
    unused, frozen = nn.Linear(2, 2), model[0].weight.requires_grad_(False)
    optimizer = row([*model.parameters(), *unused.parameters()])
    before = copy.deepcopy((frozen, vector(unused)))
    train(model, optimizer, x, y, SIZES)
    assert torch.equal(frozen, before[0]) and torch.equal(vector(unused), before[1])
    assert not {frozen, *unused.parameters()} & set(optimizer.state)
    assert not torch.equal(vector(model), vector(problem()[0]))


@every
def test_parameters_that_join_later_have_ages_of_their_own(row):
    """In one group: they step as with an optimizer of their own."""
    results = []
    for apart in (False, True):
        model, x, y = attached_problem(row)
        last = model[3].requires_grad_(False)
        rest = [p for p in model.parameters() if p.requires_grad]
        one, *others = [row(rest), row(last.parameters())] if apart else [row(model.parameters())]
        train(model, one, x, y, [16])
        last.requires_grad_(True)
        results.append(train(model, one, x, y, SIZES, before=lambda others=others: [o.step() for o in others]))
    assert row.whole or torch.equal(*results)


@every
def test_two_steps_on_one_gradient(row):
    """The second is over as many examples, and moves on."""
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    once = train(model, optimizer, x, y, [16])
    optimizer.step()
    assert not torch.equal(vector(model), once)
    assert optimizer.examples == row.count([16, 16]) and attached(model).batch_size == 16


@every
def test_gradients_zeroed_in_place_are_no_new_examples(row):
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    for b in (slice(0, 16), slice(16, 20)):
        F.cross_entropy(model(x[b]), y[b]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert optimizer.examples == row.count([16, 4])
    assert torch.equal(vector(model), run(row, [16, 4]))


@every
def test_max_norm_out_of_reach_changes_nothing(row):
    if "max_norm" not in row([nn.Parameter(torch.zeros(1))]).defaults:
        pytest.skip("has no max_norm, since no element moves by more than lr anyway")
    assert torch.equal(run(row, max_norm=1e9), plain_run(row))
    assert not torch.equal(run(row, max_norm=1e-3), plain_run(row))


@every
@pytest.mark.parametrize("by", ["the handle", "torch"])
def test_a_clipped_gradient_is_that_of_a_smaller_loss(row, by):
    """Statistics are scaled with it, by stats.clip_grad_norm_ or where clipping is followed."""
    limit, finals = 0.05, []
    for scales in (False, True):
        model, x, y = attached_problem(row, follow_clipping=by == "torch" and not scales)
        optimizer, parameters, start = row(model.parameters()), list(model.parameters()), 0
        for b in SIZES:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[start : start + b]), y[start : start + b])
            if scales:
                norm = nn.utils.get_total_norm(torch.autograd.grad(loss, parameters, retain_graph=True))
                assert norm > 2 * limit
                loss = loss * limit / (norm + 1e-6)  # as torch clips
            loss.backward()
            if not scales:
                clip = attached(model).clip_grad_norm_ if by == "the handle" else partial(clip_grad_norm_, parameters)
                clip(limit)
            optimizer.step()
            start += b
        finals.append(vector(model))
    torch.testing.assert_close(*finals, rtol=1e-10, atol=1e-12)


@every
def test_unattached_model(row):
    """Where no statistics are read, the batch size is all that is needed; where they are, the way out is named."""
    model, x, y = problem()
    optimizer = row(model.parameters())
    if row.statistics:
        with pytest.raises(GradstatsError, match="attach"):
            train(model, optimizer, x, y, [16], batch_size=16)
        return
    with pytest.raises(GradstatsError, match="batch_size"):
        train(model, optimizer, x, y, [16])
    alone = train(model, optimizer, x, y, [16], batch_size=16)
    torch.testing.assert_close(alone, run(row, [16]), rtol=1e-10, atol=1e-12)


@every
def test_lr_zero_moves_nothing(row):
    assert torch.equal(run(row, lr=0.0), vector(problem()[0]))


# Layouts, shapes, dtypes


class Odd(nn.Module):
    """Parameters of no dimension, of no element, strided and channels last."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))
        self.strided = nn.Parameter(torch.randn(6, 8, dtype=torch.float64)[:, ::2])
        self.transposed = nn.Parameter(torch.randn(3, 4, dtype=torch.float64).t())
        self.kernel = nn.Parameter(torch.randn(3, 3, 2, 2, dtype=torch.float64))

    def forward(self, x):
        h = torch.tanh(x @ self.strided) @ self.transposed  # (B, 3)
        images = h[:, :, None, None].expand(-1, 3, 4, 4)
        return (F.conv2d(images, self.kernel).mean((2, 3)) * self.scale) + self.empty.sum()


@every
def test_layout_of_memory_does_not_matter(row):
    results = []
    for odd in (True, False):
        torch.manual_seed(0)
        model = Odd()
        if odd:
            assert not model.strided.is_contiguous() and not model.transposed.is_contiguous()
            model = model.to(memory_format=torch.channels_last)
            assert model.kernel.is_contiguous(memory_format=torch.channels_last)
        else:
            for p in model.parameters():
                p.data = p.data.contiguous()
        row.attach(model)
        _, x, y = problem()
        results.append(train(model, row(model.parameters()), x, y, SIZES))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    torch.manual_seed(0)
    for p, before in zip(model.parameters(), Odd().parameters(), strict=True):
        assert p.numel() == 0 or not torch.equal(p, before)


class Mixed(nn.ModuleList):
    def __init__(self):
        super().__init__(nn.Linear(6, 3, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))

    def forward(self, x):
        return sum(layer(x.to(layer.weight.dtype)).double() for layer in self)


@every
def test_dtypes_in_one_optimizer(row):
    """Parameters of every dtype move as with an optimizer of their own, and their state is float32 or wider."""
    results = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        before = vector(model)
        row.attach(model)
        _, x, y = problem()
        one, *others = [row(layer.parameters()) for layer in model] if apart else [row(model.parameters())]
        results.append(train(model, one, x, y, SIZES, before=lambda others=others: [o.step() for o in others]))
        assert not torch.equal(results[-1], before)
        for optimizer in (one, *others):
            for p, state in optimizer.state.items():
                wide = torch.promote_types(p.dtype, torch.float32)
                assert all(t.dtype == wide for t in state.values() if t.shape == p.shape)
    assert row.whole or torch.equal(*results)


# Paths


@every_class
def test_compiled_step(row):
    """torch.compile(optimizer.step) leaves the step as it is."""
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    plain = plain_run(row)
    start = 0
    for b in SIZES:
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + b]), y[start : start + b]).backward()
        step()
        start += b
    assert torch.equal(vector(model), plain)


@every
def test_optimizer_in_backward(row):
    """One optimizer for every parameter, stepped as soon as its gradient is there."""
    if row.whole:
        pytest.skip("a step of one parameter depends on all others")
    model, x, y = attached_problem(row)
    optimizers = {p: row([p]) for p in model.parameters()}

    def hook(p):
        """As in PyTorch's tutorial on the subject."""
        optimizers[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    start = 0
    for b in SIZES:
        F.cross_entropy(model(x[start : start + b]), y[start : start + b]).backward()
        start += b
    assert torch.equal(vector(model), plain_run(row))


@pytest.mark.slow
@every
def test_compiled_is_plain_to_rounding(row):
    a, b = run(row, compiled=True), run(row, compiled=False)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

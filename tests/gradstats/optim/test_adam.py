"""BatchInvariantAdam: torch's at the tuned batch size, its equations elsewhere, and the contract of an optimizer."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradstats import GradstatsError, LifetimeError, MissingStatistic, attach, attached
from gradstats.optim import BatchInvariantAdam
from tests import oracle
from tests.gradstats.optim import reference

D = torch.float64


def problem(dtype=D):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(512, 6, dtype=dtype), torch.randint(0, 3, (512,))
    return model, x, y


def batch(x, y, i, b):
    rows = torch.arange(i * b, (i + 1) * b) % len(x)
    return x[rows], y[rows]


def train(model, optimizer, x, y, sizes, after=lambda: None):
    start = 0
    for b in sizes:
        rows = torch.arange(start, start + b) % len(x)
        start += b
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        after()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("r", [None, 16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_is_torchs_at_the_tuned_batch_size(r, weight_decay, maximize):
    model, x, y = problem()
    theirs = copy.deepcopy(model)
    attach(model)
    kwargs = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": weight_decay, "maximize": maximize}
    a = train(
        model, BatchInvariantAdam(model.parameters(), batch_size=16, reference_batch_size=r, **kwargs), x, y, [16] * 100
    )
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    b = train(theirs, kind(theirs.parameters(), **kwargs), x, y, [16] * 100)
    assert (a - b).abs().max() <= 1e-10


def per_example(p, x):
    """Gradients of the mean over b of |p - x_b|^4/4: (B, *shape)."""
    return (p.detach() - x) ** 3


class Quartic(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=D))

    def forward(self, x):
        return ((self.p - x) ** 4 / 4).sum(-1)


@pytest.mark.parametrize("sizes", [[64] * 20, [4] * 60, [1] * 60, [1, 7, 64, 3, 2, 1, 16, 256, 5] * 5])
@pytest.mark.parametrize("r", [1, 4, 64])
@pytest.mark.parametrize("average", ["debiased_ewma", "slides"])
def test_follows_its_equations(sizes, r, average):
    model = Quartic()
    handle = attach(model)
    args = {"lr": 0.02, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 8}
    optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=r, average=average, **args)
    twin = reference.Adam(model.p.detach(), reference=r, slides=average == "slides", **args)
    for b in sizes:
        x = torch.randn(b, 3, dtype=D)
        expected = twin.step(per_example(model.p, x))
        optimizer.zero_grad()
        model(x).mean().backward()
        assert handle.batch_size == b
        optimizer.step()
        assert (model.p - expected).abs().max() <= 1e-10
    state = optimizer.state[model.p]
    assert state["step"] == sum(sizes) and not state["step"].is_floating_point()
    assert ("exp_avg_q" in state) == (r > min(sizes))


def test_first_s_is_the_oracles_mean_of_squares():
    model, x, y = problem()
    c = oracle.contributions(model, F.cross_entropy, x[:64], y[:64])
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=64, reference_batch_size=1)
    train(model, optimizer, x, y, [64])
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg_sq"], oracle.second_moment(c[name]), rtol=1e-10, atol=1e-14
        )


def averages(model, x, y, sizes, lr=0.0):
    """The averages after one pass, at fixed parameters."""
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=lr, batch_size=64, reference_batch_size=1)
    train(model, optimizer, x, y, sizes)
    return [(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in model.parameters()]


def test_splitting_a_batch_of_equal_examples_gives_the_same_averages():
    results = []
    for sizes in ([64, 64], [32, 32, 60, 4], [1] * 128):
        model, x, y = problem()
        x, y = x[:2].repeat_interleave(64, 0), y[:2].repeat_interleave(64)
        results.append(averages(model, x, y, sizes))
    for other in results[1:]:
        for (m, s), (m2, s2) in zip(results[0], other, strict=True):
            torch.testing.assert_close(m, m2, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(s, s2, rtol=1e-9, atol=1e-16)


def test_duplicating_all_examples_leaves_v1():
    model, x, y = problem()
    twice = copy.deepcopy(model)
    a = averages(model, x, y, [32])
    b = averages(twice, x[:32].repeat(2, 1), y[:32].repeat(2), [64])
    for (m, s), (m2, s2) in zip(a, b, strict=True):
        torch.testing.assert_close(m, m2)
        torch.testing.assert_close(s, s2)


def test_accumulation_is_one_larger_batch():
    model, x, y = problem()
    other = copy.deepcopy(model)
    attach(model)
    attach(other)
    a, b = (BatchInvariantAdam(m.parameters(), lr=0.1, batch_size=8, reference_batch_size=4) for m in (model, other))
    for i in range(5):
        x_i, y_i = batch(x, y, i, 32)
        a.zero_grad()
        F.cross_entropy(model(x_i), y_i).backward()
        a.step()
        b.zero_grad()
        for rows in (slice(0, 8), slice(8, 32)):
            (F.cross_entropy(other(x_i[rows]), y_i[rows]) * len(y_i[rows]) / 32).backward()
        b.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_sum_loss_is_mean_loss():
    results = []
    for reduction in ("mean", "sum"):
        model, x, y = problem()
        attach(model, loss_reduction=reduction)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.1, batch_size=8)
        for i in range(4):
            optimizer.zero_grad()
            x_i, y_i = batch(x, y, i, 16)
            F.cross_entropy(model(x_i), y_i, reduction=reduction).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_in_examples_is_the_tuning_at_batch_size_one():
    results = []
    for make in (
        lambda ps: BatchInvariantAdam.in_examples(ps, lr=1e-3, horizons=(100, 1000), reference_batch_size=4),
        lambda ps: BatchInvariantAdam(ps, lr=1e-3, betas=(0.99, 0.999), batch_size=1, reference_batch_size=4),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64]))
    assert torch.equal(*results)


def test_weight_decay_per_example_does_not_depend_on_the_batch_size():
    results = []
    for sizes in ([64], [16] * 4, [1] * 64):
        model = Quartic()
        attach(model)
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.1, eps=1e30, weight_decay=0.5, batch_size=16)
        for b in sizes:
            optimizer.zero_grad()
            model(torch.randn(b, 3, dtype=D)).mean().backward()
            optimizer.step()
        results.append(model.p.detach())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[0], Quartic().p.detach() * (1 - 0.1 * 0.5) ** 4)


def test_max_norm_bounds_the_running_average_over_all_groups():
    model, x, y = problem()
    attach(model)
    groups = [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[3].parameters()]}]
    # eps far above sqrt(s) makes the step lr m~ / eps: its norm is lr max_norm / eps when the bound is active.
    optimizer = BatchInvariantAdam(groups, lr=1.0, eps=1e3, batch_size=16, max_norm=1e-3)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    after = train(model, optimizer, x, y, [16])
    norm = torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()]).norm()
    assert norm > 1e-3
    torch.testing.assert_close((after - before).norm(), torch.tensor(1e-3 / 1e3, dtype=D), rtol=1e-3, atol=0)


@pytest.mark.parametrize("r", [1, 64])
@pytest.mark.parametrize("through", ["state_dict", "torch.save", "pickle"])
def test_state_round_trip_continues_bitwise(through, r):
    model, x, y = problem()
    attach(model)
    kwargs = {"lr": 0.01, "batch_size": 16, "reference_batch_size": r}
    optimizer = BatchInvariantAdam(model.parameters(), **kwargs)
    train(model, optimizer, x, y, [16, 3, 1])
    if through == "pickle":
        other, restored = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other, _, _ = problem()
        other.load_state_dict(model.state_dict())
        attach(other)
        restored = BatchInvariantAdam(other.parameters(), **kwargs)
        state = optimizer.state_dict()
        if through == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        restored.load_state_dict(state)
    assert torch.equal(train(model, optimizer, x, y, [16, 5]), train(other, restored, x, y, [16, 5]))


def test_low_precision_parameters_keep_float32_state():
    model, x, y = problem(torch.bfloat16)
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16)
    train(model, optimizer, x, y, [16, 4])
    restored = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16)
    restored.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        for key in ("exp_avg", "exp_avg_sq", "exp_avg_q"):
            assert restored.state[p][key].dtype == torch.float32
            assert torch.equal(restored.state[p][key], optimizer.state[p][key])
        assert restored.state[p]["step"].dtype == torch.int64


def test_copy_of_model_and_optimizer():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=0.01, batch_size=16)
    train(model, optimizer, x, y, [16])
    other, restored = copy.deepcopy((model, optimizer))
    assert attached(other) is not attached(model)
    assert torch.equal(train(model, optimizer, x, y, [8]), train(other, restored, x, y, [8]))


def test_groups_schedulers_and_added_groups():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam([{"params": model[0].parameters(), "lr": 0.0}], lr=0.1, batch_size=16)
    optimizer.add_param_group(
        {"params": model[2].parameters(), "lr": 0.05, "batch_size": 64, "reference_batch_size": 1}
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, x, y, [16], after=scheduler.step)
    middle = copy.deepcopy(model.state_dict())
    train(model, optimizer, x, y, [16], after=scheduler.step)
    changed = {name for name in before if not torch.equal(before[name], middle[name])}
    assert changed == {"2.weight", "2.bias"}
    assert all(torch.equal(middle[name], value) for name, value in model.state_dict().items())


def test_step_before_any_backward_only_allocates():
    """What torch.distributed.checkpoint does to learn the state's layout."""
    model, x, y = problem()
    twin = copy.deepcopy(model)
    attach(model)
    attach(twin)
    optimizer, fresh = (BatchInvariantAdam(m.parameters(), lr=0.01, batch_size=16) for m in (model, twin))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} and s["step"] == 0 for s in optimizer.state.values())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    assert torch.equal(train(model, optimizer, x, y, [16, 16]), train(twin, fresh, x, y, [16, 16]))


def test_parameters_without_gradient_are_left_alone():
    model, x, y = problem()
    unused = nn.Linear(2, 2)
    attach(model)
    optimizer = BatchInvariantAdam([*model.parameters(), *unused.parameters()], batch_size=16)
    before = copy.deepcopy(unused.state_dict())
    train(model, optimizer, x, y, [16])
    assert all(torch.equal(before[n], v) for n, v in unused.state_dict().items())
    assert unused.weight not in optimizer.state


def test_closure():
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[:16]), y[:16])
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_tensor_lr():
    results = []
    for lr in (0.01, torch.tensor(0.01, dtype=D)):
        model, x, y = problem()
        attach(model)
        results.append(train(model, BatchInvariantAdam(model.parameters(), lr=lr, batch_size=16), x, y, [16, 8]))
    assert torch.equal(*results)


def test_missing_and_changed_statistics_are_refused():
    model, x, y = problem()
    optimizer = BatchInvariantAdam(model.parameters(), batch_size=16)
    with pytest.raises(MissingStatistic, match=r"gradstats.attach\(model\)"):
        train(model, optimizer, x, y, [16])
    model.zero_grad()
    attach(model, "norms")
    with pytest.raises(MissingStatistic, match="attach"):
        train(model, optimizer, x, y, [16])
    attached(model).detach()
    model.zero_grad()
    attach(model)
    F.cross_entropy(model(x[:8]), y[:8]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(LifetimeError, match="max_norm"):
        optimizer.step()


def test_decay_above_one_is_refused():
    """A negative factor has no power B/batch_size."""
    model, x, y = problem()
    attach(model)
    optimizer = BatchInvariantAdam(model.parameters(), lr=2.0, weight_decay=0.6, batch_size=16)
    with pytest.raises(GradstatsError, match="weight_decay = 0.6"):
        train(model, optimizer, x, y, [4])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("betas", (1.0, 0.9)),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("batch_size", 0),
        ("reference_batch_size", 0.5),
        ("max_norm", 0.0),
        ("average", "linear"),
    ],
)
def test_invalid_options(name, value):
    with pytest.raises(GradstatsError, match=name if name != "average" else "debiased_ewma"):
        BatchInvariantAdam(nn.Linear(2, 2).parameters(), **{name: value})
    with pytest.raises(GradstatsError, match="horizons"):
        BatchInvariantAdam.in_examples(nn.Linear(2, 2).parameters(), horizons=(0.5, 10))

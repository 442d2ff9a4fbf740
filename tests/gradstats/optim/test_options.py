"""Values of options that are refused, and the names that they go by."""

import pytest
import torch
from torch import nn

from gradstats import GradstatsError, attach
from gradstats.optim import (
    BatchInvariantAdam,
    BatchInvariantLion,
    BatchInvariantRMSprop,
    BatchInvariantSGD,
    BatchInvariantSignSGD,
    QuenchingSGD,
    SaturatingAdam,
    SaturatingSGD,
)
from tests.gradstats.optim.problem import problem, train


def test_groups_do_not_share_a_tensor_lr():
    lr = torch.tensor(0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = BatchInvariantSGD([{"params": layer.parameters()} for layer in model], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr and optimizer.param_groups[1]["lr"] is not lr


def test_options_that_an_optimizer_has_not_are_not_read():
    model, x, y = problem()
    optimizer = BatchInvariantLion([{"params": model.parameters(), "max_norm": 1e-3}], batch_size=8)
    plain, _, _ = problem()
    a = train(model, optimizer, x, y, [8, 8], batch_size=8)
    assert torch.equal(
        a, train(plain, BatchInvariantLion(plain.parameters(), batch_size=8), x, y, [8, 8], batch_size=8)
    )


def test_a_group_added_later_has_the_tensor_lr_of_the_start():
    lr = torch.tensor(0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = BatchInvariantSGD(model[0].parameters(), lr=lr)
    lr.fill_(0.5)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, pytest.approx(0.1)]


def test_a_variance_of_infinite_batches_is_refused():
    for kind in (BatchInvariantAdam, BatchInvariantRMSprop):
        with pytest.raises(GradstatsError, match="finite R"):
            kind(nn.Linear(2, 2).parameters(), source="variance", reference_batch_size=float("inf"))


def test_noise_has_a_horizon_in_examples():
    optimizer = SaturatingSGD.in_examples(nn.Linear(2, 2).parameters(), lr=0.1, noise_horizon=1000)
    assert optimizer.param_groups[0]["noise_beta"] == 1 - 1 / 1000


def test_options_as_text_say_so():
    p = nn.Linear(2, 2).parameters
    with pytest.raises(GradstatsError, match=r"BatchInvariantAdam: invalid lr = '1e-3', which is text"):
        BatchInvariantAdam(p(), lr="1e-3")
    with pytest.raises(GradstatsError, match=r"maximize = 'false': True or False"):
        BatchInvariantAdam(p(), maximize="false")
    with pytest.raises(GradstatsError, match=r"invalid source = 'second_moments': one of"):
        BatchInvariantAdam(p(), source="second_moments")
    with pytest.raises(GradstatsError, match=r"step\(batch_size=\.\.\.\)"):
        BatchInvariantSGD(p()).step(16)


@pytest.mark.parametrize(
    ("kind", "horizons", "tuned"),
    [
        (BatchInvariantSignSGD, {"horizon": 100}, {"momentum": 0.99}),
        (BatchInvariantLion, {"horizons": (10, 100)}, {"betas": (0.9, 0.99)}),
        (QuenchingSGD, {"noise_horizon": 100}, {"noise_beta": 0.99}),
    ],
)
def test_in_examples_is_the_tuning_at_batch_size_one(kind, horizons, tuned):
    results = []
    for make in (
        lambda ps: kind.in_examples(ps, lr=1e-3, **horizons),
        lambda ps: kind(ps, 1e-3, batch_size=1, **tuned),
    ):
        model, x, y = problem()
        attach(model)
        results.append(train(model, make(model.parameters()), x, y, [16, 1, 64]))
    assert torch.equal(*results)
    with pytest.raises(GradstatsError, match="horizons are numbers"):
        kind.in_examples(
            nn.Linear(1, 1).parameters(), **{name: ("2560", 1) if name == "horizons" else 0.5 for name in horizons}
        )


def test_options_of_a_class_made_of_others_are_those_of_all():
    for wrong in ({"over": "all"}, {"source": "nothing"}, {"noise_beta": 1.0}, {"denominator": "nothing"}):
        (name,) = wrong
        with pytest.raises(GradstatsError, match=f"SaturatingAdam: invalid {name}"):
            SaturatingAdam(nn.Linear(2, 2).parameters(), **wrong)

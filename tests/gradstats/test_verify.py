"""`verify` passes what is exact and finds what is planted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats
from gradstats import VerificationError, function
from gradstats.contribution import Contribution
from gradstats.forms.dense import Dense
from gradstats.forms.outer import OuterSum
from gradstats.forms.streamed import Streamed
from gradstats.rules.linear import Linear
from gradstats.statistics import STATISTICS, SecondMoment
from tests.gradstats.rules.test_fallback import Twice


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def loss(output, y):
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=-100)


@pytest.fixture
def problem():
    """Uneven token counts, positions that resemble each other."""
    y = torch.randint(0, 3, (5, 7))
    y[0, 2:] = -100
    return Sequence(), loss, torch.randn(5, 7, 4) + torch.randn(5, 1, 4), y


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_exact_model_passes(problem, dtype, limit):
    result = gradstats.verify(*problem, dtype=dtype)
    assert 0 < result.worst.error <= limit
    assert len(result.rows) == 3 * 4
    table = str(result)
    assert all(name in table for name, _ in problem[0].named_parameters()) and "variance" in table


def test_finds_a_rule_that_squares_tokens(problem, monkeypatch):
    class PerToken(OuterSum):
        def sums(self, names):
            return Dense(torch.einsum("nto,nti->ntoi", self.d, self.a).flatten(0, 1)).sums(names)

    monkeypatch.setattr("gradstats.rules.linear.OuterSum", PerToken)
    with pytest.raises(VerificationError, match=r"second_moment of parameter '(first|second).weight' \(\d, \d\)"):
        gradstats.verify(*problem, statistics=("second_moment",))


def test_finds_a_wrong_scale(problem, monkeypatch):
    monkeypatch.setattr(SecondMoment, "read", staticmethod(lambda w: w.sums["sum_of_squares"] * w.scale))
    with pytest.raises(VerificationError, match="second_moment"):
        gradstats.verify(*problem, loss_reduction="sum")


def test_finds_a_missing_cross_term(monkeypatch):
    """One layer called twice: squares of the uses are added, instead of the square of their sum."""

    def planted(parts, names):
        squares = [part.sums(names)[1] for part in parts]
        return {name: torch.stack([s[name] for s in squares]).sum(0) for name in names}

    problem = Twice(), F.cross_entropy, torch.randn(5, 4), torch.randint(0, 4, (5,))
    gradstats.verify(*problem)
    monkeypatch.setattr(function, "sums_of", planted)
    with pytest.raises(VerificationError, match="layer"):
        gradstats.verify(*problem, statistics=("second_moment",))


def test_finds_a_transposed_bias(problem, monkeypatch):
    original = Linear.backward

    def planted(options, saved, d, wanted):
        grad_input, contributions = original(options, saved, d, wanted)
        contributions["bias"] = Dense(contributions["bias"].c.flip(0).roll(1, 1))
        return grad_input, contributions

    monkeypatch.setattr(Linear, "backward", staticmethod(planted))
    with pytest.raises(VerificationError, match="bias"):
        gradstats.verify(*problem)


def test_nan_is_never_within_tolerance(problem, monkeypatch):
    monkeypatch.setattr(
        Streamed, "sums", lambda self, names: (self.gradient(), {n: self.gradient() * torch.nan for n in names})
    )
    with pytest.raises(VerificationError):
        gradstats.verify(*problem, statistics=("second_moment",))


def test_attached_model_is_refused(problem):
    gradstats.attach(problem[0])
    with pytest.raises(gradstats.GradstatsError, match="detach"):
        gradstats.verify(*problem)


def test_dropout_is_verified_on_its_own_masks():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    assert gradstats.verify(model, F.cross_entropy, torch.randn(5, 4), torch.randint(0, 3, (5,))).worst.error <= 1e-10


# Signs, angles and ratios of a gradient that is zero: the key bias of attention has one.
MENU = tuple(STATISTICS)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_whole_menu_is_verified(dtype, limit):
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    data = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    for options in ({}, {"granularity": "microbatch", "microbatch_size": 2}, {"loss_reduction": "sum"}):
        result = gradstats.verify(model, F.mse_loss, *data, statistics=MENU, dtype=dtype, **options)
        assert len(result.rows) == len(MENU) * len(list(model.parameters()))
        assert result.worst.error <= limit


@pytest.mark.parametrize("name", MENU)
def test_every_statistic_can_fail(problem, monkeypatch, name):
    """Contributions of an example that are lost, where the statistic is gathered."""
    original = Contribution.sums

    def lossy(self, names):
        kept = Dense(
            torch.stack([self.example(n).clone() for n in range(self.count)]).index_fill_(0, torch.tensor(1), 0)
        )
        kept.parameter = self.parameter
        return self.gradient(), original(kept, names)[1]

    monkeypatch.setattr(Contribution, "sums", lossy)
    with pytest.raises(VerificationError, match=name):
        gradstats.verify(*problem, statistics=(name,))


def test_single_positions_have_no_oracle(problem):
    with pytest.raises(gradstats.GradstatsError, match="no oracle"):
        gradstats.verify(*problem, granularity="token")


def test_positions_first_and_ignored_parameters():
    model, x = nn.LSTM(4, 3), torch.randn(6, 5, 4)
    found = gradstats.verify(
        model, lambda output, y: output[0].square().mean(), x, None, ignore=["bias_hh_l0"], example_dims=1
    )
    assert {row.parameter for row in found.rows} == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0"}

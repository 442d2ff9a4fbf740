"""The kernel of a step against the equation that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.kernels import adam
from gradstats.optim import BatchInvariantAdam, BatchInvariantRMSprop
from gradstats.optim.adam import AdamUpdate
from gradstats.optim.moment import Moment
from tests.gradstats.kernels.conftest import DEVICE

SCALARS = {
    "mean_scale": 0.5,
    "second_moment_scale": 3.0,
    "product": 0.75,
    "square": 0.25,
    "w1": 0.1,
    "w2": 0.01,
    "step": 0.3,
    "eps": 1e-3,
    "decay": 0.9,
}


def plain(reads):
    return AdamUpdate(Moment(reads), statistics=("second_moment",) if reads else ())


def columns(sizes, dtype=torch.float32, reads=True):
    own = {"parameter": dtype, "gradient": dtype}
    names = ("parameter", "gradient", *(["sum_of_squares"] if reads else []), "exp_avg", "exp_avg_sq")
    return {name: [torch.rand(n, device=DEVICE).to(own.get(name, torch.float32)) for n in sizes] for name in names}


def check(found, scalars=SCALARS, reads=True):
    rows = list(zip(*found.values(), strict=True))
    expected = []
    for row in rows:
        tensors = {name: t.double() for name, t in zip(found, row, strict=True)}
        expected.append(plain(reads)(tensors, scalars, "both"))
    adam.step(tuple(found), rows, scalars)
    rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
    for row, new in zip(rows, expected, strict=True):
        tensors = dict(zip(found, row, strict=True))
        for name, value in new.items():
            tolerance = rounding[tensors[name].dtype]
            torch.testing.assert_close(tensors[name].double(), value, rtol=tolerance, atol=tolerance)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1), st.sampled_from(sorted(adam.TYPES, key=str)), st.booleans())
def test_any_sizes(sizes, dtype, reads):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adam, "BLOCK", 16)
        adam.programs.cache_clear()
        check(columns(sizes, dtype, reads), reads=reads)
    adam.programs.cache_clear()


def test_addresses_of_any_alignment():
    found = {name: [t[1:], t[:1]] for name, (t,) in columns((2000,)).items()}
    before = {name: a.clone() for name, (a, _) in found.items()}
    check(found)
    assert all((found[name][0] != t).any() for name, t in before.items() if name not in ("gradient", "sum_of_squares"))


def test_only_aligned_addresses_are_read_several_at_once(monkeypatch):
    """A device reads from wrong places otherwise, or fails; the interpreter does not."""
    told = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *_, IS_ALIGNED, **__: told.append(IS_ALIGNED)

    monkeypatch.setattr(adam, "_step", Launch())
    found = columns((8, 8))
    for start in (0, 1, 4):
        adam.step(tuple(found), [[t[start:] for t in row] for row in zip(*found.values(), strict=True)], SCALARS)
    assert told == [True, False, True]


def test_scalars_that_are_tensors():
    check(columns((5, 6)), SCALARS | {"step": torch.tensor(0.25), "decay": torch.tensor(0.5, dtype=torch.float64)})


def test_what_it_serves():
    p = torch.nn.Parameter(torch.zeros(3))

    def update(kind=BatchInvariantAdam, b=8, **options):
        optimizer = kind([p], **({"batch_size": 8} | options))
        return optimizer.update(optimizer.param_groups[0], b, {})

    found = columns((3, 2), torch.bfloat16)
    assert adam.serves(update(), "both", found) and adam.serves(update(reference_batch_size=1), "both", found)
    assert adam.serves(update(source="squared_batch_mean"), "both", columns((3,), reads=False))
    assert not adam.serves(update(), "averages", found)
    assert not adam.serves(update(b=4), "both", found)  # R > B: a product with the average, and a floor
    assert not adam.serves(update(kind=BatchInvariantRMSprop), "both", found)
    for options in (
        {"amsgrad": True},
        {"denominator": "slides"},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
        {"source": "variance"},
        {"source": "mean_square"},
    ):
        assert not adam.serves(update(**options), "both", found), options
    for name in found:
        other = found[name][1].double()
        assert not adam.serves(update(), "both", found | {name: [found[name][0], other]}), name

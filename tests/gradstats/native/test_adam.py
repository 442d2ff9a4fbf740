"""The step in C++ against the equation that it stands for."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradstats import attach, native
from gradstats.native import adam, build
from gradstats.optim import BatchInvariantAdam, BatchInvariantRMSprop
from gradstats.optim.adam import AdamUpdate
from gradstats.optim.moment import Moment
from gradstats.sums import accumulation_dtype

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

SCALARS = {
    "mean_scale": -0.5,
    "second_moment_scale": 3.0,
    "product": 0.75,
    "square": 0.25,
    "w1": 0.1,
    "w2": 0.01,
    "w3": 0.02,
    "step": 0.3,
    "eps": 1e-3,
    "decay": 0.9,
    "first": 0.5,
    "unbias": 1.25,
    "inverse_reference": 2.0,
    "clip": 0.5,
}
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}
UPDATES = [
    AdamUpdate(
        Moment(
            reads,
            partner=partner,
            floored=floored,
            infinite=infinite,
            remembers=remembers,
            misses=part > 0,
            waits=part > 1,
        ),
        statistics=("second_moment",) if reads and part < 2 else (),
    )
    # Of all that is seen, of a part of it, and of a batch that is not gathered.
    for reads, (partner, remembers), floored, infinite, part in product(
        (False, True), adam.PARTNERS, (False, True), (False, True), range(3)
    )
    if not (floored and (infinite or part or not reads))
]
PHASES = (("both",), ("averages", "move"))


def columns(update, sizes, dtype=torch.float32):
    names = ("parameter", "gradient", *update.reads, *update.buffers)
    own = {"parameter": dtype, "gradient": dtype}
    return {
        name: [(torch.rand(n) - 0.5 * (name in own)).to(own.get(name, accumulation_dtype(dtype))) for n in sizes]
        for name in names
    }


def check(update, found, phases=("both",)):
    scalars = SCALARS if phases != ("both",) else SCALARS | {"clip": 1.0}
    expected = []
    for row in zip(*found.values(), strict=True):
        tensors = {name: t.double() for name, t in zip(found, row, strict=True)}
        for phase in phases:
            tensors |= update(tensors, scalars, phase)
        expected.append(tensors)
    for phase in phases:
        assert adam.step(update, phase, found, scalars)
    for i, tensors in enumerate(expected):
        for name, value in tensors.items():
            t = found[name][i]
            # A sum of numbers that nearly cancel is as far off as their rounding.
            torch.testing.assert_close(t.double(), value, rtol=ROUNDING[t.dtype], atol=ROUNDING[t.dtype])


@pytest.mark.parametrize("phases", PHASES, ids=["in one", "in two"])
@pytest.mark.parametrize("dtype", adam.DTYPES, ids=str)
@pytest.mark.parametrize("update", UPDATES, ids=lambda u: "-".join(k for k, v in vars(u.moment).items() if v) or "m^2")
def test_every_equation_that_is_known(update, dtype, phases):
    torch.manual_seed(0)
    assert adam.knows(update) and adam.serves(update, nn.Parameter(torch.zeros(1, dtype=dtype)))
    check(update, columns(update, (40, 3), dtype), phases)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_any_sizes_and_threads(sizes, threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adam, "GRAIN", 7)
            check(UPDATES[-1], columns(UPDATES[-1], sizes))
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit():
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        found = columns(UPDATES[-1], (1000, 99_001))
        torch.set_num_threads(threads)
        try:
            assert adam.step(UPDATES[-1], "both", found, SCALARS)
        finally:
            torch.set_num_threads(before)
        results.append(torch.cat([t.double() for column in found.values() for t in column]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("phase", ["both", "averages", "move"])
def test_versions_tell_of_what_was_written(phase):
    for update in UPDATES:
        found = columns(update, (3, 5))
        assert adam.step(update, phase, found, SCALARS)
        told = [name for name, column in found.items() if [t._version for t in column] == [1, 1]]
        assert sorted(told) == sorted(update.writes(phase))


def test_numbers_that_are_none_stay_so():
    found = columns(UPDATES[0], (4,), torch.bfloat16)
    found["gradient"][0][:2] = torch.tensor([float("nan"), float("inf")])
    assert adam.step(UPDATES[0], "both", found, SCALARS)
    assert found["parameter"][0].isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "spoil",
    {
        "dtype": lambda t: t.double(),
        "size": lambda t: t[:7].clone(),
        "strides": lambda t: torch.stack([t, t], 1)[:, 0],
        "subclass": lambda t: t.as_subclass(type("Own", (torch.Tensor,), {})),
        "sparse": lambda t: t.to_sparse(),
        "negated": lambda t: torch.complex(t, -t).conj().imag,
        "zeros": lambda t: torch._efficientzerotensor(t.shape),
        "without version": torch.inference_mode()(torch.clone),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("name", ["parameter", "gradient", "sum_of_squares", "exp_avg_q"])
def test_what_is_not_as_it_is_wanted_is_left(name, spoil):
    update = next(u for u in UPDATES if u.moment.floored and u.moment.partner is None)
    found = columns(update, (8, 8))
    found[name][1] = spoil[1](found[name][1])
    before = [column[0].clone() for column in found.values()]
    versions = [column[0]._version for column in found.values()]
    assert not adam.step(update, "both", found, SCALARS)
    assert [column[0]._version for column in found.values()] == versions
    assert all(torch.equal(column[0], t) for column, t in zip(found.values(), before, strict=True))


@pytest.mark.parametrize("fields", [("signed",), ("floored", "waits"), ("floored", "misses")], ids=" ".join)
def test_other_equations_are_left_to_the_others(fields):
    update = next(update for update in UPDATES if update.moment == Moment(True))
    assert not adam.knows(replace(update, moment=replace(update.moment, **dict.fromkeys(fields, True))))
    assert not adam.knows(replace(update, amsgrad=True)) and not adam.knows(replace(update, denominator="slides"))
    assert not adam.knows(replace(update, coupled=True))
    switched = Moment(True, partner="exp_avg", remembers=True)  # from the estimator "previous" to "running_average"
    assert not adam.knows(AdamUpdate(switched, statistics=("second_moment",)))
    rmsprop = BatchInvariantRMSprop([nn.Parameter(torch.zeros(1))])
    assert not adam.knows(rmsprop.update(rmsprop.param_groups[0], 1, {}))


def check_training(monkeypatch, batches, attached=None, **options):
    """All steps are the kernel's, and parameters end where plain torch has them."""
    stepped, step = [], adam.step
    monkeypatch.setattr(adam, "step", lambda *arguments: stepped.append(step(*arguments)) or stepped[-1])
    finals = []
    for compiled in (None, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        attach(model, **(attached or {}))
        optimizer = BatchInvariantAdam(model.parameters(), lr=0.1, compiled=compiled, **options)
        for b in batches:
            optimizer.zero_grad()
            model(torch.randn(b, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            assert optimizer.path.startswith("native kernel") == (compiled is None)
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert stepped == [True] * len(batches)
    torch.testing.assert_close(*finals, rtol=1e-12, atol=1e-12)


def test_the_kernel_goes_on_after_a_short_batch(monkeypatch):
    """The last of an epoch, say: from there on q~ and m' are kept, at full batches too."""
    check_training(monkeypatch, (8, 8, 5, 8, 8, 8), batch_size=8)


@pytest.mark.parametrize(
    ("attached", "reference"), [({"every": 3}, 4), ({"fraction": 0.5}, 4), ({"every": 2}, float("inf"))]
)
def test_statistics_of_a_part(attached, reference, monkeypatch):
    check_training(monkeypatch, (8,) * 7, attached, batch_size=4, reference_batch_size=reference)


def test_what_overflows_where_nothing_is_gathered_is_no_part_of_the_average():
    update = next(update for update in UPDATES if update.moment.waits and not update.moment.infinite)
    found = columns(update, [5])
    found["gradient"][0].fill_(1e30)  # whose square is inf
    before = found["exp_avg_sq"][0].clone()
    assert adam.step(update, "both", found, SCALARS)
    assert torch.equal(found["exp_avg_sq"][0], before)


def test_where_it_is_not_used(monkeypatch):
    p = nn.Parameter(torch.zeros(1))
    assert adam.serves(UPDATES[0], p) and not adam.serves(UPDATES[0], nn.Parameter(p.data.half()))
    assert not adam.serves(UPDATES[0], nn.Parameter(p.data.to("meta")))
    assert "native" in BatchInvariantAdam([p]).path and "native" not in BatchInvariantAdam([p], compiled=False).path
    assert "native" not in BatchInvariantAdam([p], amsgrad=True).path
    monkeypatch.setattr(native, "enabled", False)
    assert not adam.serves(UPDATES[0], p)

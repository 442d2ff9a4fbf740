"""RNN, LSTM, GRU and their cells: statistics against the oracle, everything else against torch's own layer."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from gradstats import CoverageError, attach
from tests import oracle
from tests.layers import CELLS, RECURRENT, B, Steps

N, T, INPUTS, HIDDEN = 4, 5, 3, 6
LENGTHS = {"padded": None, "sorted": (5, 5, 3, 1), "unsorted": (3, 1, 5, 3)}
KINDS = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **settings: nn.RNN(*sizes, nonlinearity="relu", **settings),
    "lstm": nn.LSTM,
    "lstm, projected": lambda *sizes, **settings: nn.LSTM(*sizes, proj_size=2, **settings),
    "gru": nn.GRU,
}


def drawn_states(layer: nn.RNNBase, n: int = N):
    """h_0, or h_0 and c_0, with the examples in front."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(n, rows, layer.proj_size or layer.hidden_size, dtype=torch.float64)
    return (h, torch.randn(n, rows, layer.hidden_size, dtype=torch.float64)) if layer.mode == "LSTM" else (h,)


def packed(x, lengths):
    """x (n, t, i), cut to the lengths if there are any."""
    if lengths is None:
        return x
    in_order = list(lengths) == sorted(lengths, reverse=True)
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=in_order)


class Sequences(nn.Module):
    """x (n, t, i) or packed, and initial states (n, layers, hidden) -> the outputs of an example in one row.

    used: which outputs are returned, of h_t at all positions, h_n and c_n; `raw` keeps them all.
    """

    def __init__(self, layer, used=slice(None)):
        super().__init__()
        self.layer, self.used = layer, used

    def forward(self, x, *states):
        lstm = self.layer.mode == "LSTM"
        states = tuple(s.transpose(0, 1) for s in states)
        hx = None if not states else states if lstm else states[0]
        swaps = not isinstance(x, PackedSequence) and not self.layer.batch_first
        self.raw = y, last = self.layer(x.transpose(0, 1) if swaps else x, hx)
        if isinstance(y, PackedSequence):
            y = pad_packed_sequence(y, batch_first=True)[0]
        elif swaps:
            y = y.transpose(0, 1)
        every = [y, *(s.transpose(0, 1) for s in (last if lstm else (last,)))]
        return torch.cat([o.flatten(1) for o in every[self.used]], 1)


def check(model, *x, n=N):
    """Statistics of one step, against the oracle that draws the same numbers."""
    weights = torch.rand(n, dtype=torch.float64) + 0.5
    torch.manual_seed(1)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    with attach(model, *oracle.STATISTICS) as handle:
        torch.manual_seed(1)
        oracle.coupled_loss(model(*x), weights).backward()
        assert oracle.exact(handle, expected)
        assert handle.batch_size == n
    model.zero_grad()


def compare(model, lengths, *x):
    """Outputs, their layout, and gradients of inputs, states and parameters are those of the plain model."""
    results = []
    for prepare in (lambda model: None, attach):
        own, leaves = copy.deepcopy(model), [t.clone().requires_grad_() for t in x]
        prepare(own)
        torch.manual_seed(1)
        own(packed(leaves[0], lengths), *leaves[1:])
        outputs = tree_leaves(own.raw, is_leaf=lambda o: isinstance(o, PackedSequence))
        tensors = [o.data if isinstance(o, PackedSequence) else o for o in outputs]
        torch.autograd.backward(tensors, [(o + 1).detach().cos() for o in tensors])
        results.append((outputs[0], tensors, [t.grad for t in (*leaves, *own.parameters())]))
    (y, tensors, gradients), (attached_y, attached_tensors, attached_gradients) = results
    torch.testing.assert_close(attached_tensors, tensors, rtol=1e-10, atol=1e-12, check_stride=True)
    torch.testing.assert_close(attached_gradients, gradients, rtol=1e-10, atol=1e-12)
    if lengths:
        torch.testing.assert_close(attached_y[1:], y[1:], rtol=0, atol=0)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_statistics_match_the_oracle(data):
    boolean, n = st.booleans(), 3
    layer = KINDS[data.draw(st.sampled_from(list(KINDS)))](
        data.draw(st.integers(1, 3)),
        3,
        num_layers=data.draw(st.integers(1, 2)),
        bias=data.draw(boolean),
        batch_first=data.draw(boolean),
        bidirectional=data.draw(boolean),
    ).double()
    layer.dropout = data.draw(st.sampled_from([0.0, 0.5]))  # torch warns of it where there is one layer
    t = data.draw(st.integers(1, 4))
    lengths = data.draw(st.none() | st.lists(st.integers(1, t), min_size=n, max_size=n))
    states = drawn_states(layer, n) if data.draw(boolean) else ()
    x = torch.randn(n, t, layer.input_size, dtype=torch.float64)
    check(Sequences(layer), packed(x, lengths), *states, n=n)


@pytest.mark.parametrize(("kind", "lengths"), list(product(KINDS, LENGTHS)))
def test_the_layer_computes_what_it_did(kind, lengths):
    for bidirectional, batch_first in product((False, True), repeat=2):
        layer = KINDS[kind](
            INPUTS,
            HIDDEN,
            num_layers=2,
            batch_first=batch_first,
            bidirectional=bidirectional,
            dropout=0.4,
            dtype=torch.float64,
        )
        x = torch.randn(N, T, INPUTS, dtype=torch.float64)
        compare(Sequences(layer), LENGTHS[lengths], x)
        compare(Sequences(layer), LENGTHS[lengths], x, *drawn_states(layer))


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_alone_is_used(used):
    layer = nn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(N, T, INPUTS, dtype=torch.float64)
    check(Sequences(layer, slice(used, used + 1)), packed(x, LENGTHS["unsorted"]))


def test_norms_of_a_packed_sequence_are_in_the_order_of_its_examples():
    layer = nn.GRU(INPUTS, HIDDEN, dtype=torch.float64)
    sequences = [torch.randn(length, INPUTS, dtype=torch.float64) for length in (2, 4, 1)]
    with attach(layer, "norms") as handle:
        layer(pack_sequence(sequences, enforce_sorted=False))[1].sum().backward()
        together = handle.norms["weight_hh_l0"]
    alone = []
    for s in sequences:
        gradient = torch.autograd.grad(layer(s.unsqueeze(1))[1].sum(), layer.weight_hh_l0)[0]
        alone.append(3 * gradient.norm())
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"])
def test_positions_of_a_packed_sequence_are_refused_as_tokens(name):
    layer = nn.LSTM(INPUTS, HIDDEN, proj_size=2)
    ignored = [other for other, _ in layer.named_parameters() if other != name]
    attach(layer, granularity="token", ignore=ignored)
    x = pack_sequence([torch.randn(3, INPUTS), torch.randn(2, INPUTS)])
    with pytest.raises(CoverageError, match=f"'{name}'.*granularity='example'"):
        layer(x)[0].data.sum().backward()


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"])
def test_frozen_parameters(frozen):
    layer = nn.LSTM(INPUTS, HIDDEN, proj_size=2, dtype=torch.float64)
    layer.get_parameter(frozen).requires_grad_(False)
    check(Sequences(layer), torch.randn(N, T, INPUTS, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", RECURRENT)
def test_float32(name):
    row = RECURRENT[name]
    model, x, weights = row.make(), row.x(), torch.rand(B)
    expected = oracle.contributions(model, oracle.coupled_loss, x, weights)
    handle = attach(model, *oracle.STATISTICS)
    oracle.coupled_loss(model(x), weights).backward()
    assert oracle.worst(oracle.errors(handle, expected)) <= 1e-5


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell, steps, given):
    model = Steps(CELLS[cell](), given).double()
    model.start.requires_grad_(given)
    x = torch.randn(N, steps, 4, dtype=torch.float64)
    check(model, x)
    results = []
    for prepare in (lambda model: None, attach):
        own, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        prepare(own)
        y = own(leaf)
        y.cos().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in own.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "shape", "examples"),
    [
        *((lambda kind=kind: kind(INPUTS, HIDDEN), (N, INPUTS), 0) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
        (lambda: nn.GRU(INPUTS, HIDDEN, batch_first=True), (N, N + 1, INPUTS), 0),
        (lambda: nn.GRU(INPUTS, HIDDEN), (N + 1, N, INPUTS), 1),
    ],
)
def test_operations_in_place_on_the_output(make, shape, examples):
    first, x, found = make(), torch.randn(shape), []
    for relu in (torch.relu, torch.relu_):
        model = copy.deepcopy(first)
        stats = attach(model, example_dims=examples)
        y, *states = tree_leaves(model(x))
        (relu(y).sum() + sum(h.sum() for h in states)).backward()
        found.append([*(p.grad for p in model.parameters()), *stats.second_moment.values()])
    torch.testing.assert_close(*found)


def test_input_without_examples_is_refused():
    for model, x, way_out in (
        (nn.LSTM(INPUTS, HIDDEN), torch.randn(T, INPUTS), r"unsqueeze\(1\)"),
        (nn.GRU(INPUTS, HIDDEN, batch_first=True), torch.randn(T, INPUTS), r"unsqueeze\(0\)"),
        (nn.GRUCell(INPUTS, HIDDEN), torch.randn(INPUTS), r"unsqueeze\(0\)"),
    ):
        attach(model)
        with pytest.raises(CoverageError, match=way_out):
            model(x)


def test_wrong_shapes_are_errors_as_torch_words_them():
    model = nn.LSTM(INPUTS, HIDDEN)
    attach(model, example_dims=1).probe(torch.randn(T, N, INPUTS))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        model(torch.randn(T, N, INPUTS + 1))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        model(torch.randn(T, N, INPUTS), (torch.randn(1, N + 1, HIDDEN), torch.randn(1, N, HIDDEN)))


def test_parameters_computed_by_a_hook_are_refused():
    model = nn.LSTM(INPUTS, HIDDEN)
    prune.random_unstructured(model, "bias_hh_l0", 0.5)
    with pytest.raises(CoverageError, match="bias_hh_l0_orig"):
        attach(model)

"""The table of traps: ways in which others are silently wrong. Here each is exact, or refused with a way out.

A case is a model, its input, how it is backpropagated, and the verdict: exact against the oracle, or what the refusal
says. `elsewhere` are tests of a trap that are no model and batch, in the files of what they test.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests import oracle
from tests.gradstats import (
    test_adversary,
    test_compiled,
    test_contribution,
    test_handle,
    test_leaf,
    test_models,
    test_units,
)
from tests.gradstats.optim import test_adam, test_state, test_torch
from tests.gradstats.rules import test_embedding_bag, test_fallback, test_recurrent, test_refusals, test_shapes
from tests.layers import LAYERS, RECURRENT, Attention, B, Conv1D, Positions, floats, ids
from tests.trap_models import (
    TWO,
    LowRank,
    Output,
    attention_by_hand,
    batch_norm,
    checkpointed,
    contrastive,
    flattened,
    linear,
    of,
    put_on_top,
    sequential,
    sharing,
    tied,
    time_first,
    uneven_tokens,
    weight_norm,
    wired,
    with_loss,
)
from tests.trap_steps import (
    Step,
    attached_again,
    attached_twice,
    autograd_grad_between,
    autograd_grad_instead,
    backward_twice,
    copied,
    evaluates,
    exception_in_the_backward,
    exception_in_the_forward,
    penalised,
    plain,
    saved,
    short_last_batch,
    siamese,
    swapped_after_attach,
    two_in_flight,
    unused_output,
    zero_grad_of_the_model,
)

EXACT = None


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    x: Callable[[], Any]
    verdict: str | None = EXACT  # or a pattern that the refusal matches
    step: Step = plain
    loss: Callable[[Any, Tensor], Tensor] = oracle.coupled_loss  # of the output and a weight for every example
    cut: Sequence[str | int] = ()  # outputs through which the loss depends on the parameters; none: all
    attach: dict[str, Any] = {}
    example_dim: int = 0
    part: str = ""  # the submodule that is attached
    before: Sequence[Callable[[], Any]] = ()  # inputs of training steps before


class Trap(NamedTuple):
    title: str
    cases: dict[str, Case] = {}
    elsewhere: tuple[Callable, ...] = ()


def layer(name: str) -> Case:
    return Case(*{**LAYERS, **RECURRENT}[name])


def layers(*names: str) -> dict[str, Case]:
    return {name: layer(name) for name in names}


COUPLES = "depends? on the other examples"

TRAPS: dict[int, Trap] = {
    1: Trap(
        "a token is not an example: positions are summed before squaring",
        layers("linear, few positions", "linear, many positions", "embedding", "layer norm", "group norm", "conv2d"),
        (test_contribution.test_tokens_are_positions,),
    ),
    2: Trap(
        "scale: mean or sum loss, a short last batch, accumulation",
        {"a short last batch": Case(TWO, floats(4), step=short_last_batch)},
        (
            test_handle.test_sum_loss,
            test_handle.test_accumulation_adds_up,
            test_handle.test_duplicating_every_example_leaves_the_second_moment,
        ),
    ),
    3: Trap(
        "sharing: the cross terms of all uses by one example",
        {
            "tied embedding and head": Case(tied(lambda m, x: m.head(m.body(m.embedding(x)).tanh())), ids(6)),
            "tied, without positions": Case(tied(lambda m, x: m.head(m.body(m.embedding(x)).tanh())), ids()),
            "tied, looked up twice": Case(
                tied(lambda m, x: m.head(m.embedding(x) * m.embedding(x.flip(1)).cos())), ids(6)
            ),
            "two Linears with one weight": Case(sharing(lambda m, x: m.b(m.a(x).tanh())), floats(4)),
            "two Linears with one weight, positions": Case(sharing(lambda m, x: m.b(m.a(x).tanh())), floats(3, 4)),
            "sibling branches": Case(sharing(lambda m, x: m.a(x.sin()) * m.b(x.cos())), floats(3, 4)),
            "one module twice": Case(wired(lambda m, x: m.a(m.a(x).tanh()), a=linear), floats(4)),
            "one module three times": Case(wired(lambda m, x: m.a(m.a(m.a(x).tanh()).tanh()), a=linear), floats(3, 4)),
            "one convolution twice": Case(
                wired(lambda m, x: m.a(m.a(x).tanh()), a=lambda: nn.Conv2d(3, 3, 3, padding=1)), floats(3, 4, 4)
            ),
            "one norm twice": Case(
                wired(lambda m, x: m.norm(m.a(m.norm(x))), a=linear, norm=lambda: nn.LayerNorm(4)), floats(3, 4)
            ),
            "one LSTM twice": Case(
                wired(lambda m, x: m.a(m.a(x)[0])[0], a=lambda: nn.LSTM(4, 4, batch_first=True)), floats(3, 4)
            ),
            "one use with positions, one without": Case(
                wired(lambda m, x: m.a(x).tanh().mean(1) * m.a(x[:, 0]), a=linear), floats(3, 4)
            ),
        },
    ),
    4: Trap(
        "a child's weight used functionally, parametrizations, penalties",
        {
            "F.linear with the embedding's weight": Case(
                wired(
                    lambda m, x: F.linear(m.body(m.embedding(x)).tanh(), m.embedding.weight),
                    embedding=lambda: nn.Embedding(7, 4),
                    body=linear,
                ),
                ids(6),
            ),
            "weight norm": Case(weight_norm, floats(3, 4)),
            "orthogonal": Case(lambda: nn.Sequential(parametrizations.orthogonal(linear()), linear()), floats(3, 4)),
            "spectral norm": Case(
                lambda: nn.Sequential(parametrizations.spectral_norm(linear())),
                floats(4),
                "'0' .*writes to a buffer.*Update the buffer outside",
            ),
            "inside and outside of its module": Case(
                wired(lambda m, x: m.a(x).tanh() @ m.a.weight, a=linear), floats(3, 4)
            ),
            "a penalty on the weights": Case(
                TWO, floats(4), r"parameter 'a.weight' \(4, 4\) receives gradient from outside.*weight_decay", penalised
            ),
            "a penalty on an ignored weight": Case(TWO, floats(4), step=penalised, attach={"ignore": ["a.weight"]}),
        },
        (test_handle.test_refused_and_usable_afterwards, test_leaf.test_a_penalty_is_seen_however_small),
    ),
    5: Trap(
        "embeddings",
        {
            **layers("embedding, padding", "embedding, ids equal", "embedding, one id an example"),
            **layers("embedding bag, sum", "embedding bag, mean", "embedding bag, max", "embedding bag, max, padding"),
            **layers("embedding bag, ids equal", "embedding bag, weighted"),
            "frequencies": Case(lambda: nn.Embedding(4, 4, scale_grad_by_freq=True), ids(6, top=4)),
            "frequencies, under vmap": Case(
                lambda: nn.Embedding(4, 4, scale_grad_by_freq=True),
                ids(6, top=4),
                "scale_grad_by_freq.*build it without",
                attach={"engine": "vmap"},
            ),
            "padding, under vmap": Case(
                lambda: nn.Embedding(4, 4, padding_idx=1), ids(6, top=4), attach={"engine": "vmap"}
            ),
        },
        (test_embedding_bag.test_offsets, test_shapes.test_embedding, test_refusals.test_settings),
    ),
    6: Trap(
        "convolutions: groups, dilation, stride, padding, transposed",
        {name: layer(name) for name in LAYERS if "conv" in name},
        (test_shapes.test_convolution, test_shapes.test_transposed_convolution),
    ),
    7: Trap(
        "which dimension runs over the examples",
        {
            "position ids (1, T)": Case(Positions, ids(3)),
            "position ids (1, T), T equal to B": Case(
                wired(
                    lambda m, x: m.tokens(x) + m.positions(torch.arange(x.shape[1]).unsqueeze(0)),
                    tokens=lambda: nn.Embedding(7, 4),
                    positions=lambda: nn.Embedding(B, 4),
                ),
                ids(B),
            ),
            "(T, B, D) inside": Case(time_first(), floats(3, 4)),
            "(T, B, D) inside, T equal to B": Case(time_first(), floats(B, 4)),
            "(T, B, D) at the door": Case(
                TWO,
                lambda: floats(3, 4)().transpose(0, 1),
                loss=lambda output, weights: oracle.coupled_loss(output.transpose(0, 1), weights),
                attach={"example_dims": 1},
                example_dim=1,
            ),
            "flattened to B T": Case(flattened(False), floats(3, 4)),
            "flattened to B T, T equal to B": Case(flattened(False), floats(B, 4)),
            "flattened to T B": Case(flattened(True), floats(3, 4)),
            "flattened to T B, T equal to B": Case(flattened(True), floats(B, 4)),
            **layers("linear, two position dimensions", "linear, positions equal to examples"),
            "unbatched": Case(linear, lambda: torch.randn(4), r"takes batched tensors.*Use x.unsqueeze\(0\)"),
        },
        (test_models.test_one_example_after_several, test_models.test_as_many_positions_as_examples),
    ),
    8: Trap(
        "uneven token counts, and losses that couple examples",
        {
            "a mean over tokens": Case(TWO, floats(4, 4), loss=uneven_tokens),
            "a mean over tokens, in the forward": Case(
                wired(with_loss, a=linear, b=linear),
                floats(4, 4),
                loss=lambda output, weights: output["loss"],
                cut=("logits",),
            ),
            "contrastive": Case(TWO, floats(4), loss=contrastive),
        },
    ),
    9: Trap(
        "use of the graph",
        {
            "unused output": Case(TWO, floats(4), step=unused_output),
            "two forwards in flight": Case(
                TWO, floats(4), r"'[ab]' \(Linear\) was used by two forwards.*new_examples\(\)", two_in_flight
            ),
            "Siamese, from outside": Case(
                TWO, floats(4), r"'[ab]' \(Linear\) was used by two forwards.*from the forward of one module", siamese
            ),
            "Siamese, from one module": Case(wired(lambda m, x: m.inner(x) * m.inner(-x), inner=TWO), floats(4)),
            "second backward with retain_graph": Case(TWO, floats(4), "backpropagated twice", backward_twice),
            "exception in the forward": Case(TWO, floats(4), step=exception_in_the_forward),
            "exception in the backward": Case(TWO, floats(4), step=exception_in_the_backward),
            "evaluation with gradients in between": Case(TWO, floats(4), step=evaluates(torch.enable_grad)),
            "torch.autograd.grad in between": Case(TWO, floats(4), step=autograd_grad_between),
            "torch.autograd.grad instead": Case(
                TWO, floats(4), "'a.weight' has no statistics.*autograd.grad leaves none", autograd_grad_instead
            ),
        },
        (
            test_handle.test_two_forwards_declared_new_examples,
            test_handle.test_exception_between_forward_and_backward,
            test_adversary.test_an_older_graph_backpropagated_after_a_newer_one_is_refused,
            test_adversary.test_autograd_grad_after_a_backward_counts_nothing,
        ),
    ),
    10: Trap(
        "lifetime: model.zero_grad() alone",
        {"four steps": Case(TWO, floats(4), step=zero_grad_of_the_model)},
        (test_handle.test_zeroed_gradients_start_afresh, test_adversary.test_zeros_assigned_as_gradient_start_afresh),
    ),
    11: Trap(
        "frozen, adapted, unused parameters, and gradients that are exactly zero",
        {
            **layers("linear, frozen weight", "linear, frozen bias", "linear, frozen in front"),
            "LoRA": Case(lambda: nn.Sequential(LowRank(), nn.Tanh(), LowRank()), floats(3, 4)),
            "input without gradient": Case(TWO, lambda: floats(4)().requires_grad_(False)),
            "input with gradient": Case(TWO, lambda: floats(4)().requires_grad_()),
            "a parameter without gradient": Case(wired(lambda m, x: m.a(x), a=linear, unused=linear), floats(4)),
            "a parameter with another output's gradient": Case(
                wired(lambda m, x: (m.a(x), m.b(x)), a=linear, b=linear), floats(4), loss=of(0), cut=(0,)
            ),
            "key bias": Case(wired(attention_by_hand, query=linear, key=linear, value=linear), floats(3, 4)),
            "key bias of MultiheadAttention": Case(Attention, floats(3, 4)),
        },
        (test_handle.test_unfreezing_after_attach, test_adversary.test_parameter_that_the_loss_does_not_depend_on),
    ),
    12: Trap(
        "checkpointing, in-place activations, compilation",
        {
            **layers("checkpointed", "checkpointed, reentrant", "linear, in-place activation"),
            "shared with a checkpointed segment": Case(checkpointed(reentrant=False), floats(3, 4)),
        },
        (
            test_models.test_gradient_checkpointing,
            test_adversary.test_reentrant_checkpointing_with_two_forwards_before_the_backwards,
            test_adversary.test_functional_tying_across_a_reentrant_segment_is_refused,
            test_compiled.test_a_new_batch_size_compiles_at_most_once_more,
        ),
    ),
    13: Trap(
        "low precision: squares in float32, scaled by the square of the loss scale",
        elsewhere=(
            test_leaf.test_autocast,
            test_leaf.test_low_precision_parameters,
            test_contribution.test_squares_of_low_precision_are_float32,
            test_adversary.test_grad_scaler_changes_nothing,
            test_adversary.test_rms_norm_default_eps_in_low_precision,
        ),
    ),
    14: Trap(
        "what couples examples; the dropout masks of the real forward",
        {
            "BatchNorm in training": Case(batch_norm, floats(4), "module '1': .*nn.GroupNorm.*eval"),
            "BatchNorm in evaluation": Case(lambda: batch_norm().eval(), floats(4)),
            "normalised over the batch by hand": Case(
                wired(lambda m, x: m.b(F.normalize(m.a(x), dim=0)), a=linear, b=linear),
                floats(4),
                f"{COUPLES}.*'b.weight', 'b.bias'.*Keep what mixes examples",
            ),
            "dropout": Case(lambda: nn.Sequential(linear(), nn.Dropout(0.5), linear()), floats(3, 4)),
        },
        (test_models.test_dropout, test_handle.test_batch_norm_switched_to_training_after_attach_is_refused),
    ),
    15: Trap("variance as a difference of two large numbers"),  # test_traps.py, in float32
    16: Trap(
        "data parallel: the wrapper is a module as any other",
        {"DataParallel on one device": Case(lambda: nn.DataParallel(sequential()), floats(3, 4))},
        (test_adversary.test_functional_call_leaves_no_trace,),  # as a replica's tensors, those are no parameters
    ),
    17: Trap(
        "copies use their own weights",
        {
            "deepcopy": Case(sequential, floats(3, 4), step=copied(copy.deepcopy)),
            "pickle": Case(sequential, floats(3, 4), step=copied(lambda m: pickle.loads(pickle.dumps(m)))),
            "torch.save": Case(sequential, floats(3, 4), step=copied(saved)),
        },
        (test_handle.test_copies_have_weights_and_statistics_of_their_own, test_state.test_copy_of_model_and_optimizer),
    ),
    18: Trap(
        "subclasses, and classes swapped at run time",
        {
            **layers("linear, forward overridden", "transformers Conv1D"),
            "class swapped before attach": Case(lambda: nn.Sequential(put_on_top(linear()), linear()), floats(4)),
            "class swapped after attach": Case(sequential, floats(4), step=swapped_after_attach),
            "subclass by name": Case(lambda: put_on_top(Conv1D(3, 4)), floats(4)),
        },
        (test_adversary.test_overridden_inner_method_is_another_layer,),
    ),
    19: Trap(
        "attention and encoder layers, both layouts, without the fast path",
        {
            **layers("multi-head attention", "transformer layer"),
            "multi-head attention, (T, B, D)": Case(
                wired(lambda m, x: m.a(x, x.sin(), x)[0].transpose(0, 1), a=lambda: nn.MultiheadAttention(4, 2)),
                lambda: floats(3, 4)().transpose(0, 1).contiguous(),
                attach={"example_dims": 1},
            ),
            "encoder layer, (T, B, D) inside": Case(
                wired(
                    lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1),
                    a=lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
                ),
                floats(B, 4),
            ),
            "encoder layer, evaluation mode": Case(
                lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), floats(3, 4)
            ),
            "encoder, evaluation in between": Case(
                lambda: nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
                ),
                floats(3, 4),
                step=evaluates(torch.no_grad),
            ),
        },
    ),
    20: Trap(
        "arguments and outputs of all kinds",
        {
            "keywords only": Case(
                wired(lambda m, *, x, scale: m.a(x) * scale, a=linear), lambda: {"x": floats(4)(), "scale": 2.0}
            ),
            "nested containers": Case(
                wired(lambda m, batch: m.a(batch["x"][0]) + m.b(batch["x"][1]["other"]), a=linear, b=linear),
                lambda: {"batch": {"x": [floats(4)(), {"other": floats(4)()}], "name": "train", "none": None}},
            ),
            "tuple and None": Case(wired(lambda m, x: (None, m.a(x)), a=linear), floats(4), loss=of(1), cut=(1,)),
            "dict": Case(
                wired(lambda m, x: {"state": m.a(x), "nothing": None}, a=linear),
                floats(4),
                loss=of("state"),
                cut=("state",),
            ),
            "dataclass": Case(
                wired(lambda m, x: Output(m.a(x)), a=linear), floats(4), loss=of("state"), cut=("state",)
            ),
        },
        (test_fallback.test_tuple_and_none_outputs_pass, test_fallback.test_outputs_that_are_no_batch_are_refused),
    ),
    21: Trap(
        "one dropout mask an example under vmap", elsewhere=(test_fallback.test_dropout_masks_differ_between_examples,)
    ),
    22: Trap(
        "batch sizes that change: debiasing, and the floor for R above B",
        elsewhere=(
            test_adam.test_follows_its_equations,
            test_torch.test_is_torchs_in_float64,
            test_units.test_splitting_batches_changes_nothing,
            test_adversary.test_estimates_across_steps_never_make_a_root_of_a_negative,
        ),
    ),
}

# Modes of use, beside those above.
MODES = Trap(
    "modes",
    {
        **layers("conv2d, channels last", "transposed conv2d, channels last", "linear, non-contiguous"),
        "non-contiguous inside": Case(wired(lambda m, x: m.b(m.a(x).mT), a=linear, b=linear), floats(4, 4)),
        "inference_mode in between": Case(TWO, floats(4), step=evaluates(torch.inference_mode)),
        "attach twice": Case(
            TWO, floats(4), r"attached already: use gradstats.attached\(model\), or detach", attached_twice
        ),
        "detach, and attach again": Case(TWO, floats(4), step=attached_again),
        "attach to a submodule": Case(
            wired(
                lambda m, x: m.head(m.body(m.stem(x)).tanh()),
                stem=linear,
                body=sequential,
                head=lambda: nn.Linear(3, 2),
            ),
            floats(3, 4),
            part="body",
        ),
        "attach to a layer called twice": Case(
            TWO,
            floats(4),
            r"two forwards.*attach that module",
            lambda m, x, loss, stats: loss(m.a(m.a(x))).backward(),
            part="a",
        ),
    },
    (test_handle.test_detach_leaves_the_model_as_it_was, test_recurrent.test_operations_in_place_on_the_output),
)

"""Unmodified models against the oracle: every parameter of every row."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradstats import attach
from tests import oracle
from tests.models import MODELS, B, Balanced, Row, T, batch_loss, build, draw, language

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own call
    # Torch's advice on the layout that these rows are about.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


def contributions(row: Row, model: nn.Module) -> dict[str, Tensor]:
    return oracle.contributions(model, batch_loss, draw(row), None, row.cut, row.example_dim, row.ignore)


@cache
def expected(name: str) -> dict[str, Tensor]:
    return contributions(MODELS[name], build(MODELS[name]))


def step(
    name: str, dtype: torch.dtype = torch.float64, prepare: Callable[[Any], Any] = lambda model: None
) -> tuple[nn.Module, Any]:
    """The row's model after one attached backward pass, and the handle."""
    row = MODELS[name]
    model = build(row).to(dtype)
    prepare(model)
    handle = attach(model, *oracle.STATISTICS, ignore=row.ignore, example_dims=row.example_dims)
    batch_loss(model(**draw(row, dtype))).backward()
    return model, handle


def check(model: nn.Module, handle: Any, batch: dict[str, Tensor], c: dict[str, Tensor]) -> None:
    """One more backward pass of an attached model in float64 against its contributions."""
    model.zero_grad()
    batch_loss(model(**batch)).backward()
    assert oracle.worst(oracle.errors(handle, c)) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_match_the_oracle(name, dtype):
    bar = MODELS[name].bar if dtype == torch.float64 else 1e-4
    model, handle = step(name, dtype)
    assert oracle.worst(oracle.errors(handle, expected(name))) <= bar
    assert handle.batch_size == B
    gradients = {parameter: c.sum(0) for parameter, c in expected(name).items()}
    whole = oracle.whole(gradients)
    for parameter, gradient in gradients.items():
        found = model.get_parameter(parameter).grad.double()
        assert (found - gradient).norm() <= bar * max(gradient.norm(), 1e-3 * whole)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama", "clip", "mixtral", "whisper"])
def test_eager_attention(name):
    model = build(MODELS[name])
    model.set_attn_implementation("eager")
    _, handle = step(name, prepare=lambda model: model.set_attn_implementation("eager"))
    assert oracle.worst(oracle.errors(handle, contributions(MODELS[name], model))) <= 1e-9


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "llama", "mixtral", "lora on gpt2"])
def test_gradient_checkpointing(name, use_reentrant):
    def prepare(model):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})

    _, handle = step(name, prepare=prepare)
    assert oracle.worst(oracle.errors(handle, expected(name))) <= 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, in counting tokens
def test_grouped_experts():
    """What transformers runs by default: a matmul over tokens sorted by expert, whatever their examples."""
    _, handle = step("mixtral", torch.float32, lambda model: model.set_experts_implementation("grouped_mm"))
    assert oracle.worst(oracle.errors(handle, expected("mixtral"))) <= 1e-4


def test_load_balancing_loss():
    """It couples the examples through what the routers return, positions and examples in one dimension."""
    batch, model = language(), Balanced(build(MODELS["mixtral"])).double()
    model.mixtral.config.output_router_logits, model.mixtral.router_aux_loss_coef = True, 0.5
    torch.testing.assert_close(model.loss(model(**batch), None), model.mixtral(**batch).loss)
    c = oracle.contributions(model, model.loss, batch, None, ("logits", "router"))
    c = {name.removeprefix("mixtral."): value for name, value in c.items()}
    with attach(model.mixtral, *oracle.STATISTICS) as handle:
        check(model.mixtral, handle, batch, c)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "opt"])
def test_dropout(name):
    """The masks of the attached model are those of the plain one: neither probe nor leaves draw random numbers."""
    batch, model = language(), build(MODELS[name]).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    torch.manual_seed(2)
    c = oracle.contributions(model, batch_loss, batch, None, ("logits",))
    with attach(model, *oracle.STATISTICS) as handle:
        torch.manual_seed(2)
        check(model, handle, batch, c)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "opt", "mixtral"])
def test_batches_of_other_sizes(name):
    """What the probe found of the first batch holds for all: longer, shorter, as many positions as examples, no
    padding."""
    batches = [language(), language((5, 2)), language((4, 3, 2, 1)), language((2, 2, 2, 2, 2))]
    model = build(MODELS[name]).double()
    expected = [oracle.contributions(model, batch_loss, batch, None, ("logits",)) for batch in batches]
    with attach(model, *oracle.STATISTICS) as handle:
        for batch, c in zip(batches, expected, strict=True):
            check(model, handle, batch, c)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "deberta-v2", "mixtral"])
def test_as_many_positions_as_examples(name):
    """In the first batch of all: sizes tell nothing, so the user does."""
    batch, model = language((3, 2, 3)), build(MODELS[name]).double()
    c = oracle.contributions(model, batch_loss, batch, None, ("logits",))
    with attach(model, *oracle.STATISTICS, example_dims=dict.fromkeys(batch, 0)) as handle:
        check(model, handle, batch, c)


@pytest.mark.parametrize("entry", [0, 7])
@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_probing_with_equal_examples(name, entry):
    """Zeros, as people probe with: they tell little, and must not tell anything wrong."""
    batch, model = language(), build(MODELS[name]).double()
    c = oracle.contributions(model, batch_loss, batch, None, ("logits",))
    with attach(model, *oracle.STATISTICS) as handle:
        handle.probe(**{key: torch.full_like(x, 1 if key == "attention_mask" else entry) for key, x in batch.items()})
        check(model, handle, batch, c)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_position_ids_that_all_examples_share(name):
    batch, model = language() | {"position_ids": torch.arange(T).unsqueeze(0)}, build(MODELS[name]).double()
    c = oracle.contributions(model, batch_loss, batch, None, ("logits",))
    with attach(model, *oracle.STATISTICS) as handle:
        check(model, handle, batch, c)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "mixtral", "swin"])
def test_one_example_after_several(name):
    """The square of the mean gradient; a leading dimension of 1 is no example dimension by itself."""
    model, handle = step(name)
    model.zero_grad()
    batch_loss(model(**{key: x[:1] for key, x in draw(MODELS[name], torch.float64).items()})).backward()
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(handle.second_moment[parameter], p.grad.square())

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import Split
from experiments.laboratory.problem import as_configured, backward, build, loss_of, predictions, problem_of
from experiments.models import build_model
from experiments.schemas.run import Config


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.dropout=0", "model.widths=[16, 8]", "data.test_fraction=0.5"],
        ["model=convnet"],
        ["data=npz", "data.path='a folder/b=c.npz'"],
        ["data=topics", "model=gpt", "data.limit=null"],
    ],
)
def test_data_and_model_come_back(short: Callable[..., Config], overrides: list[str]) -> None:
    config = short(*overrides)
    again = as_configured(problem_of(config))
    assert (again.data, again.model) == (config.data, config.model)


def test_only_what_is_not_the_default_is_told(short: Callable[..., Config]) -> None:
    assert problem_of(short()) == "data=digits model=mlp"
    assert problem_of(short("model.dropout=0", "train.epochs=1")) == "data=digits model=mlp model.dropout=0.0"


def test_the_model_starts_as_in_a_run_of_this_seed(short: Callable[..., Config]) -> None:
    config = short("model.widths=[8]")
    data, model = build(problem_of(config), seed=3)
    torch.manual_seed(3)
    same = build_model(config.model, data.shape, data.classes)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)


def test_files_are_found_by_their_path(short: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "own.npz"
    path.parent.mkdir()
    np.savez(path, x=np.eye(20), y=np.arange(20) % 2)
    data, _ = build(problem_of(short("data=npz", f"data.path='{path}'")), seed=0)
    assert data.shape == (20,)


def test_the_gradient_is_of_these_examples_alone_and_scaled() -> None:
    data, model = build("data=digits model=mlp model.dropout=0", seed=0)
    x, y = data.train.x[:5], data.train.y[:5]
    (alone,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), [model[1].weight])
    backward(model, data.train.x, data.train.y)
    backward(model, x, y, scale=8.0)
    assert torch.equal(model[1].weight.grad, 8 * alone)


def test_the_gradient_of_sequences_is_the_mean_over_them_and_their_positions() -> None:
    data, model = build("data=topics model=gpt data.limit=100 data.context=8 model.width=8", seed=0)
    x, y = data.train.x[:4], data.train.y[:4]
    losses = [
        torch.nn.functional.cross_entropy(model.double()(x[i : i + 1])[0, t], y[i, t])
        for i in range(4)
        for t in range(8)
    ]
    mean = torch.stack(losses).mean()
    expected = torch.autograd.grad(mean, list(model.parameters()))
    backward(model, x, y)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert loss_of(model, Split(x, y)) == pytest.approx(mean.item())


def test_predictions_and_losses_are_without_dropout() -> None:
    data, model = build("data=digits model=mlp", seed=0)
    first, again = (predictions(model, data.test.x) for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad and model.training
    assert loss_of(model, data.test) == torch.nn.functional.cross_entropy(first, data.test.y).item()


def test_a_look_leaves_the_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5))
    for training in (True, False):
        assert torch.equal(predictions(model.train(training), torch.ones(3)), torch.ones(3))
        assert model.training is training

"""What users do with an attached model, for the table of traps: orders of forwards and backwards, copies, modes."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

import gradstats
from gradstats import Handle
from tests import oracle
from tests.trap_models import put_on_top

Loss = Callable[[Any], Tensor]
# From the attached model, its input, the loss and the handle. Returns the model to be judged where that is another one.
Step = Callable[[nn.Module, Any, Loss, Handle], nn.Module | None]


def plain(model: nn.Module, x: Any, loss: Loss, stats: Handle) -> None:
    loss(oracle.call(model, x)).backward()


def penalised(model, x, loss, stats):
    (loss(model(x)) + 1e-3 * model.a.weight.square().sum()).backward()


def unused_output(model, x, loss, stats):
    model(-x)
    plain(model, x, loss, stats)


def two_in_flight(model, x, loss, stats):
    first, second = loss(model(x)), loss(model(-x))
    first.backward()
    second.backward()


def siamese(model, x, loss, stats):
    loss(model(x) * model(-x)).backward()


def backward_twice(model, x, loss, stats):
    output = loss(model(x))
    output.backward(retain_graph=True)
    output.backward()


def exception_in_the_forward(model, x, loss, stats):
    model(x)  # what breaks in the first forward, breaks in the probe

    def breaks(*_):
        raise ValueError("planted")

    hook = model.b.register_forward_pre_hook(breaks)
    with suppress(ValueError):
        model(x)
    hook.remove()
    plain(model, x, loss, stats)


def exception_in_the_backward(model, x, loss, stats):
    def breaks(_):
        raise ValueError("planted")

    hook = model.a.register_forward_hook(lambda module, args, output: output.register_hook(breaks) and None)
    with suppress(ValueError):
        plain(model, x, loss, stats)
    hook.remove()
    model.zero_grad()
    plain(model, x, loss, stats)


def evaluates(under: Callable[[], AbstractContextManager]) -> Step:
    """Another batch of another size between forward and backward."""

    def step(model, x, loss, stats):
        output = loss(model(x))
        model.eval()
        with under():
            model(torch.cat([x, x]).sin())
        model.train()
        output.backward()

    return step


def autograd_grad_instead(model, x, loss, stats):
    parameters = list(model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss(model(x)), parameters), strict=True):
        p.grad = gradient


def autograd_grad_between(model, x, loss, stats):
    output = loss(model(x))
    torch.autograd.grad(model(-x).sum(), list(model.parameters()))
    output.backward()


def zero_grad_of_the_model(model, x, loss, stats):
    for _ in range(4):
        plain(model, x, loss, stats)
        model.zero_grad()
    plain(model, x, loss, stats)


def short_last_batch(model, x, loss, stats):
    model(torch.cat([x, x, x])).square().mean().backward()
    model.zero_grad()
    plain(model, x, loss, stats)


def copied(duplicate: Callable[[nn.Module], nn.Module]) -> Step:
    def step(model, x, loss, stats):
        other = duplicate(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        plain(other, x, loss, stats)
        return other

    return step


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def swapped_after_attach(model, x, loss, stats):
    put_on_top(model[0])
    plain(model, x, loss, stats)


def attached_again(model, x, loss, stats):
    stats.detach()
    plain(model, x, loss, stats)
    model.zero_grad()
    gradstats.attach(model, *stats.statistics)
    plain(model, x, loss, stats)
    return model


def attached_twice(model, x, loss, stats):
    gradstats.attach(model)

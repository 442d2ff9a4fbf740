"""Accelerate: a loop of one's own, with accumulation that it counts and clipping by its own name."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import gradstats
from gradstats.optim import BatchInvariantAdam
from tests import oracle
from tests.integrations.problem import (
    MAX_NORM,
    OPTIONS,
    clipped,
    contributions,
    first_second_moment,
    language_model,
    loss_of,
    sentences,
    token_sum,
    tokens,
)

STEPS = 2


@pytest.mark.parametrize("clips", [True, False])
def test_accelerate(clips):
    """The last step is over one batch, which Accelerate divides by two all the same: statistics are those of that
    loss."""
    model = language_model()
    stats = gradstats.attach(model, *oracle.STATISTICS, follow_clipping=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    optimizer = BatchInvariantAdam(model.parameters(), **OPTIONS)
    loader = DataLoader(sentences(20), batch_size=4)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    window, sizes = [], []
    for batch in loader:
        window.append(batch)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                c = contributions(model, window, [1 / float(tokens(b["labels"])) / STEPS for b in window])
                if clips:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    c = clipped(c)
                assert oracle.worst(oracle.errors(stats, c)) <= 1e-4
                sizes.append(stats.batch_size)
            prepared.step()
            if len(sizes) == 1 and accelerator.sync_gradients:
                for name, p in model.named_parameters():
                    s = first_second_moment(c[name], OPTIONS["reference_batch_size"])
                    assert oracle.error(optimizer.state[p]["exp_avg_sq"], s, 1.0) <= 1e-4
            prepared.zero_grad()
        if accelerator.sync_gradients:
            window.clear()
    assert sizes == [8, 8, 4]
    assert optimizer.examples == 20


def test_one_mean_over_the_tokens_of_a_step():
    """Undoing Accelerate's division, as its guide to accumulation does."""
    model = language_model()
    stats = gradstats.attach(model, *oracle.STATISTICS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    model, loader = accelerator.prepare(model, DataLoader(sentences(8), batch_size=4))
    batches = list(loader)
    count = sum(tokens(batch["labels"]) for batch in batches)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        accelerator.backward(token_sum(logits, batch["labels"]) / count * STEPS)
    expected = contributions(model, batches, [1 / float(count)] * 2)
    assert oracle.worst(oracle.errors(stats, expected)) <= 1e-4
    assert torch.isfinite(stats.norms.total).all()

"""Hugging Face's Trainer: it divides by tokens or by steps, clips by itself and zeroes with model.zero_grad()."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

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
    sentences,
    token_sum,
    tokens,
)


class MeanOfBatches(nn.Module):
    """A model whose forward does not take num_items_in_batch: the Trainer divides its loss by the number of steps."""

    def __init__(self):
        super().__init__()
        self.inner = language_model()

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"logits": logits} | ({} if labels is None else {"loss": token_sum(logits, labels) / tokens(labels)})


class Compare(TrainerCallback):
    """With the oracle, before every optimizer step."""

    def __init__(self, stats, weights, clips):
        self.stats, self.weights, self.clips = stats, weights, clips
        self.batches, self.errors, self.sizes, self.expected = [], [], [], []
        stats.model.register_forward_pre_hook(lambda m, args, batch: self.batches.append(batch), with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches = list(self.batches)  # a copy of the model adds to them
        c = contributions(self.stats.model, batches, self.weights(batches))
        self.expected.append(clipped(c) if self.clips else c)
        self.errors.append(oracle.worst(oracle.errors(self.stats, self.expected[-1])))
        self.sizes.append(self.stats.batch_size)
        self.batches.clear()


def by_labels(batches):
    """The sum over the labels of a step over their number, with those at position 0, which GPT-2 does not predict: the
    Trainer counts only what is predicted where a model's class is called ...ForCausalLM."""
    return [1 / float(sum(batch["labels"].ne(-100).sum() for batch in batches))] * len(batches)


def by_steps(batches):
    """The mean over its batches of the mean over tokens."""
    return [1 / float(tokens(batch["labels"])) / len(batches) for batch in batches]


@pytest.mark.parametrize("max_norm", [MAX_NORM, 0.0])
@pytest.mark.parametrize(("make", "weights"), [(language_model, by_labels), (MeanOfBatches, by_steps)])
def test_trainer(tmp_path, make, weights, max_norm):
    model = make()
    stats = gradstats.attach(model, *oracle.STATISTICS, follow_clipping=True)
    optimizer = BatchInvariantAdam(model.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    compare, state = Compare(stats, weights, max_norm > 0), {}
    optimizer.register_step_post_hook(
        lambda optimizer, *_: (
            state or state.update({p: optimizer.state[p]["exp_avg_sq"].clone() for p in optimizer.state})
        )
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=max_norm,
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model, arguments, train_dataset=sentences(22), optimizers=(optimizer, scheduler), callbacks=[compare]
    ).train()
    assert compare.sizes == [8, 8, 6]
    assert optimizer.examples == 22
    assert max(compare.errors) <= 1e-3
    for name, p in model.named_parameters():
        s = first_second_moment(compare.expected[0][name], OPTIONS["reference_batch_size"])
        assert oracle.error(state[p], s, 1.0) <= 1e-3

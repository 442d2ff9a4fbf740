"""Lightning: automatic optimization, in which the optimizer's closure runs the backward pass and then clips."""

import pytest
import torch
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
    tokens,
)

lightning = pytest.importorskip("lightning")

# Lightning's own: it uses what torch has deprecated, and advises on workers and logging.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

STEPS = 2


class Language(lightning.LightningModule):
    """The loss of a batch is its mean over tokens; Lightning divides it by the number of accumulation steps."""

    def __init__(self, clips):
        super().__init__()
        self.model, self.clips = language_model(), clips
        self.stats = gradstats.attach(self.model, *oracle.STATISTICS, follow_clipping=True)
        self.window, self.errors, self.sizes, self.expected = [], [], [], []

    def configure_optimizers(self):
        return BatchInvariantAdam(self.model.parameters(), **OPTIONS)

    def training_step(self, batch, index):
        self.window.append(batch)
        return loss_of(self.model, batch)

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        """Last of what comes before the optimizer's equation."""
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        c = contributions(self.model, self.window, [1 / float(tokens(b["labels"])) / STEPS for b in self.window])
        self.expected.append(clipped(c) if self.clips else c)
        self.errors.append(oracle.worst(oracle.errors(self.stats, self.expected[-1])))
        self.sizes.append(self.stats.batch_size)
        self.window.clear()

    def on_before_zero_grad(self, optimizer):
        if len(self.sizes) == 1:
            self.first = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize("clips", [True, False])
def test_lightning(tmp_path, clips):
    module = Language(clips)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=STEPS,
        gradient_clip_val=MAX_NORM if clips else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(sentences(20), batch_size=4))
    assert module.sizes == [8, 8, 4]
    assert trainer.optimizers[0].examples == 20
    assert max(module.errors) <= 1e-4
    for name, _ in module.model.named_parameters():
        s = first_second_moment(module.expected[0][name], OPTIONS["reference_batch_size"])
        assert oracle.error(module.first[name], s, 1.0) <= 1e-4
    assert all(torch.isfinite(p).all() for p in module.parameters())

"""The trainers' blocks of docs/integrations.md, as they are written there; test_trainer.py and others hold the same
loops against the oracle."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import gradstats
from gradstats.optim import BatchInvariantAdam
from tests.integrations.problem import language_model, loss_of, sentences

lightning = pytest.importorskip("lightning")

PAGE = (Path(__file__).parents[2] / "docs/integrations.md").read_text()
BLOCKS = re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_blocks_run(tmp_path, monkeypatch, title, block):
    """Each steps our optimizer over all 16 examples, whole epochs of them."""
    monkeypatch.chdir(tmp_path)
    stepped = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
    given = {
        "gradstats": gradstats,
        "torch": torch,
        "lightning": lightning,
        "BatchInvariantAdam": BatchInvariantAdam,
        "Trainer": Trainer,
        "arguments": TrainingArguments(
            output_dir=".", num_train_epochs=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
        ),
        "model": language_model(),
        "make_model": language_model,
        "data": sentences(16),
        "loader": DataLoader(sentences(16), batch_size=4),
        "loss_of": loss_of,
        "accelerator": Accelerator(cpu=True, gradient_accumulation_steps=2),
    }
    try:
        exec(block, given)
    finally:
        hook.remove()
    assert isinstance(stepped[-1], BatchInvariantAdam)
    assert stepped[-1].examples % 16 == 0 and stepped[-1].examples > 0


def test_no_block_is_left_out():
    assert len(BLOCKS) + 1 == PAGE.count("```python")  # the first is of a loop of one's own

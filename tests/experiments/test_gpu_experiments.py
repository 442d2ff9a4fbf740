"""The experiments that are made for a GPU, unchanged but for their sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import compose_config
from experiments.schemas.run import Config
from experiments.train import train
from tests.experiments.runs import COMPILES, numbers, parameters

SMALL = ["device=cpu", "tracker=none", "evaluation.count=2", "train.log_every_examples=128"]
SIZES = {
    "gpu_resnet_cifar": [
        *["model.width=8", "model.blocks=[1,1]", "model.groups=4", "optimizer.lr=0.01"],
        *["train.batch_size=32", "optimizer.batch_size=16", "evaluation.multiple=32"],
        *["train.epochs=4", "train.warmup_examples=64", "train.checkpoint_every_examples=256"],
    ],
    "gpu_gpt2": [
        *["data.words=256", "data.context=16", "data.evaluated=32"],
        *["model.width=16", "model.layers=1", "model.heads=2", "optimizer.lr=0.01"],
        *["train.epochs=2", "train.warmup_examples=64", "train.checkpoint_every_examples=256"],
    ],
}


@pytest.fixture(params=SIZES)
def miniature(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """On images whose class is in their brightness, and on a text that repeats itself."""
    y = np.arange(160) % 4
    x = np.random.default_rng(0).normal(60 * y[:, None, None, None], 20, (160, 8, 8, 3)).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x[:128], y_train=y[:128], x_test=x[128:], y_test=y[128:])
    np.frombuffer(b"to be or not to be, " * 250, np.uint8).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    path = tmp_path / {"gpu_resnet_cifar": "images.npz", "gpu_gpt2": "tokens.bin"}[request.param]
    sizes = [*SMALL, *SIZES[request.param], f"data.path={path}", "hardware.compile=false"]
    return compose_config([f"experiment={request.param}", *sizes])


def test_they_learn(miniature: Config, tmp_path: Path) -> None:
    assert miniature.hardware.bf16 and miniature.hardware.tf32
    result = train(miniature, tmp_path / "run")
    assert result.examples[-1] == 512
    assert result.train_loss[-1] < 0.8 * result.train_loss[0] and result.test_loss[-1] < 0.8 * result.test_loss[0]


def test_they_continue_bit_for_bit(miniature: Config, tmp_path: Path) -> None:
    def stop(examples: int, total: int, loss: float) -> None:
        if examples > 256:
            raise KeyboardInterrupt

    whole = train(miniature, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(miniature, tmp_path / "parts", stop)
    continued = train(replace(miniature, resume=True), tmp_path / "parts")
    assert numbers(continued) == numbers(whole)
    assert torch.equal(parameters(tmp_path / "parts"), parameters(tmp_path / "whole"))


def test_blocks_that_are_computed_twice_change_nothing(miniature: Config, tmp_path: Path) -> None:
    once = train(miniature, tmp_path / "once")
    twice = train(replace(miniature, model=replace(miniature.model, checkpoint=True)), tmp_path / "twice")
    assert twice.train_loss == pytest.approx(once.train_loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
@COMPILES
def test_compiled_they_match(miniature: Config, checkpoint: bool, tmp_path: Path) -> None:
    config = replace(miniature, model=replace(miniature.model, checkpoint=checkpoint))
    plain = train(config, tmp_path / "plain")
    compiled = train(replace(config, hardware=replace(config.hardware, compile=True)), tmp_path / "compiled")
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=5e-3)

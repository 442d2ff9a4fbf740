"""Data sets, one module a kind of source."""

from __future__ import annotations

import torch

from experiments.data.arrays import load_arrays
from experiments.data.dataset import Dataset, Split
from experiments.data.images import load_images
from experiments.data.loading import batches
from experiments.data.text import load_text
from experiments.data.token_file import load_tokens
from experiments.errors import UserError
from experiments.schemas.data import ArraysConfig, DataConfig, ImagesConfig, TextConfig, TokensConfig

__all__ = ["Dataset", "Split", "batches", "load_data"]


def load_data(config: DataConfig, device: torch.device) -> Dataset:
    """Raises UserError for data that is missing, damaged or not what the configuration says."""
    match config:
        case ArraysConfig():
            return load_arrays(config, device)
        case ImagesConfig():
            return load_images(config, device)
        case TextConfig():
            return load_text(config, device)
        case TokensConfig():
            return load_tokens(config, device)
        case _:
            raise UserError(f"data={config.name} has no schema_* of experiments/schemas/ in its defaults")

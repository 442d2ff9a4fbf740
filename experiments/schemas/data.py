"""Members of the group `data`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class DataConfig:
    name: str = MISSING


@dataclass
class ArraysConfig(DataConfig):
    path: str | None = MISSING
    test_fraction: float = MISSING
    split_seed: int = MISSING


@dataclass
class ImagesConfig(DataConfig):
    """`crop`: pixels of zeros around a training image, cut to its size again at random; `flip`: half are mirrored."""

    path: str | None = MISSING
    cache: str = MISSING
    crop: int = MISSING
    flip: bool = MISSING


@dataclass
class TextConfig(DataConfig):
    """Sequences of `context` characters; `limit` of them are taken, from the beginning, before the text is split.

    Losses are evaluated on `evaluated` sequences of each set.
    """

    context: int = MISSING
    evaluated: int = MISSING
    limit: int | None = MISSING
    test_fraction: float = MISSING
    sha256: str | None = MISSING


@dataclass
class FileTextConfig(TextConfig):
    path: str | None = MISSING
    url: str | None = MISSING
    cache: str = MISSING


@dataclass
class TokensConfig(DataConfig):
    """Sequences of `context` tokens, of which there are `words`; losses are evaluated on `evaluated` of each set."""

    path: str | None = MISSING
    words: int = MISSING
    context: int = MISSING
    evaluated: int = MISSING
    test_fraction: float = MISSING


DATA: dict[str, type[DataConfig]] = {
    "arrays": ArraysConfig,
    "images": ImagesConfig,
    "text": TextConfig,
    "file_text": FileTextConfig,
    "tokens": TokensConfig,
}

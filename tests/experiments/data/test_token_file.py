from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import load_data, token_file
from experiments.data.tokens import main, tokenize
from experiments.errors import UserError
from experiments.schemas.data import TokensConfig

CPU = torch.device("cpu")
TOKENS = (np.arange(1001) % 500).astype(np.uint16)


def config(path: Path | None, words: int = 500, context: int = 10) -> TokensConfig:
    return TokensConfig("tokens", None if path is None else str(path), words, context, 4, 0.2)


def saved(path: Path, tokens: np.ndarray = TOKENS) -> Path:
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    return path


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.npy"])
def test_the_training_set_is_a_view_of_the_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name)
    data = load_data(config(path), CPU)
    assert (len(data.train), len(data.evaluated), len(data.test), data.classes, data.shape) == (80, 4, 4, 500, (10,))
    assert data.discrete and data.train.mapped and data.train.x.dtype == torch.uint16
    assert data.train.x.data_ptr() + 2 == data.train.y.data_ptr()
    assert data.test.x[0].tolist() == TOKENS[800:810].tolist() and data.test.y[0].tolist() == TOKENS[801:811].tolist()
    assert data.evaluated.x[-1].tolist() == TOKENS[790:800].tolist() and data.evaluated.x.dtype == torch.int64


def test_all_of_the_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "CHUNK", 300)
    with pytest.raises(UserError, match=r"has the token 499, and data.words=499: there are more words"):
        load_data(config(saved(tmp_path / "tokens.bin"), words=499), CPU)
    late = np.append(TOKENS, np.uint16(500))
    with pytest.raises(UserError, match="has the token 500, and data.words=500"):
        load_data(config(saved(tmp_path / "late.bin", late)), CPU)


def test_what_is_no_file_of_tokens_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python -m experiments.data.tokens TEXT OUT.bin"):
        load_data(config(None), CPU)
    with pytest.raises(UserError, match="nowhere.bin is no file of tokens"):
        load_data(config(tmp_path / "nowhere.bin"), CPU)
    (tmp_path / "empty.bin").touch()
    with pytest.raises(UserError, match="empty.bin is no file of tokens"):
        load_data(config(tmp_path / "empty.bin"), CPU)
    with pytest.raises(UserError, match=r"four.bin has a zero after every token: it seems to have four bytes each"):
        load_data(config(saved(tmp_path / "four.bin", TOKENS.astype(np.uint32))), CPU)
    with pytest.raises(UserError, match=r"real.npy holds float64 \(1001,\); expected uint16"):
        load_data(config(saved(tmp_path / "real.npy", TOKENS.astype(float))), CPU)
    with pytest.raises(UserError, match=r"flat.npy holds uint16 \(7, 143\); expected uint16"):
        load_data(config(saved(tmp_path / "flat.npy", TOKENS.reshape(7, 143))), CPU)
    with pytest.raises(UserError, match="1001 tokens are too few for data.context=201"):
        load_data(config(saved(tmp_path / "tokens.bin"), context=201), CPU)


def test_bytes_and_characters() -> None:
    tokens, words = tokenize("é!".encode(), characters=False)
    assert tokens.tolist() == [0xC3, 0xA9, 0x21] and words == 256 and tokens.dtype == np.uint16
    tokens, words = tokenize("b€ab".encode(), characters=True)
    assert tokens.tolist() == [1, 2, 0, 1] and words == 3 and tokens.dtype == np.uint16
    with pytest.raises(UserError, match="not UTF-8"):
        tokenize(b"\xff", characters=True)
    with pytest.raises(UserError, match="65537 characters do not fit"):
        tokenize("".join(chr(0x10000 + i) for i in range(2**16 + 1)).encode(), characters=True)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments.data.tokens", *map(str, arguments)])
    main()


def test_the_command_makes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "out.bin"
    text.write_text("a text, " * 100)
    command(monkeypatch, text, out, "--characters")
    assert capsys.readouterr().out == f"800 tokens: data=tokens data.path={out} data.words=6\n"
    data = load_data(config(out, words=6), CPU)
    assert data.train.x[0].tolist() == [" ,aetx".index(character) for character in "a text, a "]
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, tmp_path / "nowhere", out)
    assert end.value.code == 2 and f"{tmp_path / 'nowhere'}: No such file" in capsys.readouterr().err

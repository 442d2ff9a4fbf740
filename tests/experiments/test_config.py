"""Every file of conf/ composes, and what it describes can be built."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import fingerprint as module
from experiments import laboratory
from experiments.config import CONF, check_ranges, compose_config
from experiments.data import load_data
from experiments.errors import UserError
from experiments.fingerprint import as_dict, fingerprint, first_difference, identity
from experiments.models import build_model
from experiments.optimizers import attach_statistics, build_optimizer
from experiments.schemas.run import Device
from experiments.tracker import TRACKERS

FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))


# What a file needs to be built.
IMAGES = ["data.path=images.npz", "model=convnet"]
TOKENS = ["data.path=tokens.bin", "data.context=8"]
MORE = {
    "data/cifar10": IMAGES,
    "data/fashion_mnist": IMAGES,
    "data/mnist": IMAGES,
    "data/npz": ["data.path=own.npz"],
    "data/text": ["data.path=own.txt", "model=gpt"],
    "data/tokens": [*TOKENS, "model=gpt"],
    "data/topics": ["model=gpt"],
    "experiment/gpu_gpt2": [*TOKENS, "data.words=2000", "model.layers=1", "model.width=48"],
    "experiment/gpu_resnet_cifar": ["data.path=images.npz"],
    "model/gpt": ["data=topics"],
}


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", x=np.eye(20), y=np.arange(20) % 2)
    Path("own.txt").write_text("a text" * 100)
    np.arange(2000, dtype=np.uint16).tofile("tokens.bin")
    x, y = np.random.default_rng(0).normal(size=(20, 8, 8, 3)), np.arange(20) % 10
    np.savez("images.npz", x_train=x, y_train=y, x_test=x, y_test=y)


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_can_be_built(file: Path) -> None:
    config = compose_config([f"{file.parent}={file.name}", *MORE.get(file.as_posix(), [])])
    check_ranges(config)
    data = load_data(config.data, torch.device("cpu"))
    model = build_model(config.model, data.shape, data.classes, data.discrete)
    optimizer = build_optimizer(model.parameters(), config.optimizer, config.train.batch_size, config.train.max_norm)
    attach_statistics(model, optimizer, config.optimizer, engine=config.engine)
    assert config.tracker.name in TRACKERS
    if config.study is not None:
        laboratory.load(config.study)


def test_the_defaults_are_a_run_of_the_digits() -> None:
    config = compose_config([])
    assert (config.data.name, config.model.name, config.optimizer.name) == ("digits", "mlp", "batch_invariant_adam")
    assert config.device is Device.auto and config.directory.startswith("outputs/run/20")
    assert compose_config(["name=mine"]).directory.startswith("outputs/mine/")


def test_methods_of_one_family_share_their_tuned_values() -> None:
    first, *others = (
        compose_config([f"optimizer={name}"]).optimizer
        for name in ("adam", "adam_linear", "adam_square_root", "adam_half_life", "batch_invariant_adam")
    )
    for other in others:
        same = dataclasses.replace(first, name=other.name, label=other.label)
        assert dataclasses.asdict(same).items() <= dataclasses.asdict(other).items()


def test_fingerprint_is_of_what_decides_the_numbers() -> None:
    base = compose_config([])
    assert fingerprint(base) == fingerprint(compose_config([]))
    same = ["name=other", "directory=elsewhere", "resume=true", "tracker=none"]
    assert all(fingerprint(compose_config([change])) == fingerprint(base) for change in same)
    others = ["seed=1", "optimizer=adam", "train.batch_size=64", "hardware.threads=2", "data.split_seed=1"]
    assert len({fingerprint(compose_config([change])) for change in [*others, "seed=0"]}) == len(others) + 1


def test_fingerprint_is_of_what_the_files_of_the_data_hold(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    config = compose_config(["data=npz", f"data.path={file}"])
    found = []
    for words in (b"one", b"two", b"one"):
        file.write_bytes(words)
        os.utime(file, ns=(len(found), len(found)))
        found.append(identity(config))
    assert found[0] == found[2] != found[1]
    assert str(first_difference(found[0], found[1])).startswith("data.content was ")
    folder = compose_config(["data=mnist", f"data.path={tmp_path}"])
    before = fingerprint(folder)
    (tmp_path / "more").write_bytes(b"three")
    assert fingerprint(folder) != before
    assert "content" not in identity(compose_config(["data=npz", "data.path=nowhere.npz"]))["data"]


def test_first_difference_is_in_dotted_form() -> None:
    old, new = identity(compose_config([])), identity(compose_config(["train.batch_size=4", "model.widths=[32]"]))
    assert first_difference(old, new) == "model.widths was [64] and is now [32]"
    assert first_difference(old, old) is None
    assert first_difference(old, identity(compose_config(["optimizer=sgd_linear"]))) is not None
    del old["model"]["widths"]
    assert first_difference(old, new) == "model.widths was absent and is now [32]"


def test_as_dict_is_plain() -> None:
    plain = as_dict(compose_config([]))
    assert plain["device"] == "auto" and type(plain["device"]) is str
    assert plain["optimizer"]["betas"] == [0.99, 0.999]


@pytest.mark.parametrize("override", ["train.epochs=-1", "train.max_norm=0", "optimizer.lr=0", "evaluation.multiple=0"])
def test_numbers_out_of_range_are_named(override: str) -> None:
    key, value = override.split("=")
    with pytest.raises(UserError, match=f"{key}={value}.* must be positive"):
        check_ranges(compose_config([override]))
    with pytest.raises(UserError, match="seed=-1"):
        check_ranges(dataclasses.replace(compose_config([]), seed=-1))


def test_another_python_has_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config(["data=topics", "model=gpt"])
    before = fingerprint(config)
    monkeypatch.setattr(module, "help_texts", lambda: b"other texts")
    assert fingerprint(config) != before

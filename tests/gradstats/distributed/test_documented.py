"""docs/distributed.md: its blocks run, in order and in one namespace, as a reader would type them."""

import contextlib
import re
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from gradstats.distributed.local import whole

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"


def numbers(model):
    return torch.cat([whole(p).detach().flatten() for p in model.parameters()])


def as_documented(folder):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    with contextlib.chdir(folder), mock.patch.object(dist, "init_process_group"):
        for block in blocks[:-1]:
            exec(block, names)
        saved = numbers(names["model"])
        exec(blocks[-1], names)
    assert torch.equal(numbers(names["model"]), saved)
    return len(blocks), names["optimizer"].examples


def test_the_page(two, tmp_path):
    assert two(as_documented, str(tmp_path)) == [(6, 64)] * 2

"""docs/sharded.md: its blocks run."""

import re
from pathlib import Path

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import gradstats
from gradstats.optim import BatchInvariantAdam
from tests.gradstats.distributed.sharding import batches, gpt, line, loss_of, mine

PAGE = Path(__file__).parents[3] / "docs" / "sharded.md"


def as_documented(folder):
    train, load = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {
        **{
            "torch": torch,
            "gradstats": gradstats,
            "fully_shard": fully_shard,
            "BatchInvariantAdam": BatchInvariantAdam,
        },
        **{"get_state_dict": get_state_dict, "set_state_dict": set_state_dict, "loss_of": loss_of, "path": folder},
        **{"mesh": line(), "model": gpt().double(), "batches": [(mine(x), mine(y)) for x, y in batches("gpt", 2)]},
    }
    exec(train, names)
    state = dict(zip(("model", "optimizer"), get_state_dict(names["model"], names["optimizer"]), strict=True))
    torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    names["model"] = gpt().double()
    first, rest = train.split("for x, y in batches")
    exec(first, names)
    exec(load, names)
    exec(f"for x, y in batches{rest}", names)
    return names["optimizer"].examples


def test_the_page(two, tmp_path):
    assert two(as_documented, str(tmp_path)) == [32, 32]

"""A torch that was built without torch.distributed."""

import subprocess
import sys

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch._C":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def stripped(module):
            execute(module)
            for part in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
                vars(module).pop(part, None)

        spec.loader.exec_module = stripped
        return spec

sys.meta_path.insert(0, Without)
import torch
assert not torch.distributed.is_available()
"""
USED = """
import gradstats
from gradstats.optim import BatchInvariantAdam
model, x, y = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
loss = torch.nn.functional.cross_entropy
gradstats.verify(model, loss, x, y)
stats = gradstats.attach(model, "second_moment", "norms")
optimizer = BatchInvariantAdam(model.parameters(), reference_batch_size=1)
loss(model(x), y).backward()
stats.clip_grad_norm_(0.1)
assert stats.batch_size == 4 and stats.second_moment["weight"].shape == (2, 3)
before = model.weight.detach().clone()
optimizer.step()
assert not torch.equal(before, model.weight)
"""


def test_one_process_needs_no_distributed_torch():
    subprocess.run([sys.executable, "-c", WITHOUT + USED], check=True, timeout=120)

"""torch.distributed.checkpoint of a sharded model and its optimizer: what is loaded goes on as what was saved, on any
number of ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from gradstats.distributed.local import whole
from gradstats.errors import GradstatsError
from tests.gradstats.distributed.sharding import MODELS, B, batches, loss_of, made, mine
from tests.optimizers import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is meant, in one process

STEPS = 2
# Those of batches of examples; every one is tuned at twice as many as B, and keeps all that it ever does.
NAMES = [row.name for row in ROWS if row.unit == 1]

# Of elements alone, with a buffer that begins late, and of all elements together.
SOME = ["adamw", "adam R=64", "saturating sgd", "adascale"]


def model_of(sharded, replicated=False):
    if sharded and not replicated:
        return made("mlp")[0]
    torch.manual_seed(1)
    model = MODELS["mlp"][0]().double()
    return DistributedDataParallel(model) if replicated else model


def prepared(name, model):
    row = next(row for row in ROWS if row.name == name)
    row.attach(model)
    return row(model.parameters())


def train(model, optimizer, begin, share=mine):
    for x, y in list(batches("mlp", begin + STEPS))[begin:]:
        loss_of(model(share(x)), share(y)).backward()
        optimizer.step()
        optimizer.zero_grad()


def load(model, optimizer, path):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def numbers(model):
    return torch.cat([whole(p).detach().flatten() for p in model.parameters()])


def saved(name, path, replicated=False):
    """Parameters after 2 STEPS, in the middle of which they are saved."""
    model = model_of(dist.is_initialized(), replicated)
    optimizer = prepared(name, model)
    train(model, optimizer, 0)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=path)
    train(model, optimizer, STEPS)
    return numbers(model)


def continued(name, path, replicated=False):
    """The same of another model, from where it was saved on."""
    model = model_of(dist.is_initialized(), replicated)
    optimizer = prepared(name, model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    optimizer.allocate(batch_size=B)
    load(model, optimizer, path)
    train(model, optimizer, STEPS)
    return numbers(model)


def in_one_process(name):
    model = model_of(sharded=False)
    optimizer = prepared(name, model)
    train(model, optimizer, 0, share=lambda t: t)
    train(model, optimizer, STEPS, share=lambda t: t)
    return numbers(model)


def compared(names, path):
    """By optimizer, how far one process is from the ranks, and what was loaded from what went on."""
    found = {}
    for name in names:
        folder = f"{path}/{name.replace(' ', '-')}"
        whole_run = saved(name, folder)
        distances = [
            (whole_run - other(name, *of)).abs().max() for other, of in ((in_one_process, ()), (continued, (folder,)))
        ]
        found[name] = tuple(map(float, distances))
    return found


@pytest.mark.parametrize("names", [SOME, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_optimizers_are_those_of_one_process_and_go_on_bitwise(two, tmp_path, names):
    for found in two(compared, names, str(tmp_path)):
        assert found.keys() == set(names)
        assert max(apart for apart, _ in found.values()) <= 1e-9, found
        assert max(after for _, after in found.values()) == 0, found


def test_saved_by_two_ranks_loaded_by_one(two, tmp_path):
    whole_run = two(saved, "adamw", str(tmp_path))[0]
    assert (continued("adamw", str(tmp_path)) - whole_run).abs().max() <= 1e-9


def test_saved_by_one_rank_loaded_by_two(two, tmp_path):
    whole_run = saved("adamw", str(tmp_path))
    for found in two(continued, "adamw", str(tmp_path)):
        assert (found - whole_run).abs().max() <= 1e-9


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_replicas_and_shards_load_each_other(two, tmp_path, before, after):
    whole_run = two(saved, "adamw", str(tmp_path), before)[0]
    for found in two(continued, "adamw", str(tmp_path), after):
        assert (found - whole_run).abs().max() <= 1e-9


@pytest.mark.slow
def test_saved_and_loaded_by_any_number(two, four, tmp_path):
    worlds = {1: lambda function, *of: [function(*of)], 2: two, 4: four}
    for size, world in worlds.items():
        whole_run = world(saved, "adamw", str(tmp_path / str(size)))[0]
        for other in worlds.values():
            for found in other(continued, "adamw", str(tmp_path / str(size))):
                assert (found - whole_run).abs().max() <= 1e-9


def left_out(path):
    """What the optimizer does not hold is not loaded."""
    saved("adamw", path)
    model = model_of(sharded=True)
    with pytest.raises(GradstatsError, match="exp_avg_q.*allocate"):
        load(model, prepared("adamw", model), path)


def test_a_part_of_a_state_is_refused(two, tmp_path):
    two(left_out, str(tmp_path))

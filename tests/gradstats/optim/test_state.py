"""What is kept of an optimizer, for every row of the table: checkpoints, copies, memory, and steps that must not be."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradstats import attached
from tests.gradstats.optim.problem import problem, train, vector
from tests.gradstats.optim.test_contract import SIZES, attached_problem, every, every_class
from tests.optimizers import TUNED


def trained(row, dtype=torch.float64):
    model, x, y = attached_problem(row, dtype)
    optimizer = row(model.parameters())
    train(model, optimizer, x, y, SIZES)
    return model, optimizer, x, y


def fresh(row, model):
    """The same model, not attached before, with an optimizer that has seen nothing."""
    other, _, _ = problem(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    row.attach(other)
    return other, row(other.parameters())


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(a, b):
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["param_groups"] == b["param_groups"]


@every
@pytest.mark.parametrize("through", [copy.deepcopy, through_file], ids=["memory", "file"])
def test_state_dict_continues_bitwise(row, through):
    model, optimizer, x, y = trained(row)
    other, restored = fresh(row, model)
    state = through(optimizer.state_dict())
    restored.load_state_dict(state)
    assert restored.examples == optimizer.examples == row.count(SIZES)
    assert torch.equal(train(model, optimizer, x, y, SIZES), train(other, restored, x, y, SIZES))


@every_class
def test_loaded_state_is_a_copy(row):
    model, optimizer, x, y = trained(row)
    other, restored = fresh(row, model)
    restored.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    train(other, restored, x, y, SIZES)
    assert_same_state(optimizer.state_dict(), before)


@every_class
def test_options_come_with_the_state(row):
    """As in torch, a checkpoint's options replace those of the constructor."""
    model, optimizer, _, _ = trained(row)
    optimizer.param_groups[0]["lr"] = 0.5
    restored = row(model.parameters())
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["lr"] == 0.5


@every_class
def test_load_state_dict_pre_hook_by_name(row):
    """torch's recipe for parameters that come in another order than in the checkpoint."""

    def by_name(optimizer, state):
        saved, now = state["param_groups"][0], optimizer.param_groups[0]
        ids = dict(zip(saved["param_names"], saved["params"], strict=True))
        group = saved | {"params": [ids[name] for name in now["param_names"]], "param_names": now["param_names"]}
        return state | {"param_groups": [group]}

    model, x, y = attached_problem(row)
    optimizer = row(model.named_parameters())
    train(model, optimizer, x, y, SIZES)
    reordered = row(list(model.named_parameters())[::-1])
    reordered.register_load_state_dict_pre_hook(by_name)
    reordered.load_state_dict(optimizer.state_dict())
    for p, state in optimizer.state.items():
        torch.testing.assert_close(dict(reordered.state[p]), dict(state), rtol=0, atol=0)


@every
def test_low_precision_parameters_keep_float32_state(row):
    """torch would cast it to bfloat16."""
    model, optimizer, x, y = trained(row, torch.bfloat16)
    other, restored = fresh(row, model)
    restored.load_state_dict(through_file(optimizer.state_dict()))
    for p, same in zip(model.parameters(), other.parameters(), strict=True):
        assert set(restored.state[same]) == set(optimizer.state[p])
        for name, value in restored.state[same].items():
            assert value.dtype == torch.float32 or value.shape != p.shape
            assert value.dtype == optimizer.state[p][name].dtype and torch.equal(value, optimizer.state[p][name])
    assert torch.equal(train(model, optimizer, x, y, SIZES), train(other, restored, x, y, SIZES))


@every
def test_float32_state_loads_into_a_model_in_bfloat16(row):
    """As it is: that of a run in float32, which goes on in bfloat16."""
    model, optimizer, x, y = trained(row, torch.float32)
    other, restored = fresh(row, model.bfloat16())
    restored.load_state_dict(through_file(optimizer.state_dict()))
    loaded, saved = restored.state_dict()["state"], optimizer.state_dict()["state"]
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    train(other, restored, x.bfloat16(), y, SIZES)
    for p, state in restored.state.items():
        assert all(value.dtype == torch.float32 for value in state.values() if value.shape == p.shape)
    assert restored.examples == row.count(2 * SIZES)


@every
def test_state_is_as_large_as_said(row):
    """Adam's two buffers for R <= B, where the table says no more, and some counts."""
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    train(model, optimizer, x, y, [TUNED, TUNED])
    for p, state in optimizer.state.items():
        sizes = [t.numel() * t.element_size() for t in state.values() if t.shape == p.shape]
        assert sum(sizes) <= row.buffers * p.numel() * p.element_size()
        assert all(t.numel() == 1 for t in state.values() if t.shape != p.shape)


# Copies


@every_class
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_copy_of_model_and_optimizer(row, copied):
    """The copied optimizer finds the copied statistics."""
    model, optimizer, x, y = trained(row)
    other, same = copied((model, optimizer))
    assert attached(other) is not attached(model)
    assert torch.equal(train(model, optimizer, x, y, SIZES), train(other, same, x, y, SIZES))
    assert optimizer.examples == same.examples == row.count(2 * SIZES)


@every_class
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copy_of_the_optimizer_alone(row, copied):
    """Its parameters are copies, and statistics are found again once their model is attached."""
    model, optimizer, x, y = trained(row)
    same = copied(optimizer)
    other, _, _ = problem()
    parameters = iter(same.param_groups[0]["params"])
    for name, _ in list(other.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(other.get_submodule(owner), attribute, next(parameters))
    row.attach(other)
    assert torch.equal(train(model, optimizer, x, y, SIZES), train(other, same, x, y, SIZES))


# Steps that leave things as they are


@every
def test_step_before_any_backward_only_allocates(row):
    """What torch.distributed.checkpoint does to learn the state's layout."""
    model, x, y = attached_problem(row)
    optimizer = row(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"], lr = 0.0, optimizer.param_groups[0]["lr"]
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    assert torch.equal(vector(model), vector(problem()[0]))
    assert optimizer.examples == 0 and all(state["step"] == 0 for state in optimizer.state.values())
    layout = {name for state in optimizer.state.values() for name in state}
    other, again = fresh(row, model)
    assert torch.equal(train(model, optimizer, x, y, [TUNED] * 3), train(other, again, x, y, [TUNED] * 3))
    if row.buffers == 2:
        assert layout == {name for state in again.state.values() for name in state}


@every_class
def test_distributed_checkpoint(row):
    model, optimizer, x, y = trained(row)
    state = get_optimizer_state_dict(model, optimizer)
    assert "0.weight" in state["state"]
    other, restored = fresh(row, model)
    set_optimizer_state_dict(other, restored, state)
    assert restored.examples == row.count(SIZES)
    assert torch.equal(train(model, optimizer, x, y, SIZES), train(other, restored, x, y, SIZES))


def scaled_training(row, overflow, named):
    """Four batches under GradScaler, the loss of one of which overflows if asked to."""
    model, x, y = problem(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    row.attach(model, **{"grad_scaler": scaler} if named else {})
    optimizer = row(model.parameters())
    start = 0
    for i, b in enumerate(SIZES):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[start : start + b]), y[start : start + b])
        if i == 2 and overflow:
            before = vector(model), copy.deepcopy(optimizer.state_dict())
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 2 and overflow:
            assert torch.equal(vector(model), before[0])
            assert_same_state(optimizer.state_dict(), before[1])
            assert attached(model).batch_size == b  # of the window, until the gradients are zeroed
        else:
            start += b
    return vector(model)


@every
@pytest.mark.parametrize("named", [False, True], ids=["", "named to attach"])
def test_grad_scaler(row, named):
    """The scaled loss's step is the loss's, and a step skipped for an overflow leaves no trace."""
    model, x, y = attached_problem(row, torch.float32)
    plain = train(model, row(model.parameters()), x, y, SIZES)
    torch.testing.assert_close(scaled_training(row, False, named), plain, rtol=1e-5, atol=1e-6)
    skipped = [b for i, b in enumerate(SIZES) if i != 2]
    model, x, y = attached_problem(row, torch.float32)
    plain = train(model, row(model.parameters()), x, y, skipped)
    torch.testing.assert_close(scaled_training(row, True, named), plain, rtol=1e-5, atol=1e-6)

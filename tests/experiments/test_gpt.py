import pytest
import torch

from experiments.gpt import GPT


@pytest.fixture
def model() -> GPT:
    return GPT(words=11, width=8, layers=2, heads=2, positions=6)


def test_tokens_become_logits_at_every_position(model: GPT):
    assert model(torch.randint(0, 11, (3, 6))).shape == (3, 6, 11)
    assert model(torch.randint(0, 11, (3, 4))).shape == (3, 4, 11)


def test_a_later_token_changes_no_earlier_logits(model: GPT):
    tokens = torch.randint(0, 11, (2, 6))
    other = tokens.clone()
    other[0, 3] = (tokens[0, 3] + 1) % 11
    before, after = model(tokens), model(other)
    torch.testing.assert_close(after[0, :3], before[0, :3])
    assert not torch.isclose(after[0, 3:], before[0, 3:]).all(dim=-1).any()
    torch.testing.assert_close(after[1], before[1])  # nor anything of another example


def test_the_same_token_at_another_position_has_other_logits(model: GPT):
    logits = model(torch.zeros(1, 2, dtype=torch.long))
    assert not torch.allclose(logits[0, 0], logits[0, 1])

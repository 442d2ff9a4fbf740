"""Random projections: the same everywhere, of independent signs, and inner products kept."""

import pytest
import torch

from gradstats.errors import GradstatsError
from gradstats.projection import Projection, salt_of, signs
from gradstats.sums import Block
from gradstats.window import Window

SALT = -1817204188280230865


def splitmix64(counter, salt):
    """In Python's integers."""
    z = (counter * 0x9E3779B97F4A7C15 + salt) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_a_projection_is_the_same_everywhere():
    """In every process, on every device, in whatever blocks."""
    salt = salt_of(0, "fc1.weight")
    assert salt == SALT
    elements = [0, 1, 10**9]
    words = [[splitmix64(2 * e + word, salt) for word in (0, 1)] for e in elements]
    expected = [[2 * (word >> bit & 1) - 1 for word in of_element for bit in range(64)][:100] for of_element in words]
    assert signs(salt, torch.tensor(elements), 100).tolist() == expected
    c = torch.randn(3, 5000, dtype=torch.float64)
    whole = Projection(2**10).partial(Block(c, torch.arange(5000), "w"))
    halves = [Projection(2**10).partial(Block(c[:, s], torch.arange(5000)[s], "w")) for s in (slice(7), slice(7, None))]
    torch.testing.assert_close(whole, halves[0] + halves[1])


def test_a_projection_keeps_inner_products():
    """Without bias, with the scatter of 1/sqrt(dimensions)."""
    g = torch.randn(8, 300, dtype=torch.float64)
    c = g / 8
    errors = []
    for seed in range(50):
        raw = Projection(64, seed)
        r = raw.read(Window({raw.key: raw.partial(Block(c, torch.arange(300), "w"))}, None, 8, "mean"))
        errors.append((r @ r.T - g @ g.T) / g.norm(dim=1).outer(g.norm(dim=1)))
    errors = torch.stack(errors)
    assert errors.mean(0).abs().max() < 5 / (64 * 50) ** 0.5 * 2**0.5
    off = errors[:, ~torch.eye(8, dtype=torch.bool)]
    assert abs(off.square().mean() * 64 - 1) < 0.15


def test_signs_are_independent():
    """Between elements, dimensions, parameters and seeds: correlations of the size that chance gives."""
    elements = torch.arange(512)
    some = [signs(salt_of(seed, name), elements, 192) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
    assert {float(s.abs().max()) for s in some} == {1.0}
    for s in some:
        assert s.mean().abs() < 5 / (512 * 192) ** 0.5
        for matrix in (s.T @ s / 512, s @ s.T / 192):
            off = matrix - torch.eye(len(matrix))
            n = 512 if len(matrix) == 192 else 192
            assert off.abs().max() < 6 / n**0.5 and abs(float(off.square().mean()) * n - 1) < 0.1
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (some[a] * some[b]).mean().abs() < 5 / (512 * 192) ** 0.5


def test_a_projection_without_a_name_is_refused():
    with pytest.raises(GradstatsError, match="name of the parameter"):
        Projection().partial(Block(torch.ones(1, 1), torch.arange(1), ""))

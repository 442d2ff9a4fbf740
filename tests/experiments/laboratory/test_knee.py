from __future__ import annotations

import numpy as np
import pytest

from experiments.laboratory.knee import Law, fitted, steps_law, surge_law

SIZES = [4, 16, 64, 256, 1024]


@pytest.mark.parametrize("law", [steps_law, surge_law])
@pytest.mark.parametrize("size", [7.3, 64.0, 300.0])
def test_a_knee_is_found_again(law: Law, size: float):
    B = np.array(SIZES, dtype=float)
    found = fitted(law, SIZES, 1.5 + law(B / size))
    assert found.size == pytest.approx(size, rel=1e-3)
    assert found.level == pytest.approx(1.5, abs=1e-3) and found.misfit < 1e-3
    np.testing.assert_allclose(np.log(found.at(law, B)), 1.5 + law(B / size), atol=1e-3)


def test_the_laws_in_closed_form():
    assert steps_law(np.array([1.0]))[0] == pytest.approx(np.log(2))  # at B_crit twice the least steps
    assert surge_law(np.array([1.0]))[0] == 0
    np.testing.assert_allclose(np.exp(surge_law(np.array([0.25, 4.0]))), 1 / 1.25)


def test_what_does_not_bend_has_no_knee():
    B = np.array(SIZES, dtype=float)
    assert np.isnan(fitted(steps_law, SIZES, -np.log(B)).size)
    assert np.isnan(fitted(surge_law, SIZES, 0.5 * np.log(B)).size)
    assert np.isnan(fitted(steps_law, SIZES, np.array([1, 2, np.inf, 3, 4])).size)


def test_the_misfit_is_the_largest():
    B = np.array(SIZES, dtype=float)
    logs = surge_law(B / 64) + np.array([0, 0, 0.5, 0, 0])
    assert fitted(surge_law, SIZES, logs).misfit == pytest.approx(0.4, rel=1e-2)

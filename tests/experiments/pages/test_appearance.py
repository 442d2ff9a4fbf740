from __future__ import annotations

from pathlib import Path

from experiments.pages.appearance import DASHES, MOST, appearances, distinct
from tests.experiments.pages.synthetic import collected, write_run, write_sweep


def test_a_number_is_a_scale_of_colours_and_what_else_differs_is_the_dash(tmp_path: Path) -> None:
    found = collected(write_sweep(tmp_path, rates=[0.01], seeds=[0]))
    looks = appearances(found.groups, found.telling)
    assert [look.dash for look in looks] == [DASHES[0]] * 3 + [DASHES[1]] * 3
    assert [look.light for look in looks[:3]] == [look.light for look in looks[3:]]  # the batch sizes of both methods
    assert len({look.light for look in looks}) == len({look.dark for look in looks}) == 3


def test_what_is_no_number_and_what_has_more_dimensions_only_differs(tmp_path: Path) -> None:
    for i, method in enumerate(("adam", "sgd", "batch_invariant_adam")):
        write_run(tmp_path / "methods" / str(i), method=method)
    for found in (collected(tmp_path / "methods"), collected(write_sweep(tmp_path / "grid", seeds=[0]))):
        assert appearances(found.groups, found.telling) == distinct(len(found.groups))


def test_all_that_are_drawn_can_be_told_apart() -> None:
    looks = distinct(MOST)
    assert len({(look.light, look.dash) for look in looks}) == len({(look.dark, look.dash) for look in looks}) == MOST

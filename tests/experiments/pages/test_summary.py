from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.pages.summary import differences, final_values, findings, ranked
from tests.experiments.pages.synthetic import collected, write_run, write_sweep


def test_final_values_and_the_best_of_them(tmp_path: Path) -> None:
    found = collected(write_sweep(tmp_path))
    best = ranked(found)[0]
    assert best.label == "ours · B = 4 · lr = 0.01"
    table = final_values(found, found.groups)
    assert table.emphasised == (found.groups.index(best),)
    row = table.rows[table.emphasised[0]]
    assert row[:2] == [best.label, "3 finished"] and row[2] == best.final("loss/train") and row[-1] == "2.0"
    assert final_values(found, found.groups[:3]).emphasised == ()


def test_differences_are_all_keys_that_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a", optimizer__eps=1e-8)
    write_run(tmp_path / "b", method="sgd")
    table = differences(collected(tmp_path))
    assert table.columns == ["group", "optimizer.label", "optimizer.name", "optimizer.eps"]
    assert table.rows == [["Adam, <fixed>", "Adam, <fixed>", "adam", "1e-08"], ["SGD", "SGD", "sgd", "–"]]


def test_whether_the_best_is_the_best(tmp_path: Path) -> None:
    """Runs of one seed are compared with each other: what the seeds have in common does not count."""
    ours = write_sweep(tmp_path, methods=["batch_invariant_adam"], batch_sizes=[16], seeds=range(5))
    collection = collected(ours)
    (found,) = findings(collection)
    assert found.verdict == "holds" and "Over the 5 seeds that both have" in found.sentence
    # Intervals of the groups themselves overlap.
    first, second = ranked(collection)[:2]
    assert first.final("loss/train").high > second.final("loss/train").low


def test_what_seeds_or_rounding_explain_cannot_be_judged(tmp_path: Path) -> None:
    def verdict(name: str, **grid: Any) -> str | None:
        (found,) = findings(collected(write_sweep(tmp_path / name, **grid)))
        return found.verdict

    assert verdict("four seeds", batch_sizes=[16], seeds=range(4)) == "cannot be judged"
    # Ours does not depend on the batch size.
    assert verdict("equal", methods=["batch_invariant_adam"], rates=[0.01], seeds=range(5)) == "cannot be judged"
    close = {"methods": ["batch_invariant_adam"], "batch_sizes": [16], "seeds": range(5)}
    assert verdict("rounding", rates=[0.01, 0.01 * (1 + 1e-5)], **close) == "cannot be judged"
    assert verdict("apart", rates=[0.01, 0.01 * (1 + 1e-2)], **close) == "holds"


def test_losses_of_other_data_are_not_compared(tmp_path: Path) -> None:
    for i in range(5):
        write_run(tmp_path / f"a{i}", seed=i, data__split_seed=0)
        write_run(tmp_path / f"b{i}", seed=i, data__split_seed=1, lr=0.02)
    collection = collected(tmp_path)
    (found,) = findings(collection)
    assert found.verdict is None and "differ in data.split_seed, and their losses are not compared" in found.sentence
    assert final_values(collection, collection.groups).emphasised == ()


def test_one_group_has_nothing_to_be_lower_than(tmp_path: Path) -> None:
    assert findings(collected(write_run(tmp_path))) == []


def test_runs_that_are_not_whole_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status="diverged")
    write_run(tmp_path / "b", status="unfinished", seed=1)
    collection = collected(tmp_path)
    assert [found.sentence.partition(":")[0] for found in findings(collection)] == [
        "1 of 2 runs diverged",
        "1 of 2 runs have not ended",
    ]
    explanation = final_values(collection, collection.groups).explanation
    assert "diverged counts with the values of its initial model" in explanation

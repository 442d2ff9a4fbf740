import io

import pytest
from rich.console import Console

from experiments.documents import Table
from experiments.estimate import Estimate
from experiments.invariance.analysis import analyse
from experiments.invariance.tables import tables
from tests.experiments.synthetic import COMPARISON, study


@pytest.fixture(scope="module")
def made() -> list[Table]:
    return tables(analyse(study(), COMPARISON))


def test_every_table_has_every_optimizer_with_ours_first_and_emphasised(made: list[Table]):
    for table in made:
        assert [row[0] for row in table.rows] == ["Ours", "Ours r1", "Adam", "Square root", "Sgd"]
        assert table.emphasised == (0, 1)
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_summary_reads_the_measures(made: list[Table]):
    point = analyse(study(), COMPARISON).point
    adam = made[0].rows[2]
    values = [cell.value for cell in adam if isinstance(cell, Estimate)]
    assert values == [
        point.score[2],
        point.final_loss[2],
        point.test_accuracy[2],
        point.mean_regret[2],
        point.worst_loss[2],
    ]
    assert adam[1] == "0.001"


def test_the_terminal_table_fits_80_columns():
    records = study()
    for result in records:
        result.label = result.label.ljust(17, ".")  # as long as the longest of conf/optimizer
    table = tables(analyse(records, COMPARISON))[0]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.rich())
    text = console.export_text()
    assert all(word in text for column in table.columns for word in column.split())
    assert all((cell if isinstance(cell, str) else cell.text()) in text for row in table.rows for cell in row)

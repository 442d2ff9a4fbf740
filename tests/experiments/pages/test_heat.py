from __future__ import annotations

import re
from pathlib import Path

from experiments.pages.heat import drawn, heat_maps
from tests.experiments.pages.markup import Markup
from tests.experiments.pages.synthetic import collected, write_run, write_sweep


def test_one_map_for_each_method_where_two_numbers_span_a_grid(tmp_path: Path) -> None:
    found = heat_maps(collected(write_sweep(tmp_path)))
    assert [(heat_map.panel, heat_map.down, heat_map.across) for heat_map in found] == [
        ("Adam, <fixed>", "optimizer.lr", "train.batch_size"),
        ("ours", "optimizer.lr", "train.batch_size"),
    ]
    lr = [[group.settings["optimizer.lr"] for group in row] for row in found[0].cells]
    sizes = [[group.settings["train.batch_size"] for group in row] for row in found[0].cells]
    assert lr == [[0.005] * 3, [0.01] * 3, [0.02] * 3] and sizes == [[4, 16, 64]] * 3


def test_no_map_without_a_whole_grid_of_two_numbers(tmp_path: Path) -> None:
    assert heat_maps(collected(write_sweep(tmp_path / "line", methods=["adam"], rates=[0.01]))) == []
    sweep = write_sweep(tmp_path / "grid", methods=["adam"], seeds=[0])
    assert len(heat_maps(collected(sweep))) == 1
    write_run(sweep / "more", lr=0.04, batch_size=4)
    assert heat_maps(collected(sweep)) == []
    write_run(sweep / "third", lr=0.04, batch_size=4, optimizer__eps=1.0)
    assert heat_maps(collected(sweep)) == []


def test_the_best_is_framed_and_colours_can_be_read(tmp_path: Path) -> None:
    collection = collected(write_sweep(tmp_path, methods=["adam"]))
    (heat_map,) = heat_maps(collection)
    for metric in ("loss/train", "accuracy/test"):
        page = drawn(heat_map, metric, "final value")
        markup = Markup(page)
        cells = markup.attributes("td")
        (best,) = [cell["data-group"] for cell in cells if cell.get("class") == "best"]
        assert best == heat_map.cells[1][0].key  # lr 0.01 at the smallest batch
        assert "at lr = 0.01 · B = 4" in markup.text
        assert len(cells) == 9 and collection.groups[0].final(metric).text() in page
        for background, ink in re.findall(r"background:(#\w{6});color:(#\w{6})", page):
            assert contrast(background, ink) > 4.5


def contrast(one: str, other: str) -> float:
    """By WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_runs_that_have_not_ended_leave_their_cell_empty(tmp_path: Path) -> None:
    for i, (lr, size) in enumerate(((0.01, 4), (0.01, 16), (0.02, 4), (0.02, 16))):
        write_run(tmp_path / str(i), lr=lr, batch_size=size, status="unfinished" if i < 1 else "finished")
    (heat_map,) = heat_maps(collected(tmp_path))
    page = drawn(heat_map, "loss/train", "loss")
    assert page.count("background:") == 3 and "–" in page
    for i in range(4):
        (tmp_path / str(i) / "record.json").unlink(missing_ok=True)
    (heat_map,) = heat_maps(collected(tmp_path))
    assert "No run has ended." in drawn(heat_map, "loss/train", "loss")

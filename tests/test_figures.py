"""The figures for print, against pictures of them that were looked at.

`python tests/test_figures.py` draws those pictures again; look at them before they are committed.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from PIL import Image

from diffoc.figures import COLORS, WIDTH, paper, plots, save_for_print
from diffoc.provenance import ROOT
from diffoc.records import COLUMNS, Cell, as_json
from diffoc.summary import by_budget, by_method, by_setting

BASELINES = Path(__file__).with_name("figures")
TOLERANCE = 2.0  # root mean square of 255; other versions of FreeType stay below it

# What the figures show here was written down, not computed by what they are made to show.
ONE = {"super_resolution": (25.0, 0.5), "gaussian_blur": (31.0, 1.0)}
TWO = {"super_resolution": (24.0, math.nan)}
CURVES = {
    "super_resolution": {
        "Ours": [(100.0, 22.0, 0.5), (300.0, 24.0, 0.4), (1000.0, 25.0, 0.4)],
        "DPS": [(100.0, 15.0, 1.0), (300.0, 21.0, 0.6), (1000.0, 24.0, 0.5)],
    },
    "gaussian_blur": {"Ours": [(100.0, 27.0, math.nan), (1000.0, 31.0, math.nan)]},
}


def ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def steering() -> Figure:
    side = torch.linspace(-2, 2, 21)
    density = (-(side[:, None] ** 2) - (side[None] - 1) ** 2).exp()
    free = torch.tensor([[[-1.0, -1.0], [1.5, 0.0]], [[-1.5, 0.5], [1.5, 1.0]]])
    turned = torch.tensor([[[-1.0, -1.0], [1.5, 0.0]], [[0.9, 0.5], [1.1, 1.0]]])
    return plots.steering(side, density, free, {"input": turned, "output": free}, 1.0, 0.2)


def predicted_x0() -> Figure:
    images = ramp(2, 1, 4, 4)
    return plots.predicted_x0([0.9, 0.1], images, -images, images.flip(-1), ramp(1, 4, 4))


def reconstructions() -> Figure:
    columns = {"truth": ramp(2, 1, 8, 8), "measurement": ramp(2, 1, 2, 2), "DPS": ramp(2, 3, 8, 8)}
    return plots.reconstructions(columns, ["a face", "a digit"], {"DPS": ["24.0 dB", ""]})


def metric_by_method() -> Figure:
    return plots.metric_by_method({"Ours": ONE, "DPS": TWO}, "PSNR (dB)")


def quality_curves() -> Figure:
    return plots.quality_curves(CURVES, "evaluations", "PSNR (dB)")


def quality_by_rank() -> Figure:
    panels = {"PSNR (dB)": {"blur": [(0.0, 24.0, 0.5), (1.0, 27.0, 0.5), (16.0, 27.5, 0.5)]}}
    return plots.quality_curves(panels, "rank", "ours", logarithmic=False)


def quality_by_prior() -> Figure:
    ours = [(0.0, 25.0, 0.5), (1.0, 24.0, 0.5), (2.0, 22.0, 0.7)]
    panels = {"blur": {"Ours": ours, "DPS": [(0.0, 24.0, 0.4), (2.0, 9.0, 1.0)]}}
    names = ["trained", "noise 0.1", "untrained"]
    return plots.quality_curves(panels, "prior", "PSNR (dB)", ticks=names)


def theorem_errors() -> Figure:
    errors = {"kept": [1.0, 1e-2, 1e-5, 1e-8], "dropped": [1e-15, 2e-15, 1e-15, 2e-15]}
    return plots.theorem_errors([1e3, 1e6, 1e9, 1e12], errors, 1e-12)


def sizes_over_time() -> Figure:
    sizes = {"exact": [1e-3, 1.0, 40.0], "rollout": [40.0, 40.0, 40.0]}
    return plots.sizes_over_time([1.0, 0.2, 0.0], sizes)


FIGURES = [
    *(steering, predicted_x0, reconstructions, metric_by_method),
    *(quality_curves, quality_by_rank, quality_by_prior, theorem_errors, sizes_over_time),
]


def draw(figure: Figure, path: Path) -> Path:
    with mpl.rc_context({"text.hinting": "none", "text.hinting_factor": 1}):
        figure.savefig(path, dpi=60, metadata={"Software": None})
    return path


@pytest.mark.parametrize("make", FIGURES, ids=lambda make: make.__name__)
def test_figure_looks_as_it_did(make: Callable[[], Figure], tmp_path: Path) -> None:
    figure = make()
    assert figure.get_figwidth() == WIDTH
    drawn = draw(figure, tmp_path / "drawn.png")
    difference = compare_images(str(BASELINES / f"{make.__name__}.png"), str(drawn), TOLERANCE)
    assert difference is None, difference


def test_another_mean_is_another_picture(tmp_path: Path) -> None:
    changed = {"Ours": {**ONE, "gaussian_blur": (31.5, 1.0)}, "DPS": TWO}
    drawn = draw(plots.metric_by_method(changed, "PSNR (dB)"), tmp_path / "drawn.png")
    assert compare_images(str(BASELINES / "metric_by_method.png"), str(drawn), TOLERANCE)


def test_what_is_drawn_is_what_was_given() -> None:
    axes = metric_by_method().axes
    dots = [[line.get_xydata().tolist() for line in ax.lines] for ax in axes]
    assert [25.0, 0.0] in dots[0][0]
    assert [24.0, 1.0] in [place for line in dots[0] for place in line]
    assert [31.0, 0.0] in dots[1][0]
    assert not any(place == [24.0, 1.0] for line in dots[1] for place in line)
    first = quality_curves().axes[0]
    assert [line.get_color() for line in first.lines] == [COLORS["blue"], COLORS["orange"]]
    assert first.lines[1].get_ydata().tolist() == [15.0, 21.0, 24.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="free has shape"):
        plots.steering(ramp(3), ramp(3, 3), ramp(4, 2), {"input": ramp(2, 2, 2)}, 1.0, 0.2)
    with pytest.raises(ValueError, match="Tweedie has 1 images, expected 2"):
        plots.predicted_x0([1, 0], ramp(2, 1, 4, 4), *ramp(3, 1, 1, 4, 4)[:2], ramp(1, 4, 4))
    with pytest.raises(ValueError, match="truth has 2 images, expected 1"):
        plots.reconstructions({"truth": ramp(2, 1, 4, 4)}, ["a face"])
    with pytest.raises(ValueError, match="values is empty"):
        plots.metric_by_method({}, "PSNR (dB)")
    with pytest.raises(ValueError, match="panels is empty"):
        plots.quality_curves({}, "evaluations", "PSNR (dB)")


def test_files_say_where_they_come_from(tmp_path: Path) -> None:
    pdf, png = save_for_print(metric_by_method(), "table", ["table1_faces64.csv"], tmp_path / "new")
    with Image.open(png) as picture:
        assert picture.text["Title"] == "table"
        assert picture.text["Description"].endswith("; from table1_faces64.csv")
        assert picture.text["Description"].startswith("commit ")
        assert picture.width == round(300 * WIDTH)
    content = pdf.read_bytes()
    assert b"from table1_faces64.csv" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content


# Records


def rows(
    method: str, task: str, nfe: int, values: dict[str, float], **settings: float
) -> list[dict[str, str]]:
    cell = Cell("faces64", "float32", task, method, nfe, as_json(settings), 0, tuple(values))
    results = ({"status": "ok", "psnr": str(value)} for value in values.values())
    common = dict.fromkeys(COLUMNS, "")
    return [common | row | found for row, found in zip(cell.rows(), results, strict=True)]


def test_records_become_means_and_curves() -> None:
    some = [
        *rows("dps", "super_resolution", 300, {"a": 20.0, "b": 22.0}, guidance=1.0),
        *rows("dps", "super_resolution", 100, {"a": 18.0, "b": 18.0}, guidance=1.0),
        *rows("control", "super_resolution", 300, {"a": 25.0}, steps=10),
        *rows("admm", "super_resolution", 300, {"a": 19.0}),
    ]
    some[-1]["status"] = "failed"
    half = 12.706 * 2**0.5 / 2**0.5  # of Student's t with one degree of freedom
    means = by_method(some, "psnr")
    assert list(means) == ["DPS (NFE 300)", "DPS (NFE 100)", "Ours"]
    assert means["DPS (NFE 300)"]["super_resolution"] == pytest.approx((21.0, half), rel=1e-4)
    assert math.isnan(means["Ours"]["super_resolution"][1])
    curves = by_budget(some, "psnr")["super_resolution"]
    assert [place[:2] for place in curves["DPS"]] == [(100.0, 18.0), (300.0, 21.0)]
    tuned = by_setting(some[:2] + some[4:5], "psnr")
    assert tuned["DPS: guidance"]["super_resolution"][0][:2] == (1.0, 21.0)
    assert tuned["Ours: steps"]["super_resolution"][0][:2] == (10.0, 25.0)


def test_a_table_is_drawn_with_its_budgets_and_shards(tmp_path: Path) -> None:
    assert list(paper.from_records(tmp_path)) == []
    for shard, nfe in enumerate((100, 300), 1):
        path = tmp_path / f"table1_faces64.shard-{shard}-of-2.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            values = {"a": 20.0 + nfe / 100, "b": 21.0}
            writer.writerows(rows("dps", "super_resolution", nfe, values, guidance=1.0))
    made = {name: sources for name, _, sources in paper.from_records(tmp_path)}
    source = ("table1_faces64.csv",)
    assert made == {"table1_faces64_psnr": source, "table1_faces64_psnr_budget": source}


def test_todays_records_and_the_papers_tables_are_drawn() -> None:
    names = {name for name, _, _ in paper.from_records(ROOT / "data" / "records")}
    assert {"table1_faces64_psnr", "tuning_faces64"} <= names
    table = json.loads((ROOT / "data/paper_tables.json").read_text(encoding="utf-8"))["table3"]
    figures = {name: figure for name, figure, _ in paper.from_paper()}
    labels = [text.get_text() for text in figures["paper_table3"].axes[0].get_yticklabels()]
    assert labels == [row["label"] for row in table]


if __name__ == "__main__":
    BASELINES.mkdir(exist_ok=True)
    for make in FIGURES:
        print(draw(make(), BASELINES / f"{make.__name__}.png"))

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
import numpy as np
import pytest
import torch
from azula.noise import VPSchedule
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from PIL import Image

from diffoc.commands.main import main
from diffoc.data.provenance import ROOT
from diffoc.experiments.records import COLUMNS, Cell, as_json, frame
from diffoc.experiments.summary import by_budget, by_method, by_setting
from diffoc.figures import COLORS, WIDTH, paper, plots, save_for_print
from diffoc.priors import wrap_edm

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


def test_a_figure_of_nothing_is_refused() -> None:
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


def test_no_two_lines_look_alike() -> None:
    curves = {f"line {i}": [(1.0, float(i), 0.1)] for i in range(20)}
    (ax,) = plots.quality_curves({"panel": curves}, "x", "y").axes
    looks = {(line.get_color(), line.get_marker()) for line, *_ in ax.containers}
    assert len(looks) == 20


def test_records_become_means_and_curves() -> None:
    some = [
        *rows("dps", "super_resolution", 300, {"a": 20.0, "b": 22.0}, guidance=1.0),
        *rows("dps", "super_resolution", 100, {"a": 18.0, "b": 18.0}, guidance=1.0),
        *rows("stopped", "super_resolution", 300, {"a": 25.0}, steps=10),
        *rows("admm", "super_resolution", 300, {"a": 19.0}),
    ]
    some[-1] |= {"status": "failed", "psnr": ""}
    some = frame(some)
    half = 12.706 * 2**0.5 / 2**0.5  # of Student's t with one degree of freedom
    means = by_method(some, "psnr")
    assert list(means) == ["DPS (NFE 300)", "DPS (NFE 100)", "STOPPED"]
    assert means["DPS (NFE 300)"]["super_resolution"] == pytest.approx((21.0, half), rel=1e-4)
    assert math.isnan(means["STOPPED"]["super_resolution"][1])
    curves = by_budget(some, "psnr")["super_resolution"]
    assert [place[:2] for place in curves["DPS"]] == [(100.0, 18.0), (300.0, 21.0)]
    tuned = by_setting(some.iloc[[0, 1, 4]], "psnr")
    assert tuned["DPS: guidance"]["super_resolution"][0][:2] == (1.0, 21.0)
    assert tuned["STOPPED: steps"]["super_resolution"][0][:2] == (10.0, 25.0)
    apart = by_setting(some[:4], "psnr")
    for nfe, mean in ((300, 21.0), (100, 18.0)):
        assert apart[f"DPS (NFE {nfe}): guidance"]["super_resolution"][0][1] == mean


def test_a_table_is_drawn_with_its_budgets_and_shards(tmp_path: Path) -> None:
    assert list(paper.from_records(tmp_path)) == []
    for shard, nfe in enumerate((100, 300), 1):
        path = tmp_path / f"table1_faces64.shard-{shard}-of-2.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            values = {"a": 20.0 + nfe / 100, "b": 21.0}
            others = {"ssim": "0.5", "mse": "0.1", "residual_over_noise": "1"}
            found = rows("dps", "super_resolution", nfe, values, guidance=1.0)
            writer.writerows(row | others for row in found)
    made = {name: sources for name, _, sources in paper.from_records(tmp_path)}
    source = ("table1_faces64.csv",)
    names = [
        f"table1_faces64_{metric}{of}" for metric in ("psnr", "ssim") for of in ("", "_budget")
    ]
    assert made == dict.fromkeys(names, source)


def test_todays_records_and_the_papers_tables_are_drawn() -> None:
    names = {name for name, _, _ in paper.from_records(ROOT / "data" / "records")}
    assert {"table1_faces64_psnr", "tuning_faces64"} <= names
    table = json.loads((ROOT / "data/paper_tables.json").read_text(encoding="utf-8"))["table3"]
    figures = {name: figure for name, figure, _ in paper.from_paper()}
    labels = [text.get_text() for text in figures["paper_table3"].axes[0].get_yticklabels()]
    assert labels == [row["label"] for row in table]


@pytest.fixture(scope="module")
def computed() -> dict[str, Figure]:
    """The figures that need no records, by one iteration and the denoiser of a normal law."""

    def wiener(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "ITERATIONS", 1)
        patch.setattr(paper, "load_prior", lambda name: wrap_edm(wiener, (3, 64, 64)))
        made = list(paper.computed())
    assert all(sources and all(sources) for _, _, sources in made)
    return {name: figure for name, figure, _ in made}


def curves_of(figure: Figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    (ax,) = figure.axes
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in ax.lines}


def test_the_theorems_errors_are_drawn(computed: dict[str, Figure]) -> None:
    """Rounding without second-order terms, and with them a limit of slope -1."""
    curves = curves_of(computed["theorem_errors"])
    for theorem in ("Theorem 4.1", "Theorem 4.3"):
        constants, kept = curves[f"{theorem}, second-order terms kept"]
        assert kept[0] > 0.1
        slopes = np.diff(np.log(kept[2:6])) / np.diff(np.log(constants[2:6]))
        np.testing.assert_allclose(slopes, -1, atol=0.02)
        assert max(curves[f"{theorem}, dropped"][1]) < 1e-12


def test_the_scores_drawn_are_those_by_hand(computed: dict[str, Figure]) -> None:
    """x_0 given x_t is N(alpha x, sigma^2) for the prior N(0, 1), so y is N(alpha x, s^2 + ...)."""
    curves = curves_of(computed["scores"])
    times, exact = curves["exact"]
    alpha, sigma = (scale.numpy() for scale in VPSchedule(sigma_min=0.0)(torch.tensor(times)))
    y, x, s = 0.7, 0.3, 0.1
    variance = sigma**2 / (alpha**2 + sigma**2)
    by_hand = alpha * (y - alpha * x) / (variance + s**2)
    np.testing.assert_allclose(exact, by_hand, rtol=1e-3)
    np.testing.assert_allclose(curves["rollout (Theorem 4.1)"][1], (y - x) / s**2, rtol=1e-12)
    tweedie = alpha * (y - alpha * x) / s**2
    np.testing.assert_allclose(curves["Tweedie (DPS)"][1], tweedie, rtol=1e-12)


def test_controlled_paths_end_at_the_measurement(computed: dict[str, Figure]) -> None:
    for ax in computed["steering"].axes:
        ends = [
            line.get_xdata()[-1]
            for line in ax.lines
            if line.get_color() == COLORS["vermilion"] and len(line.get_xdata()) == 21
        ]
        assert len(ends) == 6
        assert all(abs(end - 1) < 0.2 for end in ends)  # within the noise of y


def test_more_steps_reconstruct_better(computed: dict[str, Figure]) -> None:
    captions = [ax.get_xlabel() for ax in computed["steps"].axes]
    quality = [float(text.removesuffix(" dB")) for text in captions if text]
    assert len(quality) == 3
    assert quality[0] < quality[1] < quality[2]
    titles = [ax.get_title() for ax in computed["reconstructions"].axes[:3]]
    assert titles == ["super resolution", "box inpainting", "gaussian blur"]


def test_every_figure_is_written_twice(
    computed: dict[str, Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [("scores", computed["scores"], ("a prior",)), ("table", metric_by_method(), ("a.csv",))]
    for source in ("from_records", "from_ablations"):
        monkeypatch.setattr(paper, source, lambda records: iter(()))
    monkeypatch.setattr(paper, "from_paper", lambda: iter(made[:1]))
    monkeypatch.setattr(paper, "computed", lambda: iter(made[1:]))
    assert main(["figures", "--out", str(tmp_path / "out")]) == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["scores.pdf", "scores.png", "table.pdf", "table.png"]
    with Image.open(tmp_path / "out" / "scores.png") as picture:
        assert picture.text["Description"].endswith("; from a prior")


if __name__ == "__main__":
    BASELINES.mkdir(exist_ok=True)
    for make in FIGURES:
        print(draw(make(), BASELINES / f"{make.__name__}.png"))

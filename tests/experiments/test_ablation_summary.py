"""Records of the grids become the curves that they were made for, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from diffoc.data.provenance import ROOT
from diffoc.experiments import ablation_summary as summary
from diffoc.experiments.ablations import REGULARIZATIONS, ablation_cells
from diffoc.experiments.methods import read_tuned
from diffoc.experiments.records import COLUMNS, frame
from diffoc.experiments.summary import select
from diffoc.figures.paper import from_ablations

TASK = "random_inpainting"


def rows(table, prior="faces64", **options):
    """Every cell of a grid with a PSNR that tells it apart: its place in the grid."""
    cells = ablation_cells(table, prior, ["a"], 1, "float32", tasks=[TASK], **options)
    found = []
    for place, cell in enumerate(cells):
        result = {"status": "ok", "psnr": str(place)}
        found += [dict.fromkeys(COLUMNS, "") | row | result for row in cell.rows()]
    return frame(found)


def row_of(found, place):
    """The row that a point of a curve was made of."""
    row = found[found["psnr"] == place]
    assert len(row) == 1
    return row


def test_equal_budgets_and_equal_steps_are_told_apart():
    found = rows("few_steps")
    budgets = summary.equal_budgets(found, frame([]), "psnr")[TASK]
    assert set(budgets) == {"DPS", "OURS", "QUICK"}
    for label, curve in budgets.items():
        assert [x for x, _, _ in curve] == [20, 50, 100, 200, 300]
        for x, place, _ in curve:
            row = row_of(found, place)
            assert row["nfe"].item() == x
            if label == "QUICK":
                assert row["steps"].item() == x // 2
                continue
            method = {"DPS": "dps", "OURS": "ours"}[label]
            tuned = read_tuned()["faces64"][method][TASK][str(int(x))]
            assert row["steps"].item() == tuned["steps"]
    horizons = summary.equal_horizons(found, "psnr")[TASK]
    assert set(horizons) == {"DPS", "OURS", "QUICK", "COLD"}
    for label, curve in horizons.items():
        assert [x for x, _, _ in curve] == [5, 10, 20, 50, 100, 200]
        for x, place, _ in curve:
            row = row_of(found, place)
            if label == "DPS":
                assert row["nfe"].item() == x
            elif label == "QUICK":
                assert (row["steps"].item(), row["nfe"].item()) == (x, 2 * x)
            else:
                assert (row["steps"].item(), row["nfe"].item()) == (x, max(300, 4 * x))


def invented(values):
    """Trials of two images: budget, settings, evaluations of the two, their PSNR."""
    rows = [
        (budget, text, place, work, psnr)
        for budget, text, works, psnrs in values
        for place, (work, psnr) in enumerate(zip(works, psnrs, strict=True))
    ]
    return pd.DataFrame(rows, columns=["nfe", "settings", "image", "evaluations", "psnr"])


def test_a_budget_takes_the_best_tuned_settings_that_fit_into_it():
    failed = float("nan")
    values = [
        (10, "ten", (10, 10), (20.0, 22.0)),
        (10, "two", (2, 2), (19.0, 18.0)),
        (10, "best but failed", (10, 10), (30.0, failed)),
        (30, "thirty", (30, 30), (20.0, 21.0)),  # worse than with fewer evaluations
        (30, "not tuned", (5, 5), (20.0, 20.5)),
        (60, "forty", (30, 40), (22.0, 23.0)),  # fits where its dearest image does
        (90, "twelve", (12, 12), (21.0, 22.5)),  # of a larger budget than it takes
    ]
    trials = invented(values).sample(frac=1, random_state=0)
    for nfe in range(1, 100):
        tuned = {}
        for budget, text, works, psnrs in values:
            mean = sum(psnrs) / 2
            if mean == mean and mean > tuned.get(budget, (0,))[0]:
                tuned[budget] = mean, text, max(works)
        fit = [(mean, text) for mean, text, most in tuned.values() if most <= nfe]
        assert summary.best_within(trials, nfe) == max(fit, default=(0, None))[1]
    assert summary.best_within(trials, 10) == "ten"
    assert summary.best_within(trials, 39) == "twelve"
    assert summary.best_within(trials, 9) is None
    assert summary.best_within(trials[:0], 300) is None


def test_equal_budgets_have_the_rows_of_what_fits():
    found = rows("few_steps")
    trials = [(20, found[(found["method"] == "dps") & (found["nfe"] == 20)])]
    trials += [(300, found[(found["method"] == "quick") & (found["nfe"] == 40)])]
    trials = pd.concat([some.assign(nfe=nfe, evaluations=some["nfe"]) for nfe, some in trials])
    taken = summary.at_equal_budgets(found, trials)
    for nfe in (20, 50, 100, 200, 300):
        for method in ("dps", "ours", "quick"):
            some = select(taken, method=method, nfe=nfe)
            own = nfe if method == "ours" else 20 if method == "dps" else min(nfe, 40)
            (place,) = some["psnr"]
            assert row_of(found, place)["nfe"].item() == own
    assert len(taken) == 15
    curves = summary.equal_budgets(found, trials, "psnr")[TASK]
    assert len({mean for _, mean, _ in curves["DPS"]}) == 1


def test_parts_are_named_by_what_was_taken_away():
    others = rows("few_steps", methods=["dps"])
    found = summary.by_part(pd.concat([rows("parts"), others], ignore_index=True))
    assert list(found) == [TASK]
    assert {label: len(some) for label, some in found[TASK].items()} == {
        summary.WHOLE: 1,
        "no plan, the guess alone": 1,
        "the guess knows no smoothness": 1,
        "the guess knows no colours": 1,
        "steps uniform in time": 1,
        "not preconditioned": 1,
        "stopped at the noise level": 1,
        "almost no cost": 1,
        **{f"constant cost {r}": 1 for r in ("0.3", "3", "30", "100", "300")},
        "no plan, the guess alone: the guess knows no smoothness": 1,
        "no plan, the guess alone: the guess knows no colours": 1,
        "no plan, the guess alone: steps uniform in time": 1,
    }
    assert len(select(found[TASK]["constant cost 30"], weighted=False, weight=30.0)) == 1


def test_changes_are_of_three_kinds_and_the_worst_is_first():
    found, other = rows("parts"), "super_resolution"
    both = pd.concat([found, found.assign(task=other, psnr=3 * found["psnr"])], ignore_index=True)
    places = {name: row["psnr"].item() for name, row in summary.by_part(found)[TASK].items()}
    groups = summary.by_change(both.sample(frac=1, random_state=0), "psnr")
    assert list(groups) == [summary.ONE_PART, summary.OTHER_COST, summary.OF_GUESS]
    costs = {"almost no cost", *(f"constant cost {r}" for r in ("0.3", "3", "30", "100", "300"))}
    assert set(groups[summary.OTHER_COST]) == costs
    alone = f"{summary.GUESS}: "
    of_guess = {name for name in places if name.startswith(alone)}
    assert {alone + name for name in groups[summary.OF_GUESS]} == of_guess
    assert len(of_guess) == 3
    assert set(groups[summary.ONE_PART]) == places.keys() - costs - of_guess - {summary.WHOLE}
    for kind, changes in groups.items():
        before = alone if kind == summary.OF_GUESS else ""
        whole = places[summary.GUESS if before else summary.WHOLE]
        means = [changes[label][TASK][0] for label in changes]
        assert means == sorted(means)
        for label, change in changes.items():
            worth = places[before + label] - whole
            assert [change[task][0] for task in (TASK, other)] == [worth, 3 * worth]


def test_rank_and_constant_vary_alone():
    found = rows("rank")
    ranks = summary.by_rank(found, "psnr")[TASK]
    for label, curve in ranks.items():
        assert [x for x, _, _ in curve] == [0, 1, 4, 16]
        for x, place, _ in curve:
            wanted = {"rank": x, "regularization": 1e-3, "weight_scale": 1e-6}
            projected = label == summary.PROJECTED and x > 0
            assert len(select(row_of(found, place), projected=projected, **wanted)) == 1
    constants = summary.by_constant(found, "psnr")[TASK]
    assert [x for x, _, _ in constants["rank 1"]] == list(range(len(REGULARIZATIONS)))
    assert summary.CONSTANTS[-1] == "Lemma 4.2"
    for x, place, _ in constants["rank 1"]:
        wanted = {"regularization": REGULARIZATIONS[int(x)], "weight_scale": 1e-6}
        assert len(select(row_of(found, place), rank=1, projected=False, **wanted)) == 1
    assert [x for x, _, _ in constants["rank 0"]] == [0, 4, 7]


def test_priors_in_their_order():
    found = rows("robustness")
    curves = summary.by_prior(found, "psnr")[TASK]
    assert [x for x, _, _ in curves["DPS"]] == [0, 1, 2, 3]
    assert [x for x, _, _ in curves["Deep image prior"]] == [5]
    assert [x for x, _, _ in curves["OURS"]] == [0, 1, 2, 3, 5]
    assert (
        [x for x, _, _ in curves["PAPER"]] == [x for x, _, _ in curves["RELEASED"]] == [*range(4)]
    )
    assert [x for x, _, _ in curves["OURS" + summary.ALONE]] == [5]
    for label in ("OURS", "OURS" + summary.ROUGH, "OURS" + summary.NOISE):
        assert len(curves[label]) >= 4
        for x, place, _ in curves[label]:
            row = row_of(found, place)
            assert summary.prior_label(row["prior"].item()) == summary.PRIORS[int(x)]
            assert (row["smoothness"].item() == 0) == (label != "OURS")
            assert (row["from_noise"].item() is True) == (label == "OURS" + summary.NOISE)
    bare = summary.by_prior(rows("robustness", trained=False), "psnr", ["random", "none"])[TASK]
    assert [x for x, _, _ in bare["OURS"]] == [0, 1]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("faces64", "trained"),
        ("faces64+noise0.05", "noise 0.05"),
        ("untrained faces64", "untrained"),
        ("random ffhq256/32", "random"),
        ("identity faces64", "none"),
    ],
)
def test_what_a_prior_is_called(name, label):
    assert summary.prior_label(name) == label


def test_rows_are_selected_by_columns_and_by_settings():
    found = rows("few_steps")
    some = select(found, method="dps", nfe=5)
    assert {json.loads(text)["steps"] for text in some["settings"]} == {5}
    assert select(found, method="ours", guidance=1.0).empty
    assert select(found, method="ours", nothing=1.0).empty


def test_todays_records_are_drawn(tmp_path: Path):
    assert list(from_ablations(tmp_path)) == []
    drawn = {name: sources for name, _, sources in from_ablations(ROOT / "data" / "records")}
    faces = "faces64"
    budgets = (f"few_steps_{faces}.csv", f"tuning_{faces}.csv")
    assert drawn[f"few_steps_{faces}_budget"] == budgets
    assert {f"few_steps_{faces}_horizon", f"rank_{faces}", f"rank_{faces}_constant"} <= drawn.keys()
    assert drawn[f"robustness_{faces}"] == (f"robustness_{faces}.csv",)

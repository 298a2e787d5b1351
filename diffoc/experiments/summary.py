"""Means of a table of records, with their uncertainty.

Rows are tables of :func:`diffoc.experiments.records.rows_of`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable

import pandas as pd
from scipy.stats import t as student

from diffoc.experiments.inaccurate import accurate_name
from diffoc.experiments.methods import METHODS
from diffoc.experiments.protocol import COLOUR_FACES
from diffoc.experiments.records import METRICS

_FORMATS = {"psnr": "{:.2f} ± {:.2f}", "mse": "{:.4f} ± {:.4f}"}


def select(rows: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Returns the rows whose columns have these values; there are none if a column is missing."""
    for key, value in wanted.items():
        rows = rows[rows[key] == value] if key in rows else rows[:0]
    return rows


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean, and half the width of its 95 % interval; not a number for one value.

    The interval is by Student's t, for values that are independent.
    """
    x = pd.Series(list(values), dtype=float)
    return float(x.mean()), float(student.ppf(0.975, len(x) - 1) * x.sem())


def by_image(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Returns a metric by image, averaged over its rows; images without it are left out."""
    return rows.groupby("image", sort=False)[metric].mean().dropna()


def by_method(rows: pd.DataFrame, metric: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Maps a method's label to a task to mean and half-width of the interval, where there is any.

    A label names the budget if the rows have several of its method.
    """
    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for (label, task), some in rows.groupby([_with_budget(rows), "task"], sort=False):
        if len(images := by_image(some, metric)):
            found[label][task] = mean_and_interval(images)
    return dict(found)


Curve = list[tuple[float, float, float]]
"""Of (abscissa, mean, half-width of the interval), in ascending order."""


def by_budget(rows: pd.DataFrame, metric: str) -> dict[str, dict[str, Curve]]:
    """Maps a task to a method's label to its curve over the budget of evaluations."""
    return curves(rows.assign(label=labels(rows)), "task", "label", "nfe", metric)


def by_setting(rows: pd.DataFrame, metric: str) -> dict[str, dict[str, Curve]]:
    """Maps a method's label and tuned keyword to a task to its curve over that keyword's values.

    The keyword is the one with the most values. A label names the budget if the rows have several
    of its method. Rows of methods that have nothing to tune are left out.
    """
    rows = rows[rows["method"].isin([name for name, one in METHODS.items() if one.tuned])]
    found: dict[str, dict[str, Curve]] = {}
    for label, some in rows.groupby(_with_budget(rows), sort=False):
        settings = pd.DataFrame(map(json.loads, some["settings"]))
        keyword = settings.nunique().idxmax()
        found |= curves(some.assign(panel=f"{label}: {keyword}"), "panel", "task", keyword, metric)
    return found


def curves(
    rows: pd.DataFrame, panel: str, line: str, abscissa: str, metric: str
) -> dict[str, dict[str, Curve]]:
    """Maps a panel to a line to its curve; these and the abscissa are columns of the rows."""
    found: dict[str, dict[str, Curve]] = defaultdict(dict)
    for (title, name), some in rows.groupby([panel, line], sort=False):
        images = ((float(x), by_image(each, metric)) for x, each in some.groupby(abscissa))
        if curve := [(x, *mean_and_interval(each)) for x, each in images if len(each)]:
            found[title][name] = curve
    return dict(found)


def labels(rows: pd.DataFrame) -> pd.Series:
    """Returns the label of each row's method, which is its name if it is no method of ours."""
    return rows["method"].map(lambda name: METHODS[name].label if name in METHODS else name)


def _with_budget(rows: pd.DataFrame) -> pd.Series:
    """Returns the labels, with the budget where a method has several."""
    several = rows.groupby("method")["nfe"].transform("nunique") > 1
    return labels(rows) + (" (NFE " + rows["nfe"].astype(str) + ")").where(several, "")


def paired(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> tuple[float, float]:
    """Returns the mean difference, first minus second, on the images of both, and its interval."""
    gap = (by_image(first, metric) - by_image(second, metric)).dropna()
    if gap.empty:
        raise ValueError("first and second have no image in common")
    return mean_and_interval(gap)


def plus_minus(mean: float, half: float, sign: str = "") -> str:
    """Returns a mean and its half-width as text; `sign` is "+" for a difference."""
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Returns a table in Markdown of a head and lines of cells."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def described(rows: pd.DataFrame) -> str:
    """Returns a sentence on what a table is of: priors, images, operators, the network's numbers.

    Priors that are made of another, as `faces64+noise0.1`, go by the other's name.
    """
    each = (rows["protocol"] == COLOUR_FACES.name).any()
    return (
        f"Prior {' and '.join(sorted(set(rows['prior'].map(accurate_name))))}; "
        f"{rows['image'].nunique()} images; "
        f"{'an operator for each image' if each else 'one operator a task, for all images'}; "
        f"networks in {' and '.join(sorted(set(rows['precision'])))}."
    )


def summarise(rows: pd.DataFrame) -> str:
    """Returns a table in Markdown for each metric: methods by tasks, mean ± 95 % interval.

    The mean is over images; seeds of an image are averaged first. A dash is a task that a method
    cannot do, an empty place one that was not run. Failures, and fewer images than elsewhere, are
    counted in brackets.
    """
    label = labels(rows) + " (NFE " + rows["nfe"].astype(str) + ")"
    for column in ("prior", "settings"):
        tried = rows.groupby(["task", "method", "nfe"])[column].transform("nunique")
        several = tried.groupby([rows["method"], rows["nfe"]]).transform("max") > 1
        label += (" " + rows[column]).where(several, "")
    places = dict(list(rows.groupby([label, "task"], sort=False)))
    most = max((some["image"].nunique() for some in places.values()), default=0)
    tasks, parts = rows["task"].unique(), []
    for metric in METRICS:
        if rows[metric].notna().any():
            lines = [
                [name, *(_place(places.get((name, t), rows[:0]), metric, most) for t in tasks)]
                for name in label.unique()
            ]
            parts.append(f"{metric}, {most} images\n\n" + markdown(["method", *tasks], lines))
    return "\n\n".join(parts) or "no results"


def _place(rows: pd.DataFrame, metric: str, most: int) -> str:
    if rows.empty:
        return ""
    if (rows["status"] == "unsupported").all():
        return "-"
    images, failed = by_image(rows, metric), (rows["status"] == "failed").sum()
    notes = [f"{failed} failed"] if failed else []
    if images.empty:
        return ", ".join(notes)
    if len(images) < most:
        notes.append(f"{len(images)} images")
    text = _FORMATS.get(metric, "{:.3f} ± {:.3f}").format(*mean_and_interval(images))
    return text + (f" ({', '.join(notes)})" if notes else "")

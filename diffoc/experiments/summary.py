"""Means and differences of a table of records, with their uncertainty.

Rows are tables of :func:`diffoc.experiments.records.rows_of`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import t as student
from scipy.stats import ttest_1samp

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
    """Returns the mean, and half the width of its 95 % interval; NaN for one value.

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
    table: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for (label, task), some in rows.groupby([_with_budget(rows), "task"], sort=False):
        if len(images := by_image(some, metric)):
            table[label][task] = mean_and_interval(images)
    return dict(table)


Curve = list[tuple[float, float, float]]
"""Triples (abscissa, mean, half-width of the interval), in ascending order."""


def by_budget(rows: pd.DataFrame, metric: str) -> dict[str, dict[str, Curve]]:
    """Maps a task to a method's label to its curve over the budget of evaluations."""
    return curves(rows.assign(label=labels(rows)), "task", "label", "nfe", metric)


def by_setting(rows: pd.DataFrame, metric: str) -> dict[str, dict[str, Curve]]:
    """Maps a method's label and tuned keyword to a task to its curve over that keyword's values.

    The keyword is the one with the most values. A label names the budget if the rows have several
    of its method. Rows of methods that have nothing to tune are left out.
    """
    rows = rows[rows["method"].isin([name for name, one in METHODS.items() if one.tuned])]
    panels: dict[str, dict[str, Curve]] = {}
    for label, some in rows.groupby(_with_budget(rows), sort=False):
        settings = pd.DataFrame(map(json.loads, some["settings"]))
        keyword = settings.nunique().idxmax()
        panels |= curves(some.assign(panel=f"{label}: {keyword}"), "panel", "task", keyword, metric)
    return panels


def curves(
    rows: pd.DataFrame, panel: str, line: str, abscissa: str, metric: str
) -> dict[str, dict[str, Curve]]:
    """Maps a panel to a line to its curve; these and the abscissa are columns of the rows."""
    panels: dict[str, dict[str, Curve]] = defaultdict(dict)
    for (title, name), some in rows.groupby([panel, line], sort=False):
        images = ((float(x), by_image(each, metric)) for x, each in some.groupby(abscissa))
        if curve := [(x, *mean_and_interval(each)) for x, each in images if len(each)]:
            panels[title][name] = curve
    return dict(panels)


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


@dataclass(frozen=True)
class Difference:
    """By how much a method is ahead of another row of a table on one task.

    Attributes:
        task, method, nfe: the names and the budget of the other row.
        images: the number of images that both rows have.
        mean: the mean difference.
        half: half the width of its 95 % interval.
        p, corrected: the p-value of a paired t-test, as it is and corrected by :func:`holm` over
            the whole table; like `half` they are NaN for a single image.
    """

    task: str
    method: str
    nfe: int
    images: int
    mean: float
    half: float
    p: float
    corrected: float


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Returns p-values corrected for their number by Holm's step-down method.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    for the m values in ascending order. If all differences with a corrected value of at most
    0.05 are taken for real, at least one is not with a probability of at most 0.05. NaN stays NaN
    and does not count. Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    corrected = np.array(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(corrected))
    order = known[np.argsort(corrected[known], kind="stable")]
    scaled = corrected[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected.tolist()


def differences(
    rows: pd.DataFrame, method: str, nfe: int, metric: str = "psnr"
) -> list[Difference]:
    """Returns by how much a method is ahead of every other row of a table, task by task.

    Seeds of an image are averaged first, and rows without a result are left out. Intervals and
    p-values are those of a paired t-test, and Holm's correction is over all that is returned.

    >>> [one for one in differences(rows, "ours", 300) if one.corrected < 0.05]
    """
    places = rows.groupby(["task", "method", "nfe"], sort=False)
    values = {place: by_image(some, metric) for place, some in places}
    ours = {task: some for (task, *place), some in values.items() if place == [method, nfe]}
    if not any(map(len, ours.values())):
        raise ValueError(f"rows has no {method} with nfe {nfe} that was measured by {metric}")
    gaps = []
    for (task, other, budget), some in values.items():
        if task in ours and (other, budget) != (method, nfe):
            gap = (ours[task] - some).dropna()
            if len(gap):
                mean, half = mean_and_interval(gap)
                p = float(ttest_1samp(gap, 0.0).pvalue) if len(gap) > 1 else np.nan
                gaps.append(Difference(task, other, budget, len(gap), mean, half, p, p))
    corrected = holm([one.p for one in gaps])
    return [replace(one, corrected=p) for one, p in zip(gaps, corrected, strict=True)]


def plus_minus(mean: float, half: float, sign: str = "") -> str:
    """Returns a mean and its half-width as text; `sign` is "+" for a difference."""
    return f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Returns a table in Markdown of a head and lines of cells."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def described(rows: pd.DataFrame) -> str:
    """Returns a sentence on a table: its priors, images, operators, and the network's numbers.

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

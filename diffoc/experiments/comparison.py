"""Differences between the methods of a table, image by image, with their uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from diffoc.experiments.summary import by_image, mean_and_interval


@dataclass(frozen=True)
class Difference:
    """What a method is ahead of another row of a table by, on one task.

    Attributes:
        task, method, nfe: the names and the budget of the other row.
        images: how many both have.
        mean: the mean difference.
        half: half the width of its 95 % interval.
        p, corrected: the p-value of a paired t-test, and as :func:`holm` corrects it over the whole
            table. Like `half` they are not numbers for one image.
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

    for the m values in ascending order. That any difference is wrongly taken for real, at a
    corrected value of at most 0.05, has at most this probability. What is not a number stays so,
    and does not count. Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    found = np.array(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(found))
    order = known[np.argsort(found[known], kind="stable")]
    scaled = found[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return found.tolist()


def differences(
    rows: pd.DataFrame, method: str, nfe: int, metric: str = "psnr"
) -> list[Difference]:
    """Returns what a method is ahead of every other row of a table by, task by task.

    Seeds of an image are averaged first, and rows without a result are left out. Intervals and
    p-values are those of a paired t-test, and Holm's correction is over all that is returned.

    >>> [found for found in differences(rows, "ours", 300) if found.corrected < 0.05]
    """
    places = rows.groupby(["task", "method", "nfe"], sort=False)
    values = {place: by_image(some, metric) for place, some in places}
    ours = {task: some for (task, *place), some in values.items() if place == [method, nfe]}
    if not any(map(len, ours.values())):
        raise ValueError(f"rows has no {method} with nfe {nfe} that was measured by {metric}")
    found = []
    for (task, other, budget), some in values.items():
        if task in ours and (other, budget) != (method, nfe):
            gap = (ours[task] - some).dropna()
            if len(gap):
                mean, half = mean_and_interval(gap)
                p = float(stats.ttest_1samp(gap, 0.0).pvalue) if len(gap) > 1 else np.nan
                found.append(Difference(task, other, budget, len(gap), mean, half, p, p))
    corrected = holm([one.p for one in found])
    return [replace(one, corrected=p) for one, p in zip(found, corrected, strict=True)]

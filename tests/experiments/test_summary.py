"""Paired differences against scipy's paired t-test, Holm's correction against its definition."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats

from diffoc.experiments.records import COLUMNS, frame
from diffoc.experiments.summary import differences, holm


def rejected_by_closed_testing(p_values, level):
    """A hypothesis is rejected if every intersection that contains it is, by Bonferroni."""
    m = len(p_values)
    sets = [s for size in range(1, m + 1) for s in combinations(range(m), size)]
    return [
        all(min(p_values[j] for j in s) * len(s) <= level for s in sets if i in s) for i in range(m)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closure_of_bonferroni(seed):
    p_values = (np.random.default_rng(seed).random(6) ** 4).tolist()
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2, 0.7):
        expected = rejected_by_closed_testing(p_values, level)
        assert [p <= level for p in corrected] == expected
    # Missing values count as none.
    with_gap = holm([p_values[0], float("nan"), *p_values[1:]])
    assert np.isnan(with_gap[1])
    assert [*with_gap[:1], *with_gap[2:]] == corrected


def row(task, method, image, value, nfe=300, status="ok", seed=0):
    return {
        **dict.fromkeys(COLUMNS, ""),
        **{"settings": "{}", "task": task, "method": method, "nfe": str(nfe), "image": str(image)},
        **{"seed": str(seed), "status": status, "psnr": "" if value is None else repr(value)},
    }


def test_differences_are_paired_and_corrected_over_the_table():
    generator = np.random.default_rng(0)
    values = {
        (task, method): generator.normal(25, 3, 9)
        for task in ("blur", "mask")
        for method in ("ours", "dps", "ddrm")
    }
    rows = [
        row(task, method, i, float(v))
        for (task, method), some in values.items()
        for i, v in reversed(list(enumerate(some)))
    ]
    rows.append(row("blur", "ours", 99, 1.0))  # of one side only
    rows.append(row("blur", "dps", 5, None, status="failed"))
    rows.append(row("elsewhere", "dps", 5, 3.0))  # a task of the others alone
    found = differences(frame(rows), "ours", 300)
    assert {(one.task, one.method) for one in found} == {
        (task, method) for task in ("blur", "mask") for method in ("dps", "ddrm")
    }
    for one in found:
        ours, other = values[one.task, "ours"], values[one.task, one.method]
        expected = scipy.stats.ttest_rel(ours, other)
        interval = expected.confidence_interval(0.95)
        assert one.images == 9
        assert one.p == pytest.approx(expected.pvalue)
        assert one.mean - one.half == pytest.approx(interval.low)
        assert one.mean + one.half == pytest.approx(interval.high)
    assert [one.corrected for one in found] == holm([one.p for one in found])
    with pytest.raises(ValueError, match="no ours with nfe 1000"):
        differences(frame(rows), "ours", 1000)


def test_seeds_are_averaged_and_a_single_image_has_no_interval():
    rows = [row("blur", "ours", 0, 20.0), row("blur", "ours", 0, 24.0, seed=1)]
    rows += [row("blur", "dps", 0, 21.0), row("blur", "dps", 0, 7.0, nfe=50)]
    found = differences(frame(rows), "ours", 300)
    assert [(one.nfe, one.mean) for one in found] == [(300, 1.0), (50, 15.0)]
    assert np.isnan([(one.half, one.p, one.corrected) for one in found]).all()

"""The records of :mod:`diffoc.experiments.ablations` as curves: Figures 3 and 6, Tables 4 to 6.

All functions but :func:`by_part` take rows and a metric, and give panel to line to curve, for
:func:`diffoc.figures.plots.quality_curves`. Rows that do not belong to the curve are left out, and
so are those without a result.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from diffoc.experiments.ablations import (
    BUDGETS,
    HORIZONS,
    NO_COST,
    NOISE_LEVELS,
    REGULARIZATIONS,
    TUNED,
)
from diffoc.experiments.inaccurate import IDENTITY, RANDOM, UNTRAINED, accurate_name
from diffoc.experiments.methods import METHODS
from diffoc.experiments.records import Row
from diffoc.experiments.summary import Curve, curves

Panels = dict[str, dict[str, Curve]]

CONSTANTS = tuple("Lemma 4.2" if a == "lemma_4_2" else f"{a:g}" for a in REGULARIZATIONS)
"""Tick labels of :func:`by_constant`."""

PRIORS = ("trained", *(f"noise {level:g}" for level in NOISE_LEVELS), "untrained", "random", "none")
"""Tick labels of :func:`by_prior`."""

EXACT, PROJECTED = "exact recursion", "Appendix D.1"

WHOLE = "all parts"
"""Ours, with all its parts, in :func:`by_part`."""


def equal_budgets(rows: Iterable[Row], metric: str) -> Panels:
    """DPS and ours over the budget of evaluations, task by task.

    A controller has its usual steps, which are those of its 200 evaluations, or a quarter of the
    budget where that is less.
    """
    rows = list(rows)
    tuned = {
        (row["task"], row["method"]): _settings(row)["steps"]
        for row in rows
        if row["nfe"] == str(BUDGETS[-2]) and row["method"] != "dps"
    }
    tasks = {task for task, _ in tuned}

    def belongs(row: Row, nfe: int, steps: int) -> bool:
        if row["method"] == "dps":
            return nfe in BUDGETS and nfe == steps and row["task"] in tasks
        usual = tuned.get((row["task"], row["method"]), 0)
        return nfe in BUDGETS and steps == min(usual, nfe // 4)

    return curves(((*found[:2], found[3], found[4]) for found in _steps(rows, belongs)), metric)


def equal_horizons(rows: Iterable[Row], metric: str) -> Panels:
    """DPS and ours over T, task by task; DPS has T evaluations, ours 300, or 4 T if more."""

    def belongs(row: Row, nfe: int, steps: int) -> bool:
        most = steps if row["method"] == "dps" else max(TUNED[1], 4 * steps)
        return steps in HORIZONS and nfe == most

    return curves(((*found[:3], found[4]) for found in _steps(rows, belongs)), metric)


def by_rank(rows: Iterable[Row], metric: str) -> Panels:
    """Over the rank, the exact recursion and Appendix D.1, task by task; rank 0 is in both."""
    keyed = []
    for row, settings in _paper(rows):
        if settings["weight_scale"] and settings["regularization"] == 1e-3:
            for name in (EXACT, PROJECTED):
                if settings["rank"] == 0 or settings["projected"] == (name == PROJECTED):
                    keyed.append((row["task"], name, float(settings["rank"]), row))
    return curves(keyed, metric)


def by_constant(rows: Iterable[Row], metric: str) -> Panels:
    """Over the places of :data:`CONSTANTS`, rank 0 and 1 of the exact recursion, task by task."""
    keyed = []
    for row, settings in _paper(rows):
        if settings["weight_scale"] and settings["rank"] < 2 and not settings["projected"]:
            place = REGULARIZATIONS.index(settings["regularization"])
            keyed.append((row["task"], f"rank {settings['rank']}", float(place), row))
    return curves(keyed, metric)


def by_part(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows of the grid `parts` by task and by what was taken away, :data:`WHOLE` where nothing."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    rows = [row for row in rows if row["method"] == "ours"]
    steps = Counter((row["task"], _settings(row).get("steps")) for row in rows)
    usual = {task: T for (task, T), _ in reversed(steps.most_common())}
    for row in rows:
        found[row["task"]][_part(_settings(row), usual[row["task"]])].append(row)
    return found


def by_prior(rows: Iterable[Row], metric: str, priors: Sequence[str] = PRIORS) -> Panels:
    """Over the places of `priors`, DPS, ours, and what needs no prior, task by task."""
    keyed = []
    for row in rows:
        name = prior_label(row["prior"])
        if name in priors:
            label = METHODS[row["method"]].label
            keyed.append((row["task"], label, float(priors.index(name)), row))
    return curves(keyed, metric)


def prior_label(name: str) -> str:
    """Which of :data:`PRIORS` a prior is."""
    for prefix, label in ((IDENTITY, "none"), (UNTRAINED, "untrained"), (RANDOM, "random")):
        if name.startswith(prefix):
            return label
    rest = name.removeprefix(accurate_name(name))
    return f"noise {rest.removeprefix('+noise')}" if rest else "trained"


def _settings(row: Row) -> dict:
    return json.loads(row["settings"])


def _part(settings: dict, usual_steps: int | None) -> str:
    if "in_units" in settings:
        return "not preconditioned"
    if "stopped" in settings:
        return "stopped at the noise level"
    if "weighted" in settings:
        return f"constant cost {settings['weight']:g}"
    if settings["weight"] == NO_COST:
        return "almost no cost"
    return WHOLE if settings.get("steps") == usual_steps else "T of STOPPED"


def _steps(
    rows: Iterable[Row], belongs: Callable[[Row, int, int], bool]
) -> Iterator[tuple[str, str, float, float, Row]]:
    """Task, label, steps and budget of the rows that belong."""
    for row in rows:
        nfe, steps = int(row["nfe"]), _settings(row).get("steps")
        if steps is not None and belongs(row, nfe, steps):
            yield row["task"], METHODS[row["method"]].label, float(steps), float(nfe), row


def _paper(rows: Iterable[Row]) -> Iterator[tuple[Row, dict]]:
    for row in rows:
        if row["method"] == "paper":
            yield row, _settings(row)

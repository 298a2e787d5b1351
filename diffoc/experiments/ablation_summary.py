"""The records of :mod:`diffoc.experiments.ablations` as curves: Figures 3 and 6, Tables 4 to 6.

Most functions take rows, as :func:`diffoc.experiments.records.rows_of` returns them, and a metric,
and map a panel to a line to its curve, for :func:`diffoc.figures.plots.quality_curves`. Rows that
do not belong to the curve are left out, and so are those without a result.
"""

import json
from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from diffoc.experiments import ablations
from diffoc.experiments.ablations import NO_COST, NOISE_LEVELS, REGULARIZATIONS, TASKS, Choice
from diffoc.experiments.inaccurate import IDENTITY, RANDOM, UNTRAINED, accurate_name
from diffoc.experiments.records import as_json
from diffoc.experiments.summary import Curve, by_budget, curves, labels, paired, select

Panels = dict[str, dict[str, Curve]]

Changes = dict[str, dict[str, tuple[float, float]]]
"""Maps a change to a task to a mean and half the width of its interval."""

CONSTANTS = tuple("Lemma 4.2" if a == "lemma_4_2" else f"{a:g}" for a in REGULARIZATIONS)
"""Tick labels of :func:`by_constant`."""

PRIORS = ("trained", *(f"noise {level:g}" for level in NOISE_LEVELS), "untrained", "random", "none")
"""Tick labels of :func:`by_prior`."""

EXACT, PROJECTED = "exact recursion", "Appendix D.1"

WHOLE = "all parts"
"""Ours, with all its parts, in :func:`by_part`."""

GUESS = "no plan, the guess alone"
"""Ours without a plan, in :func:`by_part`; with a colon, from which a part is taken away."""

TAKEN_AWAY = {
    "coloured": "the guess knows no colours",
    "dense": "steps uniform in time",
    "in_units": "not preconditioned",
    "stopped": "stopped at the noise level",
}
"""What :func:`by_part` calls a part that a setting of ours takes away."""

ONE_PART, OTHER_COST, OF_GUESS = "one part taken away", "another control cost", "guess alone"
"""The kinds of change in :func:`by_change`, the last of what is left without a plan."""

ROUGH = ", no smoothness"
"""After the label of a controller whose guess does not know that images are smooth."""

NOISE = ", from noise"
"""After the label of such a controller that starts from random noise."""

ALONE = ", guess alone"
"""After the label of a controller that makes no plan where there is no network."""


def equal_budgets(rows: pd.DataFrame, trials: pd.DataFrame, metric: str) -> Panels:
    """Draws :func:`at_equal_budgets` over the budget, task by task."""
    return by_budget(at_equal_budgets(rows, trials), metric)


def at_equal_budgets(rows: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of DPS, ours and the guess alone at equal budgets; `nfe` is the budget.

    A budget takes the settings of :func:`best_within`, of the trials of a method on a task. Where
    none fit, or these were not run, it takes those that the grid has for it.
    """
    found = []
    usual = _of_grid(rows, ablations.equal_budgets)
    for place, some in usual.groupby(["prior", "task", "method", "nfe"], sort=False):
        prior, task, method, nfe = place
        best = best_within(select(trials, task=task, method=method), nfe)
        taken = select(rows, prior=prior, task=task, method=method, settings=best)
        taken = taken.drop_duplicates(["image", "seed"])  # some settings are tuned for two budgets
        found.append((some if taken.empty else taken).assign(nfe=nfe))
    return pd.concat(found) if found else usual


def best_within(trials: pd.DataFrame, nfe: int) -> str | None:
    """Returns, of the settings that were tuned for any budget, the best that fit into one.

    The trials are those of a method on a task. Tuned for a budget are the settings with the highest
    mean PSNR, without a failure. They fit if no image took more than `nfe` evaluations. It is None
    if none fit.
    """
    places = trials.groupby(["nfe", "settings"])
    means = places["psnr"].agg(lambda some: some.mean(skipna=False)).dropna()
    tuned = means[means.groupby("nfe").idxmax()]
    fit = tuned[places["evaluations"].max()[tuned.index] <= nfe]
    return None if fit.empty else fit.idxmax()[1]


def equal_horizons(rows: pd.DataFrame, metric: str) -> Panels:
    """Draws DPS and ours over T, task by task; DPS has T evaluations, ours 300, or 4 T if more."""
    rows = _of_grid(rows, ablations.equal_horizons)
    place = rows["steps"].where(rows["method"] != "dps", rows["nfe"])
    return curves(rows.assign(place=place, label=labels(rows)), "task", "label", "place", metric)


def by_rank(rows: pd.DataFrame, metric: str) -> Panels:
    """Draws the exact recursion and Appendix D.1 over the rank, task by task; rank 0 is in both."""
    rows = select(rows, method="paper", regularization=1e-3)
    rows = rows[rows["weight_scale"] > 0]
    kinds = [
        rows[(rows["rank"] == 0) | (rows["projected"] == projected)].assign(kind=kind)
        for kind, projected in ((EXACT, False), (PROJECTED, True))
    ]
    return curves(pd.concat(kinds), "task", "kind", "rank", metric)


def by_constant(rows: pd.DataFrame, metric: str) -> Panels:
    """Draws rank 0 and 1 of the exact recursion over the places of :data:`CONSTANTS`."""
    rows = select(rows, method="paper", projected=False)
    rows = rows[(rows["weight_scale"] > 0) & (rows["rank"] < 2)]
    place = rows["regularization"].map(REGULARIZATIONS.index)
    line = "rank " + rows["rank"].astype(int).astype(str)
    return curves(rows.assign(place=place, line=line), "task", "line", "place", metric)


def by_part(rows: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Maps a task and what was taken away, or :data:`WHOLE`, to the rows of the grid `parts`."""
    parts = [_part(json.loads(text)) for text in rows["settings"]]
    ours = select(rows.assign(part=parts), method="ours").groupby("task", sort=False)
    return {task: dict(list(some.groupby("part", sort=False))) for task, some in ours}


def by_change(rows: pd.DataFrame, metric: str) -> dict[str, Changes]:
    """Maps a kind of change to a change to a task to what it does to a metric, with its interval.

    That is :func:`diffoc.experiments.summary.paired` with :data:`WHOLE`, or with the guess alone
    for what is taken away from that. Changes of a kind ascend by their sum over the tasks, so with
    a metric whose more is better the worst is first.
    """
    groups: dict[str, Changes] = {ONE_PART: {}, OTHER_COST: {}, OF_GUESS: {}}
    for task, found in by_part(rows).items():
        for label, some in found.items():
            alone = label.startswith(f"{GUESS}: ")
            kind = OF_GUESS if alone else OTHER_COST if " cost" in label else ONE_PART
            if label != WHOLE:
                of_task = groups[kind].setdefault(label.removeprefix(f"{GUESS}: "), {})
                of_task[task] = paired(some, found[GUESS if alone else WHOLE], metric)
    return {
        kind: dict(sorted(changes.items(), key=lambda one: sum(m for m, _ in one[1].values())))
        for kind, changes in groups.items()
    }


def by_prior(rows: pd.DataFrame, metric: str, priors: Sequence[str] = PRIORS) -> Panels:
    """Draws each method over the places of `priors`, task by task."""
    places = {name: place for place, name in enumerate(priors)}
    nothing = pd.Series(float("nan"), rows.index)
    rough = rows.get("smoothness", nothing).eq(0)
    noisy = rows.get("from_noise", nothing).eq(True)
    named = labels(rows) + rough.map({True: ROUGH, False: ""})
    named = named.where(~noisy, labels(rows) + NOISE)
    kinds = rows["prior"].map(prior_label)
    alone = kinds.eq("none") & rows.get("iterations", nothing).eq(0) & rows["method"].eq("ours")
    rows = rows.assign(place=kinds.map(places), label=named.where(~alone, labels(rows) + ALONE))
    return curves(rows, "task", "label", "place", metric)


def prior_label(name: str) -> str:
    """Returns which of :data:`PRIORS` a prior is."""
    for prefix, label in ((IDENTITY, "none"), (UNTRAINED, "untrained"), (RANDOM, "random")):
        if name.startswith(prefix):
            return label
    rest = name.removeprefix(accurate_name(name))
    return f"noise {rest.removeprefix('+noise')}" if rest else "trained"


def _of_grid(rows: pd.DataFrame, grid: Callable[..., Iterator[Choice]]) -> pd.DataFrame:
    """Returns the rows of a grid of :mod:`diffoc.experiments.ablations`, in its order."""
    cells: dict[tuple, int] = {}
    for prior, name in rows[["prior", "task"]].drop_duplicates().itertuples(index=False):
        for used, task, method, nfe, settings in grid(prior, [name] if name in TASKS else []):
            cells.setdefault((used, task, method, nfe, as_json(settings)), len(cells))
    keys = rows[["prior", "task", "method", "nfe", "settings"]].itertuples(index=False, name=None)
    place = pd.Series([cells.get(key, -1) for key in keys], rows.index)
    return rows.loc[place[place >= 0].sort_values(kind="stable").index]


def _part(settings: dict) -> str:
    change = _change(settings)
    if settings.get("iterations") == 0:
        return GUESS if change == WHOLE else f"{GUESS}: {change}"
    return change


def _change(settings: dict) -> str:
    if settings.get("smoothness") == 0:
        return "the guess knows no smoothness"
    for key, label in TAKEN_AWAY.items():
        if key in settings:
            return label
    if "weighted" in settings:
        return f"constant cost {settings['weight']:g}"
    return "almost no cost" if settings.get("weight") == NO_COST else WHOLE

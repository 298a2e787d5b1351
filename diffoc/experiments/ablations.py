"""Experiments beside the tables as grids of cells: few steps, rank, a wrong score, our own parts.

A tuned setting has the value that was best on the tuning faces for a cell's budget, with its own
prior or else that of the colour faces; or that for 300 evaluations, if none was tuned for it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from diffoc import recipe
from diffoc.baselines import Share
from diffoc.baselines.cold import iterations_within
from diffoc.baselines.paper import TABLE_2
from diffoc.checks import check_member
from diffoc.experiments.inaccurate import IDENTITY, RANDOM, UNTRAINED, accurate_name
from diffoc.experiments.methods import METHODS, read_tuned
from diffoc.experiments.records import Cell, as_json, in_batches
from diffoc.problems.tasks import TASKS as ALL_TASKS
from diffoc.recipe import COLD

TASKS = recipe.TASKS[:2]
"""The tasks of the grids, and of the paper's Tables 4 to 6."""

TUNED = ("faces64", 300)
"""The prior and the budget whose tuned values stand in where a cell has none of its own."""

HORIZONS = (5, 10, 20, 50, 100, 200)
"""T, as in Figure 3 and Table 6."""

BUDGETS = (20, 50, 100, 200, 300)
"""The numbers of evaluations for which each method is tuned."""

RANKS = (0, 1, 4, 16)
REGULARIZATIONS = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, "lemma_4_2")
"""Tikhonov's constants a of Tables 4 and 5."""

NOISE_LEVELS = (0.1, 0.2)
"""The levels of the weights' noise, relative to their root mean square."""

CONSTANT_COSTS = (0.3, 3.0, 30.0, 100.0, 300.0)
"""The values of r for ours with one control cost r at all steps in place of the weighted one."""

NO_COST = 1e-6
"""The weight w for ours almost without a control cost: zero would make Quu singular."""

Choice = tuple[str, str, str, int, dict]
"""Prior, task, method, budget and settings of a cell."""


def equal_budgets(prior: str, tasks: Sequence[str]) -> Iterator[Choice]:
    """Yields DPS and ours with equal numbers of evaluations, each as it was tuned for that.

    The guess alone, as tuned for 300, takes half of its evaluations as steps.
    """
    for name, nfe in product(tasks, BUDGETS):
        yield prior, name, "dps", nfe, _tuned(prior, "dps", name, nfe)
        yield prior, name, "ours", nfe, _tuned(prior, "ours", name, nfe)
        quick = _tuned(prior, "quick", name, nfe)
        yield prior, name, "quick", nfe, quick | {"steps": nfe // 2}


def equal_horizons(prior: str, tasks: Sequence[str]) -> Iterator[Choice]:
    """Yields Figure 3 and Table 6, the same T: DPS has T evaluations, ours 300, or 4 T if more.

    How many steps DPS makes of its T evaluations was tuned. Ours appears with the greedy guess and
    without it, and as the guess alone, which has 2 T.
    """
    for name, steps in product(tasks, HORIZONS):
        some, nfe = {"steps": steps}, max(TUNED[1], 4 * steps)
        yield prior, name, "dps", steps, _tuned(prior, "dps", name, steps)
        yield prior, name, "ours", nfe, _tuned(prior, "ours", name, nfe) | some
        yield prior, name, "quick", 2 * steps, _tuned(prior, "quick", name, 2 * steps) | some
        some["iterations"] = iterations_within(nfe, steps)
        yield prior, name, "cold", nfe, _tuned(prior, "cold", name, nfe) | some


def few_steps(prior: str, tasks: Sequence[str]) -> Iterator[Choice]:
    """Yields equal budgets, then equal T: the two grids above."""
    yield from equal_budgets(prior, tasks)
    yield from equal_horizons(prior, tasks)


def rank(prior: str, tasks: Sequence[str]) -> Iterator[Choice]:
    """Yields Tables 4 and 5: one setting of the paper varied, with ten steps and 20 iterations.

    The terminal Hessian of rank k, propagated exactly or by the projections of Appendix D.1, and
    Tikhonov's constant a. With a = 0 and no control cost, Eq. 28, Quu has only rank k: that
    cell fails, as the paper says. With the control cost Quu stays regular. The first order has
    nothing to project, and Adam makes its constant irrelevant, see
    :func:`diffoc.baselines.paper.paper`.
    """
    steps, iterations = 10, 20
    changes: list[dict] = [{"regularization": a} for a in REGULARIZATIONS]
    changes += [{"regularization": 0, "weight_scale": 0.0}]
    changes += [{"regularization": a, "rank": 0} for a in (0, 1)]
    pairs = product(RANKS, (False, True))
    changes += [{"rank": k, "projected": p} for k, p in pairs if k or not p]
    for name, change in product(tasks, changes):
        usual = TABLE_2[name] | {"steps": steps, "iterations": iterations, "projected": False}
        yield prior, name, "paper", steps * iterations, usual | change


def published(prior: str, tasks: Sequence[str]) -> Iterator[Choice]:
    """Yields Tables 4 to 6 and Figure 3 by the paper's algorithm at its settings for NFE 1000.

    The rank k, Tikhonov's constant a, and the number of steps T vary one at a time, with the 50
    iterations that the paper fixes and, for k and T, with as many as make the work equal: an
    iteration has T evaluations and T (1 + k) products, which cost as much each.
    """
    for name in tasks:
        usual = METHODS["paper"].settings(name, 1000) | {"keep_activations": True}
        steps, iterations = usual["steps"], usual["iterations"]
        changes: list[dict] = [{"regularization": a} for a in REGULARIZATIONS]
        changes += [{"regularization": 0, "weight_scale": 0.0}]
        for k in RANKS:
            work = round(iterations * (2 + usual["rank"]) / (2 + k))
            changes += [{"rank": k}, {"rank": k, "iterations": work}]
        for T in (5, 10, 20, 50):
            changes += [{"steps": T}, {"steps": T, "iterations": iterations * steps // T}]
            changes += [{"steps": T, "rank": 0}]
        for change in changes:
            settings = usual | change
            nfe = settings["steps"] * settings["iterations"]
            yield prior, name, "paper", nfe, settings


def robustness(
    prior: str, tasks: Sequence[str], trained: bool = True, nfe: int = TUNED[1]
) -> Iterator[Choice]:
    """Yields Figure 6: methods with copies of a prior that are wrong, and what needs no prior.

    Ours appears with its guess, which knows that images are smooth, with one that does not, and
    with that from random noise, where the paper's and the released algorithm start. These two have
    their own settings for NFE 1000, and are left out with another budget than 300, for which DPS
    and ours are tuned. Without a network ours appears as it is and as the guess alone. Where there
    are no trained weights, all priors have random ones.
    """
    if trained:
        wrong = [prior, *(f"{prior}+noise{level:g}" for level in NOISE_LEVELS), UNTRAINED + prior]
    else:
        wrong = [UNTRAINED + prior, RANDOM + prior]
    for name in tasks:
        ours = _tuned(prior, "ours", name, nfe)
        for used in wrong:
            yield used, name, "dps", nfe, _tuned(prior, "dps", name, nfe)
            yield used, name, "ours", nfe, ours
            rough = ours | {"smoothness": 0.0}
            yield used, name, "ours", nfe, rough
            yield used, name, "ours", nfe, rough | {"from_noise": True}
            if nfe == TUNED[1]:
                settings = METHODS["paper"].settings(name, 1000) | {"keep_activations": True}
                yield used, name, "paper", 1000, settings
                yield used, name, "released", 1000, METHODS["released"].settings(name, 1000)
        none = IDENTITY + prior
        steps = {"iterations": iterations_within(nfe, COLD.steps)}
        yield none, name, "cold", nfe, _tuned(prior, "cold", name, nfe) | steps
        yield none, name, "ours", nfe, ours
        yield none, name, "ours", nfe, ours | {"iterations": 0}
        yield none, name, "deep_image_prior", nfe, {}


def parts(prior: str, tasks: Sequence[str]) -> Iterator[Choice]:
    """Yields ours, not stopped, and the same with one of its parts taken away, at 300 evaluations.

    The weighted control cost is replaced by several constant ones and by almost none, so that it
    can be compared with the best of these. The guess alone appears with and without each part.
    """
    nfe = TUNED[1]
    for name in tasks:
        usual = _tuned(prior, "ours", name, nfe)
        changes: list[dict] = [{}, {"iterations": 0}, {"smoothness": 0.0}, {"in_units": False}]
        changes += [{"coloured": False}, {"dense": False}, {"stopped": True}, {"weight": NO_COST}]
        changes += [{"weighted": False, "weight": r} for r in CONSTANT_COSTS]
        of_guess: list[dict] = [{"smoothness": 0.0}, {"coloured": False}, {"dense": False}]
        changes += [{"iterations": 0} | part for part in of_guess]
        for change in changes:
            yield prior, name, "ours", nfe, usual | change


ABLATIONS: dict[str, Callable[..., Iterator[Choice]]] = {
    grid.__name__: grid for grid in (few_steps, rank, published, robustness, parts)
}
"""The grids by name."""


def ablation_cells(
    table: str,
    prior: str,
    images: Sequence[str],
    batch: int,
    precision: str,
    *,
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    trained: bool = True,
    nfe: int | None = None,
) -> list[Cell]:
    """Returns the cells of one of :data:`ABLATIONS`, each once.

    The tasks must be tuned for 300 evaluations; the methods are those to keep, by default all.
    Only `robustness` can do without trained weights, and takes a budget, as 300 evaluations may
    take too long. Other arguments are those of :func:`diffoc.experiments.cells.cells_of`.
    """
    for name in tasks:
        check_member(ALL_TASKS, tasks=name)
    if not trained and table != "robustness":
        raise ValueError(f"table is {table!r}, which needs trained weights")
    if nfe is not None and (table != "robustness" or nfe < 4):
        raise ValueError(f"nfe is {nfe}: only robustness takes a budget, of at least 4")
    options = {"trained": trained, "nfe": nfe or TUNED[1]} if table == "robustness" else {}
    choices = list(ABLATIONS[table](prior, tasks, **options))
    known = {choice[2] for choice in choices}
    if methods is not None and not set(methods) <= known:
        raise ValueError(f"methods is {list(methods)}, expected some of {', '.join(sorted(known))}")
    cells = [
        Cell(used, precision, name, method, nfe, as_json(settings), seed, some)
        for used, name, method, nfe, settings in choices
        if methods is None or method in methods
        for seed in seeds
        for some in in_batches(images, batch)
    ]
    return list(dict.fromkeys(cells))


def _tuned(prior: str, method: str, task: str, nfe: int) -> dict:
    """Returns a method's settings, tuned for the budget or, where they fit it, for 300."""
    settings = METHODS[method].settings(task, nfe)
    tuned = read_tuned()
    own = tuned.get(accurate_name(prior), {}).get(method, {}).get(task)
    own = own or tuned.get(TUNED[0], {}).get(method, {}).get(task)
    if not own:
        raise ValueError(
            f"tasks has {task!r}, for which {method} is not tuned with {TUNED[0]}: leave it out"
        )
    if str(nfe) in own:
        return settings | own[str(nfe)]
    # Steps that are a share of 300 evaluations are none of another budget.
    trials = METHODS[method].tuned or {}
    shares = {key for key, some in trials.items() if any(isinstance(v, Share) for v in some)}
    settings |= {key: value for key, value in own[str(TUNED[1])].items() if key not in shares}
    if "steps" in settings:
        settings["steps"] = min(settings["steps"], nfe // METHODS[method].per_step(settings))
    return settings

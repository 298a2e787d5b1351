"""The subcommands that make, read and draw tables: run, tune, check, table, figures, digits."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

from torch import Tensor

from diffoc.checks import check_member
from diffoc.data.files import try_file, try_folder
from diffoc.data.manifest import data_folder
from diffoc.data.pictures import picture_names
from diffoc.data.provenance import ROOT
from diffoc.experiments import cells as experiments
from diffoc.experiments import class_guidance, methods, paper_tables, records, runs
from diffoc.experiments.ablations import TASKS, ablation_cells
from diffoc.experiments.inaccurate import UNTRAINED
from diffoc.experiments.methods import METHODS
from diffoc.experiments.protocol import protocol_of
from diffoc.experiments.records import Cell
from diffoc.experiments.summary import summarise
from diffoc.figures import figure_folder, paper
from diffoc.problems.perceptual import missing_metrics

NFE = 300
"""The usual budget of evaluations."""

OUTWARD = 4
"""How often `tune` goes a step beyond the edge of a grid where the best setting lies at it."""

Place = tuple[str, str, int]
"""A task, a method and a budget."""


def run(args: argparse.Namespace) -> int:
    """Computes what a table does not have yet, once it has said how long that takes."""
    if args.images:
        images = picture_names(args.images)
    elif args.table == "table1":
        images = list(protocol_of(args.prior).held_out)
    else:
        images = experiments.few_faces()
    prior, cells = _cells(args, images[-args.last :])
    folder = ROOT / "build" if args.random_weights else ROOT / "data" / "records"
    path = args.out or folder / f"{args.table}_{as_file_name(prior)}.csv"
    compute = experiments.Computer(args.images and args.images.resolve(), args.device)
    for name, reason in missing_metrics().items():
        print(f"note: no {name}: {reason}")
    return execute(cells, compute, path, args, args.keep and experiments.keep_in(args.keep))


def _cells(args: argparse.Namespace, images: Sequence[str]) -> tuple[str, list[Cell]]:
    prior = UNTRAINED * args.random_weights + args.prior
    experiments.load_once(prior, args.device)  # that there is none is said first
    batch, precision = args.batch or (1 if "256" in args.prior else 8), _precision(args)
    if args.table == "table1":
        tasks, budgets = args.tasks or paper_tables.TASKS, args.nfe or [NFE]
        names = args.methods or methods.compared(args.prior, min(budgets))
        changes, cost = _settings(args, names), _product_cost(args)
        return prior, experiments.cells_of(
            prior, tasks, names, budgets, args.seeds, images, batch, precision, changes, cost
        )
    if args.equal_work:
        raise ValueError(f"equal-work is set, but the grid of {args.table} has budgets of its own")
    if args.set:
        raise ValueError(f"set is given, but the grid of {args.table} has its own")
    if args.random_weights and args.table != "robustness":
        raise ValueError(f"random-weights is set, but the grid of {args.table} needs trained ones")
    if args.nfe and (args.table != "robustness" or len(args.nfe) > 1):
        raise ValueError(f"nfe is {args.nfe}: of the grids only robustness takes one, a single one")
    return prior, ablation_cells(
        args.table,
        args.prior,
        images,
        batch,
        precision,
        tasks=args.tasks or TASKS,
        methods=args.methods,
        seeds=args.seeds,
        trained=not args.random_weights,
        nfe=args.nfe[0] if args.nfe else None,
    )


def check(args: argparse.Namespace) -> int:
    """Computes the cells of random rows again; 1 if a number differs."""
    compute = experiments.Computer(args.images and args.images.resolve(), args.device)
    checked = runs.check(args.records, compute, args.rows, args.seed, args.device)
    for line in checked.differences:
        print(line)
    for place, allowed in sorted(checked.tolerances.items()):
        print(f"{', '.join(place)}: PSNR may be off by {allowed:.3g} dB on another machine")
    print(
        f"{checked.rows} rows computed again, {checked.exact} on the same machine and versions (to "
        f"the last digit), {checked.rows - checked.exact} elsewhere (within the tolerance): "
        f"{len(checked.differences)} differences"
    )
    return int(bool(checked.differences))


def table(args: argparse.Namespace) -> int:
    """Prints means with their 95 % intervals."""
    print(summarise(records.rows_of(args.records)))
    return 0


def figures(args: argparse.Namespace) -> int:
    """Draws every figure whose data exist, and prints the files."""
    try_folder(args.out or figure_folder() / "print")
    for path in paper.write_all(args.out):
        print(path)
    return 0


def digits(args: argparse.Namespace) -> int:
    """Makes Figure 5's experiment; the images go to build/digits/PRIOR."""
    if args.samples < 2:
        raise ValueError(f"samples is {args.samples}, expected at least 2")
    path = args.out or ROOT / "data/records/digits_mnist.csv"
    pictures = ROOT / "build" / "digits" / args.prior.replace("/", "-")
    try_file(path)
    try_folder(pictures)
    class_guidance.record(path, pictures, args.samples, name=args.prior)
    return 0


def tune(args: argparse.Namespace) -> int:
    """Tries settings of each method on the tuning images, and writes down the best by mean PSNR.

    Where the best of a whole grid lies at its edge, settings outside are tried, too: those of
    :meth:`diffoc.baselines.Method.outward`, `OUTWARD` times at most. The best go to
    `data/tuned.json`, from which the tables run, or to a file beside the records if the settings or
    images are not the protocol's.
    """
    path = args.out or ROOT / "data" / "records" / f"tuning_{as_file_name(args.prior)}.csv"
    own = args.set or (args.images and protocol_of(args.prior).tuning)
    choices = path.with_suffix(".tuned.json") if own else data_folder() / "tuned.json"
    try_file(choices)
    experiments.load_once(args.prior, args.device)  # that there is none is said first
    names = args.methods or methods.compared(args.prior, min(args.nfe or [NFE]))
    plan, given = _trials(args, names), _settings(args, names)
    for method in names:
        if tried := methods.of_method(given, method).keys() & METHODS[method].trials(NFE)[0].keys():
            raise ValueError(f"set has {min(tried)}, but tune tries values of that for {method}")
    status, new = 0, plan
    for times in range(1 + OUTWARD):
        cells = [cell for place in new for cell in _trial_cells(args, given, place, new[place])]
        compute = experiments.Computer(args.images and args.images.resolve(), args.device)
        status |= execute(cells, compute, path, args)
        best = _best(args, given, plan, path)
        beyond = {
            (task, method, nfe): METHODS[method].outward(chosen, plan[task, method, nfe], nfe)
            for (task, method, nfe), chosen in best.items()
            if chosen
        }
        new = {place: some for place, some in beyond.items() if some and _whole_grid(args, *place)}
        if not new or times == OUTWARD:
            break
        plan = {place: [*trials, *new.get(place, [])] for place, trials in plan.items()}
    tuned = methods.read_tuned(choices)
    for (task, method, nfe), chosen in best.items():
        if chosen is None:
            print(f"{method}, {task}, nfe {nfe}: every trial failed")
            continue
        place = tuned.setdefault(args.prior, {}).setdefault(method, {})
        place.setdefault(task, {})[str(nfe)] = chosen
        at_edge = beyond.get((task, method, nfe))
        said = ", ".join(f"{key} {value:g}" for key, value in chosen.items()) or "unsupported"
        print(f"{method}, {task}, nfe {nfe}: {said}{' (at the edge)' if at_edge else ''}")
    methods.write_tuned(tuned, choices)
    print(choices)
    return status


def _trial_cells(
    args: argparse.Namespace, given: dict, place: Place, trials: Sequence[dict]
) -> list[Cell]:
    """Returns the cell of each trial."""
    images = picture_names(args.images) if args.images else None
    settings = [methods.of_method(given, place[1]) | trial for trial in trials]
    return experiments.tuning_cells(args.prior, *place, settings, _precision(args), images)


def _best(
    args: argparse.Namespace, given: dict, plan: Mapping[Place, list[dict]], path: Path
) -> dict[Place, dict | None]:
    """Returns the best of the trials by place, once they are all recorded.

    It is None where every trial failed, and empty where the method does not do the task.
    """
    known, best = records.by_image(records.read(path)), {}
    for place, trials in plan.items():
        cells = _trial_cells(args, given, place, trials)
        rows = [[known[one] for one in records.alone(cell)] for cell in cells]
        chosen = experiments.best_trial(rows)
        failed = any(row["status"] == "failed" for some in rows for row in some)
        best[place] = trials[chosen] if chosen is not None else None if failed else {}
    return best


def _whole_grid(args: argparse.Namespace, task: str, method: str, nfe: int) -> bool:
    """Returns whether all of a method's trials are tried, and not those around an earlier best."""
    return nfe <= NFE or bool(args.images) or not methods.takes(method, task, NFE)


def _trials(args: argparse.Namespace, names: Sequence[str]) -> dict[Place, list[dict]]:
    """Returns the settings to try by task, method and budget.

    With the usual budget, a smaller one, the only one that a method can have, or images of one's
    own, all its trials are tried; with a larger budget those around the best of them.
    """
    cost, plan = _product_cost(args), {}
    tasks, budgets = args.tasks or paper_tables.TASKS, args.nfe or [NFE]
    for method, task, asked in product(names, tasks, budgets):
        check_member(METHODS, method=method)
        if not METHODS[method].tuned:
            raise ValueError(f"method is {method!r}, which has nothing to tune")
        nfe = asked if cost is None else methods.equal_work(method, task, asked, cost)
        known = methods.read_tuned().get(args.prior, {}).get(method, {}).get(task, {}).get(str(NFE))
        if _whole_grid(args, task, method, nfe):
            plan[task, method, nfe] = METHODS[method].trials(nfe)
        elif known and known.keys() == METHODS[method].trials(NFE)[0].keys():
            plan[task, method, nfe] = METHODS[method].trials_near(known, NFE, nfe)
        else:
            raise ValueError(
                f"method {method} is not tuned for {task} with {args.prior} and nfe {NFE}, which "
                f"nfe {nfe} starts from: run `python -m diffoc tune {method}` first"
            )
    return plan


def _precision(args: argparse.Namespace) -> str:
    """Returns the protocol's precision, where it has one, or the one asked for."""
    usual = protocol_of(args.prior).precision
    if usual and args.precision not in (None, usual):
        raise ValueError(f"precision is {args.precision!r}, but the protocol has {usual!r}")
    return usual or args.precision or "float32"


def _product_cost(args: argparse.Namespace) -> float | None:
    """Returns what a product costs, where equal work is asked for, else None."""
    cost = protocol_of(args.prior).product_cost
    if args.equal_work and cost is None:
        raise ValueError(f"equal-work is set, but the protocol of {args.prior} has no cost")
    return cost if args.equal_work else None


def _settings(args: argparse.Namespace, names: Sequence[str]) -> dict[str, object]:
    """Returns what --set gives, once each of it is for one of the methods, and given once."""
    keys = [key for key, _ in args.set]
    for key in keys:
        method, dot, _ = key.partition(".")
        if dot and method not in names:
            raise ValueError(f"set has {key}, but the methods are {', '.join(names)}")
        if keys.count(key) > 1:
            raise ValueError(f"set has {key} twice: give one value")
    return dict(args.set)


def execute(
    cells: Sequence[Cell],
    compute: experiments.Computer,
    path: Path,
    args: argparse.Namespace,
    keep: Callable[[Cell, Tensor], None] | None = None,
) -> int:
    """Says what is planned, and does it; 1 if a cell failed."""
    if not cells:
        raise ValueError(f"images is missing: name a folder of pictures for {args.prior}")
    try_file(path)
    if args.keep:
        try_folder(args.keep)
    counts = fill(cells, compute, path, args, keep, str(path), _print_plan)
    if counts["failed"]:
        print("those that failed are computed again with --retry-failed")
    return int(counts["failed"] > 0)


def fill(
    cells: Sequence[Cell],
    compute: experiments.Computer,
    path: Path,
    args: argparse.Namespace,
    keep: Callable[[Cell, Tensor], None] | None,
    title: str,
    plan: Callable[[Sequence[Cell], int, argparse.Namespace], None] = lambda *_: None,
) -> dict[str, int]:
    """Computes what a table does not have once its inputs are there; counts cells by status."""
    left = runs.unfinished(cells, path, args.shard, args.retry_failed)
    # Without a folder pictures are a data set, which a table that has everything does not need.
    experiments.check_recorded(cells, compute, path, bool(left or compute.folder))
    experiments.check_inputs(left, compute)
    plan(left, len(cells), args)
    counts = runs.run_cells(
        cells,
        compute,
        path,
        jobs=args.jobs,
        backend=args.backend,
        shard=args.shard,
        retry_failed=args.retry_failed,
        device=args.device,
        keep=keep,
        work=lambda cell: experiments.work_of(cell)[0],
    )
    print(f"{title}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return counts


def _print_plan(left: Sequence[Cell], cells: int, args: argparse.Namespace) -> None:
    if not left:
        print(f"{cells} cells, none of them to compute")
        return
    images = sum(len(cell.images) for cell in left)
    hours, evaluations = 0.0, 0
    for batch in dict.fromkeys(len(cell.images) for cell in left):
        one, back = experiments.time_prior(left[0].prior, batch, _precision(args), args.device)
        works = [experiments.work_of(cell) for cell in left if len(cell.images) == batch]
        evaluations += sum(work[0] for work in works)
        hours += sum(work[0] * one + work[1] * back for work in works) / 3600
    print(f"{len(left)} cells to compute, of {cells}: {images} images, {evaluations:,} evaluations")
    kind = "GPU-hours" if args.device.startswith("cuda") else "hours of one worker"
    print(
        f"estimated {hours:.2g} {kind}, {hours / args.jobs:.2g} hours with {args.jobs} jobs "
        f"(an evaluation {one:.3g} s, a product {back:.3g} s an image, measured here)"
    )
    if args.keep:
        prior, _ = experiments.load_once(left[0].prior, args.device)
        print(f"reconstructions: at most {math.prod(prior.image_shape) * images / 1e6:,.1f} MB")


def as_file_name(prior: str) -> str:
    """Returns a prior's name or path as part of a file's name, which stays in its folder."""
    return prior.replace(" ", "_").replace("/", "_")

"""The subcommands that make, read and draw tables: run, tune, check, table, figures, digits."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from diffoc.data.files import try_file, try_folder
from diffoc.data.manifest import data_folder
from diffoc.data.pictures import picture_names
from diffoc.data.provenance import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from diffoc.experiments.cells import Computer
    from diffoc.experiments.records import Cell

NFE = 300
"""The usual budget of evaluations."""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds them to a command line."""
    run_ = commands.add_parser("run", help="compute the records of a table, or what is missing")
    run_.add_argument(
        "table",
        choices=["table1", "few_steps", "rank", "published", "robustness", "parts"],
        help="with Table 3's metrics; the others are grids of diffoc.experiments.ablations",
    )
    _add_grid(run_)
    run_.add_argument("--methods", nargs="+", help="by default the table's")
    run_.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_.add_argument("--last", type=int, default=1000, metavar="N", help="images only, at most")
    run_.add_argument("--batch", type=int, metavar="N", help="images at once; 1 from 256 pixels on")
    run_.add_argument("--shard", type=shard, metavar="I/N", help="one part, in a file of its own")
    run_.add_argument("--keep", type=Path, metavar="DIR", help="write reconstructions there")
    run_.add_argument("--random-weights", action="store_true", help="for a trial without weights")
    check_ = commands.add_parser("check", help="compute some records again: 1 if they differ")
    check_.add_argument("records", type=Path, metavar="CSV")
    check_.add_argument("--rows", type=int, default=5)
    check_.add_argument("--seed", type=int, default=0, help="of their choice")
    check_.add_argument("--images", type=Path, metavar="DIR")
    check_.add_argument("--device", default="cpu", help="cpu or cuda")
    tune_ = commands.add_parser("tune", help="tune methods on faces that are in no table")
    tune_.add_argument("methods", nargs="*", metavar="METHOD", help="by default the table's")
    _add_grid(tune_)
    tune_.set_defaults(shard=None, keep=None)
    table_ = commands.add_parser("table", help="print the means of records")
    table_.add_argument("records", type=Path, metavar="CSV")
    figures_ = commands.add_parser("figures", help="draw the figures for print, of what was run")
    figures_.add_argument("--out", type=Path, metavar="DIR", help="by default figures/print")
    digits_ = commands.add_parser("digits", help="make digits from labels, and their records")
    digits_.add_argument("--samples", type=int, default=100, help="of each label and way")
    digits_.add_argument("--out", type=Path, metavar="CSV")
    parsers = (run_, tune_, check_, table_, figures_, digits_)
    for parser, function in zip(parsers, (run, tune, check, table, figures, digits), strict=True):
        parser.set_defaults(function=function)


def run(args: argparse.Namespace) -> int:
    """Computes what a table does not have yet, once it has said how long that takes."""
    from diffoc.experiments import cells as experiments
    from diffoc.experiments.protocol import protocol_of
    from diffoc.problems.perceptual import missing_metrics

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
    """Returns the name of the prior, and the grid."""
    from diffoc.experiments import cells as experiments
    from diffoc.experiments.ablations import TASKS, ablation_cells
    from diffoc.experiments.inaccurate import UNTRAINED
    from diffoc.experiments.methods import compared

    prior = UNTRAINED * args.random_weights + args.prior
    experiments.load_once(prior, args.device)  # that there is none is said first
    batch = args.batch or (1 if "256" in args.prior else 8)
    if args.table == "table1":
        tasks, budgets = args.tasks or experiments.TABLES["table1"], args.nfe or [NFE]
        methods = args.methods or compared(args.prior, min(budgets))
        return prior, experiments.cells_of(
            prior,
            tasks,
            methods,
            budgets,
            args.seeds,
            images,
            batch,
            _precision(args),
            _settings(args, methods),
            _product_cost(args),
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
        _precision(args),
        tasks=args.tasks or TASKS,
        methods=args.methods,
        seeds=args.seeds,
        trained=not args.random_weights,
        nfe=args.nfe[0] if args.nfe else None,
    )


def check(args: argparse.Namespace) -> int:
    """Computes the cells of random rows again; 1 if a number differs."""
    from diffoc.experiments import cells as experiments
    from diffoc.experiments import runs

    compute = experiments.Computer(args.images and args.images.resolve(), args.device)
    found = runs.check(args.records, compute, args.rows, args.seed, args.device)
    for line in found.differences:
        print(line)
    for place, allowed in sorted(found.tolerances.items()):
        print(f"{', '.join(place)}: PSNR may be off by {allowed:.3g} dB on another machine")
    print(
        f"{found.rows} rows computed again, {found.exact} on the same machine and versions (to "
        f"the last digit), {found.rows - found.exact} elsewhere (within the tolerance): "
        f"{len(found.differences)} differences"
    )
    return int(bool(found.differences))


def table(args: argparse.Namespace) -> int:
    """Prints means with their 95 % intervals."""
    from diffoc.experiments.records import rows_of
    from diffoc.experiments.summary import summarise

    print(summarise(rows_of(args.records)))
    return 0


def figures(args: argparse.Namespace) -> int:
    """Draws every figure whose data exist, and prints the files."""
    from diffoc.figures import figure_folder
    from diffoc.figures.paper import write_all

    try_folder(args.out or figure_folder() / "print")
    for path in write_all(args.out):
        print(path)
    return 0


def digits(args: argparse.Namespace) -> int:
    """Makes Figure 5's experiment; the images go to build/digits."""
    from diffoc.experiments import class_guidance

    if args.samples < 2:
        raise ValueError(f"samples is {args.samples}, expected at least 2")
    path, pictures = args.out or ROOT / "data/records/digits_mnist.csv", ROOT / "build" / "digits"
    try_file(path)
    try_folder(pictures)
    class_guidance.record(path, pictures, args.samples)
    return 0


def shard(text: str) -> tuple[int, int]:
    """Reads I/N, with 1 <= I <= N."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i = n = 0
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 1/4")
    return i, n


def tune(args: argparse.Namespace) -> int:
    """Tries settings of each method on the tuning faces, and writes down the best by mean PSNR."""
    from diffoc.experiments import cells as experiments
    from diffoc.experiments.methods import METHODS, compared, of_method, read_tuned, write_tuned
    from diffoc.experiments.records import read
    from diffoc.experiments.runs import alone, by_image

    try_file(data_folder() / "tuned.json")
    experiments.load_once(args.prior, args.device)  # that there is none is said first
    methods = args.methods or compared(args.prior, min(args.nfe or [NFE]))
    plan, given = _trials(args, methods), _settings(args, methods)
    for method in methods:
        if tried := of_method(given, method).keys() & METHODS[method].trials(NFE)[0].keys():
            raise ValueError(f"set has {min(tried)}, but tune tries values of that for {method}")
    images = picture_names(args.images) if args.images else None
    path = args.out or ROOT / "data" / "records" / f"tuning_{as_file_name(args.prior)}.csv"
    cells = {
        place: experiments.tuning_cells(
            args.prior,
            *place,
            [of_method(given, place[1]) | trial for trial in trials],
            _precision(args),
            images,
        )
        for place, trials in plan.items()
    }
    compute = experiments.Computer(args.images and args.images.resolve(), args.device)
    status = execute([cell for some in cells.values() for cell in some], compute, path, args)
    known, tuned = by_image(read(path)), read_tuned()
    for (task, method, nfe), trials in plan.items():
        rows = [[known[one] for one in alone(cell)] for cell in cells[task, method, nfe]]
        best = experiments.best_trial(rows)
        if best is None and any(some[0]["status"] == "failed" for some in rows):
            print(f"{method}, {task}, nfe {nfe}: every trial failed")
            continue
        chosen = {} if best is None else trials[best]
        place = tuned.setdefault(args.prior, {}).setdefault(method, {})
        place.setdefault(task, {})[str(nfe)] = chosen
        values = [trial[next(iter(METHODS[method].tuned or {}))] for trial in trials]
        first = next(iter(chosen.values()), None)
        edge = " (at the edge)" if first in (min(values), max(values)) else ""
        said = ", ".join(f"{key} {value:g}" for key, value in chosen.items()) or "unsupported"
        print(f"{method}, {task}, nfe {nfe}: {said}{edge}")
    write_tuned(tuned)
    return status


def _trials(
    args: argparse.Namespace, methods: Sequence[str]
) -> dict[tuple[str, str, int], list[dict]]:
    """Returns the settings to try by task, method and budget.

    With the usual budget or a smaller one, the only one that a method has, or images of one's own
    they are all of its trials; with a larger budget they lie around the best of those.
    """
    from diffoc.experiments import cells as experiments
    from diffoc.experiments.methods import METHODS, check_method, equal_work, read_tuned, takes

    cost, plan = _product_cost(args), {}
    for method, task, asked in product(
        methods, args.tasks or experiments.TABLES["table1"], args.nfe or [NFE]
    ):
        check_method(method)
        if not METHODS[method].tuned:
            raise ValueError(f"method is {method!r}, which has nothing to tune")
        nfe = asked if cost is None else equal_work(method, task, asked, cost)
        usual = METHODS[method].trials(NFE)
        known = read_tuned().get(args.prior, {}).get(method, {}).get(task, {}).get(str(NFE))
        if nfe <= NFE or args.images or not takes(method, task, NFE):
            plan[task, method, nfe] = METHODS[method].trials(nfe)
        elif known in usual:
            plan[task, method, nfe] = METHODS[method].trials_near(usual.index(known), nfe)
        else:
            raise ValueError(
                f"method {method} is not tuned for {task} with {args.prior} and nfe {NFE}, which "
                f"nfe {nfe} starts from: run `python -m diffoc tune {method}` first"
            )
    return plan


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds what says where and by whom cells are computed."""
    parser.add_argument(
        "--jobs", type=int, default=1, help="workers of one thread, with --device cuda one a card"
    )
    parser.add_argument("--backend", choices=["loky", "ray"], default="loky")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--retry-failed", action="store_true")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    add_workers(parser)
    parser.add_argument("--prior", default="faces64")
    parser.add_argument(
        "--tasks", nargs="+", help="of diffoc.problems.tasks; the table's by default"
    )
    parser.add_argument("--nfe", type=int, nargs="+", help="budgets of evaluations; by default 300")
    parser.add_argument(
        "--equal-work",
        action="store_true",
        help="give each method the evaluations that make its work, products too, that of DPS",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="of pictures, by name")
    parser.add_argument(
        "--precision",
        choices=["bfloat16", "float32"],
        help="by default float32; bfloat16 is not validated, and slow on most CPUs",
    )
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="[METHOD.]KEY=VALUE",
        help="a keyword argument of the methods, or of one, such as steps=2 or dps.guidance=0.3",
    )


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        found = value
    if not isinstance(found, bool | int | float) and not (isinstance(found, str) and found):
        raise argparse.ArgumentTypeError(
            f"{text!r} has no value that a setting can have: give a number, true, false or a word"
        )
    return key, found


def _precision(args: argparse.Namespace) -> str:
    """Returns the protocol's precision, where it has one, or the one asked for."""
    from diffoc.experiments.protocol import protocol_of

    usual = protocol_of(args.prior).precision
    if usual and args.precision not in (None, usual):
        raise ValueError(f"precision is {args.precision!r}, but the protocol has {usual!r}")
    return usual or args.precision or "float32"


def _product_cost(args: argparse.Namespace) -> float | None:
    """Returns what a product costs, where equal work is asked for, else None."""
    from diffoc.experiments.protocol import protocol_of

    cost = protocol_of(args.prior).product_cost
    if args.equal_work and cost is None:
        raise ValueError(f"equal-work is set, but the protocol of {args.prior} has no cost")
    return cost if args.equal_work else None


def _settings(args: argparse.Namespace, methods: Sequence[str]) -> dict[str, object]:
    """Returns what --set gives, once each of it is for one of the methods, and given once."""
    keys = [key for key, _ in args.set]
    for key in keys:
        method, dot, _ = key.partition(".")
        if dot and method not in methods:
            raise ValueError(f"set has {key}, but the methods are {', '.join(methods)}")
        if keys.count(key) > 1:
            raise ValueError(f"set has {key} twice: give one value")
    return dict(args.set)


def execute(
    cells: Sequence[Cell],
    compute: Computer,
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
    found = fill(cells, compute, path, args, keep, str(path), _print_plan)
    if found["failed"]:
        print("those that failed are computed again with --retry-failed")
    return int(found["failed"] > 0)


def fill(
    cells: Sequence[Cell],
    compute: Computer,
    path: Path,
    args: argparse.Namespace,
    keep: Callable[[Cell, Tensor], None] | None,
    title: str,
    plan: Callable[[Sequence[Cell], int, argparse.Namespace], None] = lambda *_: None,
) -> dict[str, int]:
    """Computes what a table does not have once its inputs are there; counts cells by status."""
    from diffoc.experiments.cells import check_inputs, work_of
    from diffoc.experiments.runs import run_cells, unfinished

    left = unfinished(cells, path, args.shard, args.retry_failed)
    check_inputs(left, compute)
    plan(left, len(cells), args)
    found = run_cells(
        cells,
        compute,
        path,
        jobs=args.jobs,
        backend=args.backend,
        shard=args.shard,
        retry_failed=args.retry_failed,
        device=args.device,
        keep=keep,
        work=lambda cell: work_of(cell)[0],
    )
    print(f"{title}: " + ", ".join(f"{count} {name}" for name, count in found.items()))
    return found


def _print_plan(left: Sequence[Cell], cells: int, args: argparse.Namespace) -> None:
    from diffoc.experiments.cells import load_once, time_prior, work_of

    if not left:
        print(f"{cells} cells, none of them to compute")
        return
    images = sum(len(cell.images) for cell in left)
    hours, evaluations = 0.0, 0
    for batch in dict.fromkeys(len(cell.images) for cell in left):
        one, back = time_prior(left[0].prior, batch, _precision(args), args.device)
        works = [work_of(cell) for cell in left if len(cell.images) == batch]
        evaluations += sum(work[0] for work in works)
        hours += sum(work[0] * one + work[1] * back for work in works) / 3600
    print(f"{len(left)} cells to compute, of {cells}: {images} images, {evaluations:,} evaluations")
    kind = "GPU-hours" if args.device.startswith("cuda") else "hours of one worker"
    print(
        f"estimated {hours:.2g} {kind}, {hours / args.jobs:.2g} hours with {args.jobs} jobs "
        f"(an evaluation {one:.3g} s, a product {back:.3g} s an image, measured here)"
    )
    if args.keep:
        size = math.prod(load_once(left[0].prior, args.device)[0].image_shape) * images / 1e6
        print(f"reconstructions: at most {size:,.1f} MB")


def as_file_name(prior: str) -> str:
    """Returns a prior's name or path as part of a file's name, which stays in its folder."""
    return prior.replace(" ", "_").replace("/", "_")

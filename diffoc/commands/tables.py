"""The subcommands that make, read and draw tables: run, check, table, figures, digits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffoc.commands.grid import (
    NFE,
    add_grid,
    as_file_name,
    check_prior,
    execute,
    precision,
    product_cost,
    settings_of,
)
from diffoc.data.files import try_file, try_folder
from diffoc.data.pictures import picture_names
from diffoc.data.provenance import ROOT

if TYPE_CHECKING:
    from diffoc.experiments.records import Cell


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds them to a command line."""
    run_ = commands.add_parser("run", help="compute the records of a table, or what is missing")
    run_.add_argument(
        "table",
        choices=["table1", "few_steps", "rank", "published", "robustness", "parts"],
        help="with Table 3's metrics; the others are grids of diffoc.experiments.ablations",
    )
    add_grid(run_)
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
    table_ = commands.add_parser("table", help="print the means of records")
    table_.add_argument("records", type=Path, metavar="CSV")
    figures_ = commands.add_parser("figures", help="draw the figures for print, of what was run")
    figures_.add_argument("--out", type=Path, metavar="DIR", help="by default figures/print")
    digits_ = commands.add_parser("digits", help="make digits from labels, and their records")
    digits_.add_argument("--samples", type=int, default=100, help="of each label and way")
    digits_.add_argument("--out", type=Path, metavar="CSV")
    functions = {run_: run, check_: check, table_: table, figures_: figures}
    functions[digits_] = digits
    for parser, function in functions.items():
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
    return execute(
        cells, compute, path, args, args.shard, args.keep and experiments.keep_in(args.keep)
    )


def _cells(args: argparse.Namespace, images: Sequence[str]) -> tuple[str, list[Cell]]:
    """Returns the name of the prior, and the grid."""
    from diffoc.experiments import cells as experiments
    from diffoc.experiments.ablations import TASKS, ablation_cells
    from diffoc.experiments.inaccurate import UNTRAINED
    from diffoc.experiments.methods import compared

    prior = UNTRAINED * args.random_weights + args.prior
    check_prior(prior, args.device)
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
            precision(args),
            settings_of(args, methods),
            product_cost(args),
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
        precision(args),
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

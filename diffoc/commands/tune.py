"""The subcommand that tunes methods on faces that are in no table: tune."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product

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
from diffoc.data.files import try_file
from diffoc.data.manifest import data_folder
from diffoc.data.pictures import picture_names
from diffoc.data.provenance import ROOT


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds it to a command line."""
    parser = commands.add_parser("tune", help="tune methods on faces that are in no table")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="by default the table's")
    add_grid(parser)
    parser.set_defaults(function=tune)


def tune(args: argparse.Namespace) -> int:
    """Tries settings of each method on the tuning faces, and writes down the best by mean PSNR."""
    from diffoc.experiments import cells as experiments
    from diffoc.experiments.methods import METHODS, compared, of_method, read_tuned, write_tuned
    from diffoc.experiments.records import read
    from diffoc.experiments.runs import alone, by_image

    try_file(data_folder() / "tuned.json")
    check_prior(args.prior, args.device)
    methods = args.methods or compared(args.prior, min(args.nfe or [NFE]))
    plan, given = _trials(args, methods), settings_of(args, methods)
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
            precision(args),
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
    from diffoc.experiments.methods import METHODS, check_method, equal_work, read_tuned

    cost, plan = product_cost(args), {}
    for method, task, asked in product(
        methods, args.tasks or experiments.TABLES["table1"], args.nfe or [NFE]
    ):
        check_method(method)
        if not METHODS[method].tuned:
            raise ValueError(f"method is {method!r}, which has nothing to tune")
        nfe = asked if cost is None else equal_work(method, task, asked, cost)
        usual = METHODS[method].trials(NFE)
        known = read_tuned().get(args.prior, {}).get(method, {}).get(task, {}).get(str(NFE))
        try:
            METHODS[method].settings(task, NFE)
            alone = False
        except ValueError:
            alone = True
        if nfe <= NFE or alone or args.images:
            plan[task, method, nfe] = METHODS[method].trials(nfe)
        elif known in usual:
            plan[task, method, nfe] = METHODS[method].trials_near(usual.index(known), nfe)
        else:
            raise ValueError(
                f"method {method} is not tuned for {task} with {args.prior} and nfe {NFE}, which "
                f"nfe {nfe} starts from: run `python -m diffoc tune {method}` first"
            )
    return plan

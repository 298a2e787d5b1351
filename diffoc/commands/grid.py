"""The grid of cells that `run` and `tune` ask for: its options, the plan, and the work."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffoc.data.files import try_file, try_folder

if TYPE_CHECKING:
    from torch import Tensor

    from diffoc.experiments.cells import Computer
    from diffoc.experiments.records import Cell

NFE = 300
"""The usual budget of evaluations."""


def add_grid(parser: argparse.ArgumentParser) -> None:
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
        "--jobs", type=int, default=1, help="workers of one thread, with --device cuda one a card"
    )
    parser.add_argument("--backend", choices=["loky", "ray"], default="loky")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--precision",
        choices=["bfloat16", "float32"],
        help="by default float32; bfloat16 is not validated, and slow on most CPUs",
    )
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--retry-failed", action="store_true")
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


def check_prior(prior: str, device: str) -> None:
    """Loads a prior: that there is none is said before what else is missing for it."""
    from diffoc.experiments.cells import load_once

    load_once(prior, device)


def precision(args: argparse.Namespace) -> str:
    """Returns the protocol's precision, where it has one, or the one asked for."""
    from diffoc.experiments.protocol import protocol_of

    usual = protocol_of(args.prior).precision
    if usual and args.precision not in (None, usual):
        raise ValueError(f"precision is {args.precision!r}, but the protocol has {usual!r}")
    return usual or args.precision or "float32"


def product_cost(args: argparse.Namespace) -> float | None:
    """Returns what a product costs, where equal work is asked for, else None."""
    from diffoc.experiments.protocol import protocol_of

    cost = protocol_of(args.prior).product_cost
    if args.equal_work and cost is None:
        raise ValueError(f"equal-work is set, but the protocol of {args.prior} has no cost")
    return cost if args.equal_work else None


def settings_of(args: argparse.Namespace, methods: Sequence[str]) -> dict[str, object]:
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
    part: tuple[int, int] | None = None,
    keep: Callable[[Cell, Tensor], None] | None = None,
) -> int:
    """Says what is planned, and does it; 1 if a cell failed."""
    from diffoc.experiments.cells import check_inputs, work_of
    from diffoc.experiments.runs import run_cells, unfinished

    if not cells:
        raise ValueError(f"images is missing: name a folder of pictures for {args.prior}")
    try_file(path)
    if folder := getattr(args, "keep", None):
        try_folder(folder)
    left = unfinished(cells, path, part, args.retry_failed)
    check_inputs(left, compute)
    _print_plan(left, len(cells), args, keep is not None)
    found = run_cells(
        cells,
        compute,
        path,
        jobs=args.jobs,
        backend=args.backend,
        shard=part,
        retry_failed=args.retry_failed,
        device=args.device,
        keep=keep,
        work=lambda cell: work_of(cell)[0],
    )
    print(f"{path}: " + ", ".join(f"{count} {name}" for name, count in found.items()))
    if found["failed"]:
        print("those that failed are computed again with --retry-failed")
    return int(found["failed"] > 0)


def _print_plan(left: Sequence[Cell], cells: int, args: argparse.Namespace, keep: bool) -> None:
    from diffoc.experiments.cells import load_once, time_prior, work_of

    if not left:
        print(f"{cells} cells, none of them to compute")
        return
    images = sum(len(cell.images) for cell in left)
    hours, evaluations = 0.0, 0
    for batch, _ in Counter(len(cell.images) for cell in left).items():
        one, back = time_prior(left[0].prior, batch, precision(args), args.device)
        works = [work_of(cell) for cell in left if len(cell.images) == batch]
        evaluations += sum(work[0] for work in works)
        hours += sum(work[0] * one + work[1] * back for work in works) / 3600
    print(f"{len(left)} cells to compute, of {cells}: {images} images, {evaluations:,} evaluations")
    kind = "GPU-hours" if args.device.startswith("cuda") else "hours of one worker"
    print(
        f"estimated {hours:.2g} {kind}, {hours / args.jobs:.2g} hours with {args.jobs} jobs "
        f"(an evaluation {one:.3g} s, a product {back:.3g} s an image, measured here)"
    )
    if keep:
        size = math.prod(load_once(left[0].prior, args.device)[0].image_shape) * images / 1e6
        print(f"reconstructions: at most {size:,.1f} MB")


def as_file_name(prior: str) -> str:
    """Returns a prior's name or path as part of a file's name, which stays in its folder."""
    return prior.replace(" ", "_").replace("/", "_")

"""The command line: `python -m diffoc COMMAND`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch

from diffoc.checks import device_failed, memory_is_full
from diffoc.data.provenance import ROOT, told
from diffoc.priors.weights import TRAINED_ON
from diffoc.result import DivergenceError

COMMANDS = {
    "theory_and_priors": ("verify", "claims", "benchmark", "fit", "train", "evaluate"),
    "solve": ("solve",),
    "tables": ("run", "tune", "check", "table", "figures", "digits"),
    "ffhq": ("preflight", "ffhq", "measure"),
}
"""The functions of each module of this folder, which is imported when one of them is called."""


def parser_of() -> argparse.ArgumentParser:
    """Returns the command line, with all its commands."""
    parser = argparse.ArgumentParser(prog="python -m diffoc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("verify", help="check the theory's identities in float64")
    claimed = commands.add_parser(
        "claims", help="print the ledger of the paper's claims: 1 if a number disagrees"
    )
    claimed.add_argument("--quick", action="store_true", help="recompute nothing")
    claimed.add_argument("--notebooks", type=Path, metavar="DIR", help="executed ones, to compare")
    fitter = commands.add_parser("fit", help="fit a mixture prior to a data set under $DIFFOC_DATA")
    fitter.add_argument("name", choices=["mnist", "faces32"])
    fitter.add_argument("--out", type=Path, default=ROOT / "data", metavar="DIR")
    fitter.add_argument("--seed", type=int, default=0)
    trainer = commands.add_parser("train", help="train a small network, or go on training it")
    trainer.add_argument("name", choices=TRAINED_ON)
    trainer.add_argument("--checkpoint", type=Path, help="default: build/training/NAME.pt")
    trainer.add_argument("--out", type=Path, default=ROOT / "data", metavar="DIR")
    trainer.add_argument("--init", type=Path, metavar="FILE", help="weights to begin with")
    trainer.add_argument("--images", type=int, help="to see, instead of the plan's")
    trainer.add_argument("--rate", type=float, help="learning rate, instead of the plan's")
    trainer.add_argument("--seed", type=int, help="of a new run; 0 by default")
    trainer.add_argument("--device", default="cpu", help="cpu or cuda")
    trainer.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    trainer.add_argument("--compile", action="store_true", help="compile the network: for a GPU")
    trainer.add_argument("--every", type=float, default=300, metavar="SECONDS", help="report")
    judge = commands.add_parser("evaluate", help="measure a small prior, as its card reports it")
    judge.add_argument("name", choices=["mnist", "faces64"])
    judge.add_argument("--samples", type=int, default=1000)
    judge.add_argument("--out", type=Path, default=ROOT / "build", metavar="DIR")
    solver = commands.add_parser("solve", help="reconstruct a picture from a measurement of it")
    solver.add_argument("image", nargs="?", type=Path, help="a picture, to be measured first")
    solver.add_argument("--measurement", type=Path, metavar="FILE", help="in place of a picture")
    solver.add_argument(
        "--task", required=True, help="super_resolution, or another of diffoc.problems.tasks"
    )
    solver.add_argument(
        "--crop", type=_crop, metavar="X,Y,SIDE", help="square of the picture: left, top, side"
    )
    solver.add_argument("--prior", default="faces64", help="a name or path for load_prior")
    solver.add_argument("--out", type=Path, default=Path("solved"), metavar="DIR")
    solver.add_argument("--noise-std", type=float, default=0.05, help="on the scale [-1, 1]")
    solver.add_argument(
        "--recipe", help="ours by default; or quick, stopped, cold, paper, released"
    )
    solver.add_argument("--budget", type=int, help="evaluations, in place of the recipe's")
    solver.add_argument("--steps", type=int, help="T of the reverse process, likewise")
    solver.add_argument("--iterations", type=int, help="of the controller, likewise")
    solver.add_argument("--rank", type=int, help="of the terminal Hessian, likewise")
    solver.add_argument("--starts", type=int, help="1 by default; the cheapest image is written")
    solver.add_argument("--seed", type=int, default=0, help="of mask, kernel and noise")
    solver.add_argument("--device", default="cpu", help="cpu or cuda")
    _add_tables(commands)
    _add_ffhq(commands)
    bench = commands.add_parser("benchmark", help="time and memory of the controller, measured")
    bench.add_argument("priors", nargs="*", help="for load_prior; by default mnist and faces64")
    bench.add_argument("--steps", type=int, default=10, metavar="T")
    bench.add_argument("--ranks", type=int, nargs="+", default=[0, 1], metavar="K")
    bench.add_argument("--batch", type=int, default=8, help="images at once; 1 for no comparison")
    bench.add_argument("--repeats", type=int, default=5, help="the fastest counts")
    bench.add_argument("--device", default="cpu", help="cpu or cuda")
    bench.add_argument(
        "--teraflops", type=float, default=50.0, help="that the projection of Table 1 assumes"
    )
    bench.add_argument(
        "--random-weights", action="store_true", help="for ffhq256, without its file"
    )
    bench.add_argument("--out", type=Path, metavar="JSON")
    return parser


def _add_tables(commands: argparse._SubParsersAction) -> None:
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
    run_.add_argument("--shard", type=_shard, metavar="I/N", help="one part, in a file of its own")
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
    digits_.add_argument("--prior", default="mnist", help="of digits, such as 1aurent/mnist-28")
    digits_.add_argument("--samples", type=int, default=100, help="of each label and way")
    digits_.add_argument("--out", type=Path, metavar="CSV")


def _add_ffhq(commands: argparse._SubParsersAction) -> None:
    ready = commands.add_parser("preflight", help="what FFHQ needs and costs; 1 if it would fail")
    table = commands.add_parser("ffhq", help="a table of the paper on FFHQ, beside its numbers")
    table.add_argument("table", choices=["table1", "table3", "table4", "table5", "table6"])
    for parser in (ready, table):
        parser.add_argument("--prior", default="ffhq256")
        parser.add_argument("--random-weights", action="store_true", help="for a trial")
        parser.add_argument("--tasks", nargs="+", help="by default the table's")
        parser.add_argument("--precision", choices=["bfloat16", "float32"], default="float32")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--first", type=int, metavar="N", help="images only")
        which.add_argument("--last", type=int, metavar="N", help="by default 1000")
    _add_workers(table)
    table.add_argument("--batch", type=int, default=1, help="images at once")
    table.add_argument("--shard", type=_shard, metavar="I/N", help="one part of the images")
    table.add_argument(
        "--rehearse", action="store_true", help="two steps, random weights, 4 images"
    )
    table.add_argument(
        "--protocol",
        default="paper",
        choices=["paper", "released"],
        help="92 %% of the pixels dropped, or the released code's 30 to 70 %%: see the docs",
    )
    kept = commands.add_parser("measure", help="LPIPS, FID, SSIM, PSNR of kept reconstructions")
    kept.add_argument("kept", type=Path, metavar="KEPT_DIR", help="what --keep wrote")
    kept.add_argument("--batch", type=int, default=16, help="images at once")
    kept.add_argument("--shard", type=_shard, metavar="I/N", help="one part of each set")
    ready.set_defaults(rehearse=False, protocol="paper")
    for parser in (ready, kept):
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    for parser in (ready, table, kept):
        parser.add_argument("--images", type=Path, metavar="DIR", required=parser is kept)
        parser.add_argument(
            "--filter", default="lanczos", help="that makes larger originals smaller: see the docs"
        )
        parser.add_argument("--out", type=Path, metavar="DIR")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    _add_workers(parser)
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


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=1, help="workers of one thread, with --device cuda one a card"
    )
    parser.add_argument("--backend", choices=["loky", "ray"], default="loky")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--retry-failed", action="store_true")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = parser_of()
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.command == "solve" and (args.image is None) == (args.measurement is None):
        parser.error("solve needs either a picture or --measurement FILE")

    # Activations and optimiser states decay into denormals, which halve the speed of a CPU.
    torch.set_flush_denormal(True)
    try:
        _check_numbers(args)
        if "device" in args:
            _check_device(args.device)
        _check_words(words)
        module = next(name for name, commands in COMMANDS.items() if args.command in commands)
        return getattr(import_module(f"diffoc.commands.{module}"), args.command)(args)
    except BrokenPipeError:  # who reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        said = told(error).replace("name_or_path", "prior")  # as the command line calls it
        if isinstance(error, OSError) and error.filename:
            said = told(f"{error.filename} cannot be used ({error.strerror}): name another")
        print(f"diffoc: {said}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if memory_is_full(error):
            said = "memory is full: give less at once, or smaller numbers"
        elif device_failed(error):
            said = f"the device failed, try again or name another --device: {told(error)}"
        elif isinstance(error, torch.linalg.LinAlgError | DivergenceError):
            said = (
                "the numbers cannot be computed with, give a larger --noise-std, a smaller --rank "
                f"or another --recipe: {told(error)}"
            )
        else:
            raise
        print(f"diffoc: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffoc: interrupted; what was written before is complete", file=sys.stderr)
        return 130


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    if not isinstance(parsed, bool | int | float) and not (isinstance(parsed, str) and parsed):
        raise argparse.ArgumentTypeError(
            f"{text!r} has no value that a setting can have: give a number, true, false or a word"
        )
    return key, parsed


def _shard(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i = n = 0
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 1/4")
    return i, n


def _crop(text: str) -> tuple[int, int, int]:
    try:
        left, top, side = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"crop is {text!r}, expected X,Y,SIDE in whole pixels, such as 120,80,200"
        ) from error
    return left, top, side


FROM_ZERO = {"seed", "seeds", "rank", "ranks", "iterations"}
"""Options that may be zero; all other numbers are positive."""

LEAST = {"noise_std": 1e-6}
"""The least values of options whose squares' inverses float32 has to hold."""

MOST = {"rate": 1.0, "noise_std": 1e3, "samples": 10**6, "seed": 2**63 - 1, "seeds": 2**63 - 1}
"""The largest values of options; other whole numbers are at most 10^9: no memory holds more."""

WORKERS = 4 * (os.cpu_count() or 1)
"""The most workers of one machine: more would only take its memory."""


def _check_words(words: Sequence[str]) -> None:
    """Raises a ValueError for an empty argument, as a variable that is not set leaves behind."""
    for before, word in pairwise(["", *words]):
        if not word.strip() or (word.startswith("--") and word.endswith("=")):
            place = word[:-1] if word.strip() else before
            option = place if place.startswith("--") else f"the argument after {place!r}"
            raise ValueError(f"{option} is empty: give it a value, or leave it out")


def _check_numbers(args: argparse.Namespace) -> None:
    for name, given in vars(args).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            most = MOST.get(name, math.inf if isinstance(value, float) else 10**9)
            if name == "jobs" and args.backend == "loky":  # the workers of a cluster are elsewhere
                most = WORKERS
            least = 0 if name in FROM_ZERO else LEAST.get(name, 0)
            good = least <= value <= most and (value > 0 or name in FROM_ZERO)
            if not good or not math.isfinite(value):
                above = f"{least} or more" if least or name in FROM_ZERO else "a number above 0"
                limit = f" and at most {most:.10g}" if most < math.inf else ""
                raise ValueError(f"{name} is {value}, expected {above}{limit}")


def _check_device(name: str) -> None:
    wrong = f"device is {name!r}, expected cpu, cuda or such as cuda:1"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(wrong) from error
    if device.type not in ("cpu", "cuda"):  # float64 and fixed sums are not everywhere
        raise ValueError(wrong)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs")

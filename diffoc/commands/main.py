"""The command line: `python -m diffoc COMMAND`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from diffoc.checks import memory_is_full
from diffoc.commands import ffhq, tables
from diffoc.data.files import replacing, try_file, try_folder
from diffoc.data.provenance import ROOT, told
from diffoc.priors.weights import TRAINED_ON


def verify(args: argparse.Namespace) -> int:
    """Prints every identity with its error and bound; 1 if one is above its bound."""
    from diffoc.theory.identities import IDENTITIES

    print(f"{'identity':<68} {'setting':<56} {'error':>8} {'bound':>8}")
    total = failed = 0
    for group in IDENTITIES:
        for row in group():
            total += 1
            failed += not row.holds
            said = f"{row.name:<68} {row.setting:<56} {row.error:8.1e} {row.bound:8.0e}"
            print(said if row.holds else f"{said}  ABOVE ITS BOUND", flush=True)
    print(f"{total - failed} of {total} within their bounds")
    return int(failed > 0)


def claims(args: argparse.Namespace) -> int:
    """Prints the ledger; 1 if a number disagrees."""
    from diffoc.experiments import ledger

    if args.notebooks and not any(args.notebooks.glob("*.ipynb")):
        raise FileNotFoundError(
            f"notebooks {args.notebooks} has none: expected a folder of .ipynb files"
        )
    return ledger.run(ledger.LEDGER, args.notebooks or ledger.NOTEBOOKS, quick=args.quick)


def fit(args: argparse.Namespace) -> int:
    """Fits a mixture, writes it, and prints the numbers of the fit."""
    from diffoc.training.mixtures import fit_mixture_prior

    try_folder(args.out)
    print(json.dumps(fit_mixture_prior(args.name, args.out, args.seed), indent=2))
    return 0


def train(args: argparse.Namespace) -> int:
    """Trains, or goes on from the checkpoint, and writes the weights of the moving average.

    A ValueError says that those in their place are better, or of another network.
    """
    from diffoc.data.images import as_states
    from diffoc.figures import write_sheet
    from diffoc.priors.autoencoder import Autoencoder
    from diffoc.priors.weights import load_into, read_weights, write_weights
    from diffoc.training import evaluation
    from diffoc.training import trainer as training

    name = args.name
    checkpoint = args.checkpoint or ROOT / "build" / "training" / f"{name}.pt"
    try_file(checkpoint)
    try_folder(args.out)
    changes = {"images": args.images, "rate": args.rate}
    plan = replace(training.PLANS[name], **{k: v for k, v in changes.items() if v is not None})
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    if checkpoint.exists() and (args.seed is not None or args.init):
        raise ValueError(
            f"seed and init are of a new run, but {checkpoint} is there to go on from: leave them "
            "out, or name another --checkpoint"
        )
    if checkpoint.exists():
        run = training.resume(plan, checkpoint, args.device, precision)
    else:
        weights = args.init and read_weights(args.init)
        if weights:
            load_into(plan.build(), weights, f"init {args.init}")
        run = training.start(plan, args.seed or 0, args.device, precision, weights)
    (images, labels), (held_out, truth), decode = _training_data(name, args.out)

    def report(run: training.Run, rate: float) -> None:
        score, samples = evaluation.score(run.average, held_out, truth, decode)
        if samples is not None:
            write_sheet(samples, checkpoint.with_suffix(".png"))
        loss = sum(run.losses) / len(run.losses)
        print(
            f"{run.seen:>9,} of {plan.images:,} images  {rate:6.0f}/s  loss {loss:.4f}  {score}",
            flush=True,
        )

    shipped = args.out / f"{name}.safetensors"
    before = evaluation.worth_of_file(shipped, run.average, held_out, truth)
    training.train(run, images, labels, checkpoint, args.every, report=report, compile=args.compile)
    if isinstance(run.average, Autoencoder):
        run.average.standardise(as_states(images))
    lost = before - evaluation.worth(run.average, held_out, truth)
    print(evaluation.write_unless_worse(partial(write_weights, run.average, name), args.out, lost))
    return 0


Labelled = tuple[np.ndarray, np.ndarray | None]


def _training_data(
    name: str, folder: Path
) -> tuple[Labelled, Labelled, Callable[[torch.Tensor], torch.Tensor]]:
    """Returns what a network is trained on, what is held out, and what makes images of samples.

    Labels are there where the network is a classifier.
    """
    from diffoc.data import images as data
    from diffoc.priors.autoencoder import encoded, load_autoencoder

    as_they_are = torch.nn.Identity()
    if name == "mnist":  # not the first ones: the set may be sorted by class
        return (data.mnist("train")[0], None), (data.mnist("test")[0][::40], None), as_they_are
    if not name.startswith("faces64"):
        return data.mnist("train"), data.mnist("test"), as_they_are
    read = data.colour_faces if name.startswith("faces64_rgb") else data.faces
    images, held_out = read("train"), read("test")[::2]
    if not name.endswith("_latent"):
        return (images, None), (held_out, None), as_they_are
    network = load_autoencoder(name.replace("latent", "autoencoder"), folder)
    images = encoded(network, np.concatenate([images, images[:, :, ::-1]]))
    return (images, None), (encoded(network, held_out), None), network.decode


def evaluate(args: argparse.Namespace) -> int:
    """Prints what the prior's card reports, and writes a sheet of its samples."""
    from diffoc.figures import write_sheet
    from diffoc.training.evaluation import report

    if args.samples < 2:
        raise ValueError(f"samples is {args.samples}, expected at least 2")
    try_folder(args.out)
    numbers, drawn = report(args.name, args.samples)
    print(json.dumps(numbers, indent=2))
    path = args.out / f"samples_{args.name}.png"
    write_sheet(drawn[:64], path)
    print(path)
    return 0


def solve(args: argparse.Namespace) -> int:
    """Reconstructs a picture from a measurement of it, and writes what happened."""
    from diffoc.commands import solve as solving
    from diffoc.priors.latent import LatentPrior
    from diffoc.priors.pretrained import load_prior

    names = ("recipe", "budget", "steps", "iterations", "rank", "starts")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = solving.Settings(
        args.task, args.prior, noise_std=args.noise_std, seed=args.seed, **given
    )
    given = args.image or args.measurement
    if given.name in solving.WRITTEN and given.parent.resolve() == args.out.resolve():
        raise ValueError(f"out is {args.out}, where {given} would be written over: name another")
    try_folder(args.out)
    prior = load_prior(args.prior)
    if isinstance(prior, LatentPrior):
        raise ValueError(f"prior is {args.prior}, one of latents: expected one of images")
    if args.measurement:
        if args.crop:
            raise ValueError("crop is given, but it is of a picture: a measurement is taken whole")
        case = solving.from_measurement(args.measurement, prior.image_shape, settings)
    else:
        case = solving.from_picture(args.image, prior.image_shape, settings, args.crop)
        assert case.truth is not None
        case.notes.extend(solving.unfamiliar(prior, settings, case.truth))
    for note in case.notes:
        print(f"note: {note}")
    result, report = solving.run(case, prior, settings, args.device)
    for path in solving.write(args.out, case, result.x0, report):
        print(path)
    if report["metrics"]:
        print(", ".join(f"{name} {value:g}" for name, value in report["metrics"].items()))
    print(
        f"residual {report['residual_over_noise']:g} of the noise, "
        f"{report['evaluations']} evaluations, {report['seconds']:g} s"
    )
    return 0


def benchmark(args: argparse.Namespace) -> int:
    """Prints what the controller costs, measured here, and what Table 1 would, projected."""
    from diffoc.experiments.benchmark import run

    if args.out:
        try_file(args.out)
        if args.out.suffix != ".json":
            raise ValueError(f"out is {args.out}, expected a name that ends in .json")
    found = run(
        args.priors or ["mnist", "faces64"],
        steps=args.steps,
        ranks=args.ranks,
        batch=args.batch,
        repeats=args.repeats,
        device=args.device,
        teraflops=args.teraflops,
        random_weights=args.random_weights,
    )
    if args.out:
        with replacing(args.out) as part:
            part.write_text(json.dumps(found, indent=2) + "\n")
        print(args.out)
    return 0


def parser_of() -> argparse.ArgumentParser:
    """Returns the command line, with all its commands."""
    parser = argparse.ArgumentParser(prog="python -m diffoc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checker = commands.add_parser("verify", help="check the theory's identities in float64")
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
    solver.add_argument("--prior", default="faces64_rgb", help="a name or path for load_prior")
    solver.add_argument("--out", type=Path, default=Path("solved"), metavar="DIR")
    solver.add_argument("--noise-std", type=float, default=0.05, help="on the scale [-1, 1]")
    solver.add_argument("--recipe", help="ours by default; or stopped, cold, paper, released")
    solver.add_argument("--budget", type=int, help="evaluations, in place of the recipe's")
    solver.add_argument("--steps", type=int, help="T of the reverse process, likewise")
    solver.add_argument("--iterations", type=int, help="of the controller, likewise")
    solver.add_argument("--rank", type=int, help="of the terminal Hessian, likewise")
    solver.add_argument("--starts", type=int, help="1 by default; the cheapest image is written")
    solver.add_argument("--seed", type=int, default=0, help="of mask, kernel and noise")
    solver.add_argument("--device", default="cpu", help="cpu or cuda")
    tables.add_commands(commands)
    ffhq.add_commands(commands)
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
    parsers = (checker, claimed, fitter, trainer, judge, solver, bench)
    functions = (verify, claims, fit, train, evaluate, solve, benchmark)
    for part, function in zip(parsers, functions, strict=True):
        part.set_defaults(function=function)
    return parser


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
        return args.function(args)
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
        if not memory_is_full(error):
            raise
        print("diffoc: memory is full: give less at once, or smaller numbers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffoc: interrupted; what was written before is complete", file=sys.stderr)
        return 130


def _crop(text: str) -> tuple[int, int, int]:
    """Reads X,Y,SIDE."""
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
"""Of options whose squares' inverses float32 has to hold."""

MOST = {"rate": 1.0, "noise_std": 1e3, "samples": 10**6, "seed": 2**63 - 1, "seeds": 2**63 - 1}
"""Of options; other whole numbers are at most 10^9, of which no memory holds more."""


WORKERS = 4 * (os.cpu_count() or 1)
"""The most of one machine: more would only take its memory."""


def _check_words(words: Sequence[str]) -> None:
    """Raises a ValueError for an empty argument, as a variable that is not set leaves behind."""
    for before, word in pairwise(["", *words]):
        if not word.strip() or (word.startswith("--") and word.endswith("=")):
            place = word[:-1] if word.strip() else before
            option = place if place.startswith("--") else f"the argument after {place!r}"
            raise ValueError(f"{option} is empty: give it a value, or leave it out")


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises a ValueError for a number that none of the commands can use."""
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
    """Raises a ValueError unless torch can compute there."""
    wrong = f"device is {name!r}, expected cpu, cuda or such as cuda:1"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(wrong) from error
    if device.type not in ("cpu", "cuda"):  # float64 and fixed sums are not everywhere
        raise ValueError(wrong)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs")

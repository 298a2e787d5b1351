"""The subcommands of the theory and of the shipped priors.

They are verify, claims and benchmark; and fit, train and evaluate.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from diffoc import figures
from diffoc.data import images as data
from diffoc.data.files import replacing, try_file, try_folder
from diffoc.data.provenance import ROOT
from diffoc.experiments import benchmark as measuring
from diffoc.experiments import ledger
from diffoc.priors import weights
from diffoc.priors.autoencoder import Autoencoder, encoded, load_autoencoder
from diffoc.theory import identities
from diffoc.training import evaluation, mixtures, trainer

Labelled = tuple[np.ndarray, np.ndarray | None]


def verify(args: argparse.Namespace) -> int:
    """Prints every identity with its error and bound; 1 if one is above its bound."""
    print(f"{'identity':<68} {'setting':<56} {'error':>8} {'bound':>8}")
    total = failed = 0
    for group in identities.IDENTITIES:
        for row in group():
            total += 1
            failed += not row.holds
            said = f"{row.name:<68} {row.setting:<56} {row.error:8.1e} {row.bound:8.0e}"
            print(said if row.holds else f"{said}  ABOVE ITS BOUND", flush=True)
    print(f"{total - failed} of {total} within their bounds")
    return int(failed > 0)


def claims(args: argparse.Namespace) -> int:
    """Prints the ledger; 1 if a number disagrees."""
    if args.notebooks and not any(args.notebooks.glob("*.ipynb")):
        raise FileNotFoundError(
            f"notebooks {args.notebooks} has none: expected a folder of .ipynb files"
        )
    return ledger.run(ledger.LEDGER, args.notebooks or ledger.NOTEBOOKS, quick=args.quick)


def benchmark(args: argparse.Namespace) -> int:
    """Prints what the controller costs, measured here, and what Table 1 would, projected."""
    if args.out:
        try_file(args.out)
        if args.out.suffix != ".json":
            raise ValueError(f"out is {args.out}, expected a name that ends in .json")
    costs = measuring.run(
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
            part.write_text(json.dumps(costs, indent=2) + "\n")
        print(args.out)
    return 0


def fit(args: argparse.Namespace) -> int:
    """Fits a mixture, writes it, and prints the numbers of the fit."""
    try_folder(args.out)
    print(json.dumps(mixtures.fit_mixture_prior(args.name, args.out, args.seed), indent=2))
    return 0


def train(args: argparse.Namespace) -> int:
    """Trains, or goes on from the checkpoint, and writes the weights of the moving average.

    A ValueError says that those in their place are better, or of another network.
    """
    name = args.name
    checkpoint = args.checkpoint or ROOT / "build" / "training" / f"{name}.pt"
    try_file(checkpoint)
    try_folder(args.out)
    changes = {"images": args.images, "rate": args.rate}
    plan = replace(trainer.PLANS[name], **{k: v for k, v in changes.items() if v is not None})
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    if checkpoint.exists() and (args.seed is not None or args.init):
        raise ValueError(
            f"seed and init are of a new run, but {checkpoint} is there to go on from: leave them "
            "out, or name another --checkpoint"
        )
    if checkpoint.exists():
        run = trainer.resume(plan, checkpoint, args.device, precision)
    else:
        first = args.init and weights.read_weights(args.init)
        if first:
            weights.load_into(plan.build(), first, f"init {args.init}")
        run = trainer.start(plan, args.seed or 0, args.device, precision, first)
    (images, labels), (held_out, truth), decode = _training_data(name, args.out)

    def report(run: trainer.Run, rate: float) -> None:
        score, samples = evaluation.score(run.average, held_out, truth, decode)
        if samples is not None:
            figures.write_sheet(samples, checkpoint.with_suffix(".png"))
        loss = sum(run.losses) / len(run.losses)
        print(
            f"{run.seen:>9,} of {plan.images:,} images  {rate:6.0f}/s  loss {loss:.4f}  {score}",
            flush=True,
        )

    shipped = args.out / f"{name}.safetensors"
    before = evaluation.worth_of_file(shipped, run.average, held_out, truth)
    trainer.train(run, images, labels, checkpoint, args.every, report=report, compile=args.compile)
    if isinstance(run.average, Autoencoder):
        run.average.standardise(data.as_states(images))
    lost = before - evaluation.worth(run.average, held_out, truth)
    write = partial(weights.write_weights, run.average, name)
    print(evaluation.write_unless_worse(write, args.out, lost))
    return 0


def _training_data(
    name: str, folder: Path
) -> tuple[Labelled, Labelled, Callable[[torch.Tensor], torch.Tensor]]:
    """Returns what a network is trained on, what is held out, and what makes images of samples."""
    as_they_are = torch.nn.Identity()
    if name == "mnist":  # not the first ones: the set may be sorted by class
        return (data.mnist("train")[0], None), (data.mnist("test")[0][::40], None), as_they_are
    if not name.startswith("faces64"):
        return data.mnist("train"), data.mnist("test"), as_they_are
    images, held_out = data.colour_faces("train"), data.colour_faces("test")[::2]
    if not name.endswith("_latent"):
        return (images, None), (held_out, None), as_they_are
    network = load_autoencoder(folder)
    images = encoded(network, np.concatenate([images, images[:, :, ::-1]]))
    return (images, None), (encoded(network, held_out), None), network.decode


def evaluate(args: argparse.Namespace) -> int:
    """Prints what the prior's card reports, and writes a sheet of its samples."""
    if args.samples < 2:
        raise ValueError(f"samples is {args.samples}, expected at least 2")
    try_folder(args.out)
    numbers, drawn = evaluation.report(args.name, args.samples)
    print(json.dumps(numbers, indent=2))
    path = args.out / f"samples_{args.name}.png"
    figures.write_sheet(drawn[:64], path)
    print(path)
    return 0

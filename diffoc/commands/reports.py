"""The subcommands that report: verify, claims, benchmark."""

import argparse
import json

from diffoc.data.files import replacing, try_file
from diffoc.experiments import benchmark as measuring
from diffoc.experiments import ledger
from diffoc.theory import identities


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
    found = measuring.run(
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

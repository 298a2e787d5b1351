"""Ranks samplers on faces by the certificate: `data/records/certificate_faces64.csv`.

    python tools/certificate.py --factor 4 --steps 20 --methods none dps   # what is missing

Notebook 14b reads the record; `diffoc/experiments/certificates.py` says what the methods are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from diffoc.data.files import replacing
from diffoc.data.provenance import environment
from diffoc.experiments.certificates import METHODS, RECORD, case, outcome


def main() -> None:
    """Appends the rows that the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factor", type=int, default=4, help="of the super-resolution")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    if args.out.exists():
        rows = pd.read_csv(args.out, dtype=str, keep_default_na=False).to_dict("records")
    done = {(each["factor"], each["steps"], each["method"], each["run"]) for each in rows}
    for run in range(args.runs):
        this = case(args.factor, args.steps, run)
        for method in args.methods:
            place = {"factor": args.factor, "steps": args.steps, "method": method, "run": run}
            if tuple(map(str, place.values())) in done:
                continue
            rows.append(place | outcome(method, this) | environment())
            print(*list(rows[-1].values())[:7], flush=True)
            with replacing(args.out) as part:
                pd.DataFrame(rows).to_csv(part, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()

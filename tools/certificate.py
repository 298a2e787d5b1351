"""Ranks samplers on faces by the certificate: `data/records/certificate_faces64_rgb.csv`.

    python tools/certificate.py --factor 4 --steps 20 --methods none dps   # what is missing

Notebook 14 reads the record; `diffoc/experiments/certificates.py` says what the methods are.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

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
        with args.out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    done = {(each["factor"], each["steps"], each["method"], each["run"]) for each in rows}
    for run in range(args.runs):
        this = case(args.factor, args.steps, run)
        for method in args.methods:
            place = {"factor": args.factor, "steps": args.steps, "method": method, "run": run}
            if tuple(map(str, place.values())) in done:
                continue
            rows.append(place | outcome(method, this) | environment())
            print(*list(rows[-1].values())[:7], flush=True)
            with args.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()

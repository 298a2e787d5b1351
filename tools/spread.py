"""Measures by how much rounding changes the tables: `data/records/spread_faces64.csv`.

    DIFFOC_DATA=... python tools/spread.py                      # every method and task: hours
    DIFFOC_DATA=... python tools/spread.py --methods ours --jitters 1 2 3
    DIFFOC_DATA=... python tools/spread.py --methods ours --precision float32

The first eight faces of every method and task are computed again with weights and measurements
multiplied by 1 + 1e-6 z (see `portability.py`), and compared with their records, of other CPUs;
in a precision of which there is none, with what is computed here without a jitter. What was
computed is kept in build/portable/spread.csv and not computed again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from portability import perturb

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "records" / "table1_faces64.csv"
RUNS = ROOT / "build" / "portable" / "spread.csv"
SPREAD = ROOT / "data" / "records" / "spread_faces64.csv"
PLACE = ("method", "task", "precision")
METRICS = ("psnr", "ssim")
HEAD = ["jitter", *PLACE, "image", *METRICS]


def main() -> int:
    """Computes what is missing, a jitter in a process, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="all by default")
    parser.add_argument("--tasks", nargs="+", help="all by default")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="else the record's")
    parser.add_argument("--jitters", nargs="+", type=int, default=[1], help="seeds of z")
    parser.add_argument("--jitter", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jitter is not None:
        compute(args)
        return 0
    for jitter in [0] * bool(args.precision) + args.jitters:
        # The weights stay as they were loaded, so every jitter has its own process.
        subprocess.run([sys.executable, *sys.argv, "--jitter", str(jitter)], check=True)
    summarise()
    return 0


def compute(args: argparse.Namespace) -> None:
    """Appends what is missing of one jitter, 0 being none, to the runs."""
    if args.jitter:
        perturb(args.jitter)
    import torch

    from diffoc.experiments import records
    from diffoc.experiments.cells import Computer

    torch.set_flush_denormal(True)
    cells: dict[tuple[str, str], records.Cell] = {}
    for cell, rows in records.read(TABLE).items():
        if cell.prior == "faces64" and cell.nfe == 300 and rows[0]["status"] == "ok":
            cells.setdefault((cell.method, cell.task), cell)
    done = set(runs()[["jitter", *PLACE]].itertuples(index=False, name=None))
    for cell in cells.values():
        cell = replace(cell, precision=args.precision or cell.precision)
        place = [cell.method, cell.task, cell.precision]
        wanted = cell.method in (args.methods or [cell.method])
        wanted &= cell.task in (args.tasks or [cell.task])
        if not wanted or (args.jitter, *place) in done:
            continue
        again, _ = Computer()(cell)
        with RUNS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for image, row in zip(cell.images, again, strict=True):
                writer.writerow([args.jitter, *place, image, *(row[key] for key in METRICS)])
        print(args.jitter, *place, flush=True)


def runs() -> pd.DataFrame:
    """Returns what was computed: a row for every face."""
    if not RUNS.exists():
        RUNS.parent.mkdir(parents=True, exist_ok=True)
        RUNS.write_text(",".join(HEAD) + "\n", encoding="utf-8")
    return pd.read_csv(RUNS)


def summarise() -> None:
    """Writes the greatest change of a face, and of the mean over faces, of each method and task.

    What the table has of methods and tasks without runs here stays.
    """
    recorded = pd.read_csv(TABLE).query("nfe == 300")
    changes, place, metrics = runs(), list(PLACE), list(METRICS)
    key, plain = [*place, "image"], changes["jitter"] == 0
    reference = pd.concat([changes[plain], recorded]).drop_duplicates(key, keep="last")
    then = reference.set_index(key).loc[pd.MultiIndex.from_frame(changes[key]), metrics]
    changes[metrics] -= then.to_numpy()
    by_jitter = changes.groupby([*place, "jitter"])
    means = by_jitter[metrics].mean().abs().groupby(place).max()
    faces = changes[metrics].abs().groupby([changes[name] for name in place]).max()
    spread = by_jitter.size().groupby(place).min().rename("faces").to_frame()
    jitters = changes[~plain].groupby(place)["jitter"].nunique()
    spread["jitters"] = jitters.reindex(spread.index, fill_value=0)
    for metric in METRICS:
        for of, greatest in {"face": faces, "mean": means}.items():
            spread[f"{metric}_{of}"] = greatest[metric].map("{:.2g}".format)
    before = pd.read_csv(SPREAD, dtype=str).set_index(place)
    kept = before.loc[~before.index.isin(spread.index)]  # of runs that are no longer in build/
    pd.concat([spread, kept]).sort_index().to_csv(SPREAD, lineterminator="\n")
    print(SPREAD.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())

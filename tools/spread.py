"""Measures by how much rounding changes the tables: `data/records/spread_faces64.csv`.

    DIFFOC_DATA=... python tools/spread.py                      # every method and task: hours
    DIFFOC_DATA=... python tools/spread.py --methods control --jitters 1 2 3
    DIFFOC_DATA=... python tools/spread.py --methods control --precision float32

The first eight faces of every method and task are computed again with weights and measurements
multiplied by 1 + 1e-6 z (see `portability.py`), and compared with their records, of other CPUs;
in a precision of which there are none, with what is computed here without a jitter. What was
computed is kept in build/portable/spread.csv and not computed again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

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
    done = {(row["jitter"], *(row[key] for key in PLACE)) for row in runs()}
    for cell in cells.values():
        cell = replace(cell, precision=args.precision or cell.precision)
        place = [cell.method, cell.task, cell.precision]
        wanted = cell.method in (args.methods or [cell.method])
        wanted &= cell.task in (args.tasks or [cell.task])
        if not wanted or (str(args.jitter), *place) in done:
            continue
        again, _ = Computer()(cell)
        with RUNS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for image, row in zip(cell.images, again, strict=True):
                writer.writerow([args.jitter, *place, image, *(row[key] for key in METRICS)])
        print(args.jitter, *place, flush=True)


def runs() -> list[dict[str, str]]:
    """What was computed: a row for every face."""
    if not RUNS.exists():
        RUNS.parent.mkdir(parents=True, exist_ok=True)
        RUNS.write_text(",".join(HEAD) + "\n", encoding="utf-8")
    with RUNS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summarise() -> None:
    """Writes the greatest change of a face, and of the mean over faces, of each method and task."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        recorded = [row for row in csv.DictReader(file) if row["nfe"] == "300"]
    found = runs()
    plain = [row for row in found if row["jitter"] == "0"]
    reference = {tuple(row[key] for key in (*PLACE, "image")): row for row in [*plain, *recorded]}
    groups: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in found:
        groups[tuple(row[key] for key in PLACE)][row["jitter"]].append(row)
    with SPREAD.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        numbers = [f"{key}_{of}" for key in METRICS for of in ("face", "mean")]
        writer.writerow([*PLACE, "faces", "jitters", *numbers])
        for place, jitters in sorted(groups.items()):
            greatest = []
            for key in METRICS:
                changes = [
                    [float(row[key]) - float(reference[*place, row["image"]][key]) for row in rows]
                    for jitter, rows in jitters.items()
                ]
                greatest.append(max(abs(change) for some in changes for change in some))
                greatest.append(max(abs(sum(some) / len(some)) for some in changes))
            count = len(jitters.keys() - {"0"})
            faces = min(map(len, jitters.values()))
            writer.writerow([*place, faces, count, *(f"{number:.2g}" for number in greatest)])
    print(SPREAD.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())

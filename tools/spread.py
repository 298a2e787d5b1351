"""Measures by how much rounding changes the tables: `data/records/spread_faces64.csv`.

    DIFFOC_DATA=... python tools/spread.py                      # every method and task: hours
    DIFFOC_DATA=... python tools/spread.py --methods control --jitters 1 2 3

The first eight faces of every method and task are computed again with weights and measurements
multiplied by 1 + 1e-6 z (see `portability.py`), and compared with their records, of other CPUs.
What was computed is kept in build/portable/spread.csv and not computed again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

from portability import perturb

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "build" / "portable" / "spread.csv"
SPREAD = ROOT / "data" / "records" / "spread_faces64.csv"
METRICS = ("psnr", "ssim")


def main() -> int:
    """Computes what is missing, with one jitter or another, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="all by default")
    parser.add_argument("--tasks", nargs="+", help="all by default")
    parser.add_argument("--jitters", nargs="+", type=int, default=[1], help="seeds of z")
    parser.add_argument("--jitter", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jitter is None:
        # The weights stay as they were loaded, so every jitter has its own process.
        import subprocess

        for jitter in args.jitters:
            subprocess.run([sys.executable, *sys.argv, "--jitter", str(jitter)], check=True)
        summarise()
        return 0
    perturb(args.jitter)
    import torch

    from diffoc.experiments import records
    from diffoc.experiments.cells import Computer

    torch.set_flush_denormal(True)
    cells: dict[tuple[str, str], records.Cell] = {}
    known = records.read(ROOT / "data" / "records" / "table1_faces64.csv")
    for cell, rows in known.items():
        if cell.prior == "faces64" and cell.nfe == 300 and rows[0]["status"] == "ok":
            cells.setdefault((cell.method, cell.task), cell)
    done = {(row["jitter"], row["method"], row["task"]) for row in runs()}
    for (method, task), cell in cells.items():
        wanted = (not args.methods or method in args.methods) and (
            not args.tasks or task in args.tasks
        )
        if not wanted or (str(args.jitter), method, task) in done:
            continue
        again, _ = Computer()(cell)
        with RUNS.open("a", newline="") as file:
            writer = csv.writer(file)
            for old, new in zip(known[cell], again, strict=True):
                differences = [float(new[key]) - float(old[key]) for key in METRICS]
                writer.writerow([args.jitter, method, task, old["image"], *differences])
        print(args.jitter, method, task, flush=True)
    return 0


def runs() -> list[dict[str, str]]:
    """What was computed: a row for every face."""
    if not RUNS.exists():
        RUNS.parent.mkdir(parents=True, exist_ok=True)
        RUNS.write_text(",".join(["jitter", "method", "task", "image", *METRICS]) + "\n")
    with RUNS.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise() -> None:
    """Writes the greatest change of a face, and of the mean over faces, of each method and task."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in runs():
        groups[row["method"], row["task"]][row["jitter"]].append(row)
    head = ["method", "task", "faces", "jitters"]
    head += [f"{key}_{of}" for key in METRICS for of in ("face", "mean")]
    with SPREAD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for (method, task), jitters in sorted(groups.items()):
            numbers = []
            for key in METRICS:
                changes = [[float(row[key]) for row in rows] for rows in jitters.values()]
                numbers.append(max(abs(change) for some in changes for change in some))
                numbers.append(max(abs(sum(some) / len(some)) for some in changes))
            faces = min(map(len, jitters.values()))
            writer.writerow([method, task, faces, len(jitters), *(f"{n:.2g}" for n in numbers)])
    print(SPREAD.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())

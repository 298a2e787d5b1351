"""Cells of a method of no cost. Workers import this file, and not the tests', which takes long."""

import os
import time
from pathlib import Path

import torch

from diffoc.experiments.records import METRICS, Cell
from diffoc.experiments.runs import method_errors, worker_number
from diffoc.problems.tasks import UnsupportedTask

CELLS = [
    Cell("none", "float32", task, "fake", 5, "{}", seed, tuple("abc"[: 1 + seed % 3]))
    for task in ("one", "two")
    for seed in range(6)
]


def fake(cell):
    """Numbers that depend on the cell alone."""
    if (cell.task, cell.seed) == ("two", 3):
        raise UnsupportedTask("not this one")
    rows = []
    for name in cell.images:
        number = cell.seed + len(cell.task + name) / 7
        rows.append({key: f"{number:.9g}" for key in METRICS} | {"evaluations": str(cell.nfe)})
    return rows, torch.full((len(cell.images), 1), float(cell.seed))


def without_b(cell):
    with method_errors():
        if "b" in cell.images:
            raise RuntimeError("b broke")
    return fake(cell)


def sleeping(cell):
    """The third cell takes longer than the test."""
    (Path(os.environ["WORKERS"]) / str(os.getpid())).touch()
    if cell.seed > 1:
        time.sleep(60)
    return fake(cell)


def in_workers(cell):
    """Says in which process it was, with how many threads and with what number."""
    rows, images = fake(cell)
    time.sleep(0.02)  # so that both have some
    who = f"{os.getpid()} {torch.get_num_threads()} {worker_number(os.getppid())}"
    return [row | {"error": who} for row in rows], images

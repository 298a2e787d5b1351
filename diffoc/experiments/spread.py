"""By how much rounding moves the metrics of a method on a task, as `tools/spread.py` measured it.

Another CPU, another number of threads, or weights and measurements that differ in the last digit
of float32 all change what an optimiser finds. `data/records/spread_faces64.csv` has, for methods
and tasks of Table 1, the greatest change of a face's PSNR and SSIM and of their means over faces.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from diffoc.data.provenance import ROOT

SPREAD = ROOT / "data" / "records" / "spread_faces64.csv"
MARGIN = 3
"""How many of the changes that were measured a number may be off by."""

LEAST = {"psnr": 0.003, "ssim": 0.0003}
"""Which is what is allowed at least."""

UNMEASURED = {"psnr": 0.3, "ssim": 0.02, "lpips_alex": 0.02, "lpips_vgg": 0.02}
"""What is allowed where nothing was measured, absolute."""

UNMEASURED_RELATIVE = 0.1
"""The same, of metrics not named there."""


@cache
def measured(path: Path = SPREAD) -> dict[tuple[str, str], dict[str, float]]:
    """Returns the columns of the table, such as "psnr_face" and "psnr_mean", by method and task.

    Raises:
        FileNotFoundError: if it is missing.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row.pop("method"), row.pop("task")): {key: float(row[key]) for key in row}
            for row in csv.DictReader(file)
        }


def tolerance(metric: str, method: str, task: str, value: float) -> float:
    """Returns what a face's metric may be off by on another machine.

    Args:
        metric, method, task: their names in the records.
        value: of the record, for metrics whose tolerance is relative.
    """
    found = measured().get((method, task), {}).get(f"{metric}_face")
    if found is not None:
        return max(MARGIN * found, LEAST[metric])
    return UNMEASURED.get(metric, UNMEASURED_RELATIVE * abs(value))


def of_mean(metric: str, method: str, task: str) -> float | None:
    """Returns the greatest change of a mean over faces; None where it was not measured."""
    return measured().get((method, task), {}).get(f"{metric}_mean")

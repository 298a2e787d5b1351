"""By how much rounding moves the metrics of a method on a task, as `tools/spread.py` measured it.

Another CPU, another number of threads, or weights and measurements that differ in the last digit
of float32 all change what an optimiser finds. `data/records/spread_faces64.csv` has, for methods
and tasks of Table 1, the greatest change of a face's PSNR and SSIM and of their means over faces.
In bfloat16 rounding depends on the CPU's instructions, and changes more.
"""

from functools import cache

import pandas as pd

from diffoc.data.provenance import ROOT
from diffoc.experiments.records import Cell

SPREAD = ROOT / "data" / "records" / "spread_faces64.csv"
MARGIN = 3
"""How many times the measured change a number may be off by."""

LEAST = {"psnr": 0.003, "ssim": 0.0003}
"""The least change that is allowed."""

COLUMNS = ["psnr_face", "psnr_mean", "ssim_face", "ssim_mean"]

UNMEASURED = {"psnr": 0.3, "ssim": 0.02, "lpips_alex": 0.02, "lpips_vgg": 0.02}
"""The change that is allowed where none was measured; a tenth of the value for others."""


@cache
def measured() -> dict[tuple[str, str, str], dict[str, float]]:
    """Returns numbers by the names of :data:`COLUMNS`, by method, task and precision."""
    return pd.read_csv(SPREAD).set_index(["method", "task", "precision"])[COLUMNS].to_dict("index")


def tolerance(metric: str, cell: Cell, value: float) -> float:
    """Returns what a metric of a face of a cell may be off by on another machine.

    The value is that of the record, for metrics whose tolerance is relative.
    """
    for precision in (cell.precision, "bfloat16"):  # which rounds more
        columns = measured().get((cell.method, cell.task, precision), {})
        if f"{metric}_face" in columns:
            return max(MARGIN * columns[f"{metric}_face"], LEAST[metric])
    return UNMEASURED.get(metric, 0.1 * abs(value))


def of_mean(metric: str, method: str, task: str) -> float | None:
    """Returns the greatest change of a mean over faces, in any precision; None if unmeasured."""
    key = f"{metric}_mean"
    changes = [
        columns[key]
        for (*place, _), columns in measured().items()
        if place == [method, task] and key in columns
    ]
    return max(changes, default=None)

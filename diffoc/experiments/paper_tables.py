"""What the cells of the paper's tables say of each other.

The numbers are the paper's, from `data/paper_tables.json`, the functions' results ours;
`data/claims.yaml` names them, and :mod:`diffoc.experiments.ledger` compares.
"""

import json
import math
from collections.abc import Sequence
from itertools import product

from diffoc import recipe
from diffoc.data.provenance import ROOT

TASKS = recipe.TASKS[:5]
"""Of the paper's tables; our records of Table 1 have the metrics of Table 3 too."""

_FROM_DPS = ("dps", "ddrm", "mcg", "pnp_admm", "score_sde", "admm_tv")
"""The methods whose numbers are those of the paper of DPS, arXiv:2209.14687."""


def table_1_firsts_at_2500() -> float:
    """Counts the columns, of ten, where the paper's method with NFE 2500 is ahead of all others."""
    return _table_1_firsts("Ours (NFE = 2500)")


def table_1_firsts_at_1000() -> float:
    """Counts the same with NFE 1000, the budget of the other diffusion methods."""
    return _table_1_firsts("Ours (NFE = 1000)")


def table_1_firsts_at_1000_exchanged() -> float:
    """Counts the same with the inpainting columns of the methods of DPS's paper exchanged.

    DPS's FID of random inpainting, 21.19, stands under box inpainting: see issue 8 of
    github.com/DPS2022/diffusion-posterior-sampling, which quotes it.
    """
    return _table_1_firsts("Ours (NFE = 1000)", exchanged=True)


def table_3_firsts_by_psnr() -> float:
    """Counts the tasks, of five, where the paper's method has the highest PSNR."""
    ours, *rest = _paper("table3")
    return _firsts(ours, rest, ["psnr"], 1)


def table_3_firsts_by_ssim() -> float:
    """Counts the tasks, of five, where it has the highest SSIM."""
    ours, *rest = _paper("table3")
    return _firsts(ours, rest, ["ssim"], 1)


def table_3_gap() -> float:
    """Returns the largest difference between a printed PSNR and that of the printed MSE, in dB."""
    return max(abs(gap) for gap in _gaps("table3"))


def table_4_gap() -> float:
    """Returns the same of Table 4, row k = 0."""
    return max(abs(gap) for gap in _gaps("table4")[:2])


def table_4_gap_of_the_rest() -> float:
    """Returns the same of Table 4's other rows."""
    return max(abs(gap) for gap in _gaps("table4")[2:])


def table_4_gain_by_psnr() -> float:
    """Returns what rank 1 gains over rank 0 in PSNR, super-resolution, in dB."""
    first, second = (row["super_resolution"]["psnr"] for row in _paper("table4")[:2])
    return second - first


def table_4_gain_by_mse() -> float:
    """Returns the same from the printed MSE."""
    first, second = (row["super_resolution"]["mse"] for row in _paper("table4")[:2])
    return _psnr(second) - _psnr(first)


def table_5_spread() -> float:
    """Returns the largest range of the printed PSNR over Table 5's positive constants, in dB."""
    columns = ([row[task]["psnr"] for row in _paper("table5")[1:]] for task in TASKS[:2])
    return max(max(column) - min(column) for column in columns)


def table_6_gap() -> float:
    """Returns what :func:`table_3_gap` does, of Table 6."""
    return max(abs(gap) for gap in _gaps("table6"))


def table_6_gap_rotated() -> float:
    """Returns the same with the second PSNR of a column put last."""
    worst = 0.0
    for task in TASKS[:2]:
        psnr, mse = ([row[task][name] for row in _paper("table6")] for name in ("psnr", "mse"))
        rotated = [psnr[0], *psnr[2:], psnr[1]]
        worst = max(worst, *(abs(p - _psnr(m)) for p, m in zip(rotated, mse, strict=True)))
    return worst


def _paper(table: str) -> list[dict]:
    return json.loads((ROOT / "data" / "paper_tables.json").read_text(encoding="utf-8"))[table]


def _psnr(mse: float) -> float:
    """Returns the PSNR of a mean squared error on the scale 0 to 255."""
    return 10 * math.log10(255**2 / mse)


def _gaps(table: str) -> list[float]:
    """Returns the printed PSNR minus that of the printed MSE, row by row."""
    cells = [row[task] for row in _paper(table) for task in TASKS if task in row]
    return [cell["psnr"] - _psnr(cell["mse"]) for cell in cells if cell["psnr"] is not None]


def _table_1_firsts(label: str, exchanged: bool = False) -> float:
    rows = _paper("table1")
    for row in rows:
        if exchanged and row["method"] in _FROM_DPS:
            box, random = row["box_inpainting"], row["random_inpainting"]
            row["box_inpainting"], row["random_inpainting"] = random, box
    (ours,) = (row for row in rows if row["label"] == label)
    rest = [row for row in rows if row["method"] != ours["method"]]
    return _firsts(ours, rest, ("fid", "lpips"), -1)


def _firsts(ours: dict, rest: list[dict], metrics: Sequence[str], sign: int) -> float:
    """Counts the columns where a row is ahead of the rest; `sign` is 1 where more is better."""
    count = 0.0
    for task, metric in product(TASKS, metrics):
        others = [sign * row[task][metric] for row in rest if row[task][metric] is not None]
        count += sign * ours[task][metric] > max(others)
    return count

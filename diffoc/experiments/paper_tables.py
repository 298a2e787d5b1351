"""What the cells of the paper's tables say of each other.

The cells are the paper's, from `data/paper_tables.json`. What :data:`NUMBERS` computes of them is
ours: `data/claims.yaml` names these numbers, and :mod:`diffoc.experiments.ledger` compares.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import product

from diffoc import recipe
from diffoc.data.provenance import ROOT

TASKS = recipe.TASKS[:5]
"""The tasks of the paper's tables; our records of Table 1 have the metrics of Table 3 too."""

_FROM_DPS = ("dps", "ddrm", "mcg", "pnp_admm", "score_sde", "admm_tv")
"""The methods whose numbers are those of the paper of DPS, arXiv:2209.14687."""


def paper_rows(table: str) -> list[dict]:
    """Returns the paper's own rows of a table, from `data/paper_tables.json`."""
    return json.loads((ROOT / "data" / "paper_tables.json").read_text(encoding="utf-8"))[table]


def _psnr(mse: float) -> float:
    """Returns the PSNR of a mean squared error on the scale 0 to 255."""
    return 10 * math.log10(255**2 / mse)


def _gap(table: str, part: slice = slice(None)) -> float:
    """Returns by how many dB a printed PSNR is at most off that of the printed MSE.

    The part is one of the cells, which are in the order of rows.
    """
    cells = [row[task] for row in paper_rows(table) for task in TASKS if task in row]
    gaps = [cell["psnr"] - _psnr(cell["mse"]) for cell in cells if cell["psnr"] is not None]
    return max(map(abs, gaps[part]))


def _table_1_firsts(nfe: int, exchanged: bool = False) -> float:
    """Counts the columns, of ten, where the paper's method is ahead of all others.

    The inpainting columns of the methods of DPS's paper may be exchanged: DPS's FID of random
    inpainting, 21.19, stands under box inpainting, see issue 8 of
    github.com/DPS2022/diffusion-posterior-sampling, which quotes it.
    """
    rows = paper_rows("table1")
    for row in rows:
        if exchanged and row["method"] in _FROM_DPS:
            box, random = row["box_inpainting"], row["random_inpainting"]
            row["box_inpainting"], row["random_inpainting"] = random, box
    (ours,) = (row for row in rows if row["label"] == f"Ours (NFE = {nfe})")
    rest = [row for row in rows if row["method"] != ours["method"]]
    return _firsts(ours, rest, ("fid", "lpips"), -1)


def _table_3_firsts(metric: str) -> float:
    """Counts the tasks, of five, where the paper's method has the highest PSNR or SSIM."""
    ours, *rest = paper_rows("table3")
    return _firsts(ours, rest, [metric], 1)


def _firsts(ours: dict, rest: list[dict], metrics: Sequence[str], sign: int) -> float:
    """Counts the columns where a row is ahead of the rest; `sign` is 1 where more is better."""
    count = 0.0
    for task, metric in product(TASKS, metrics):
        others = [sign * row[task][metric] for row in rest if row[task][metric] is not None]
        count += sign * ours[task][metric] > max(others)
    return count


def _table_4_gain(psnr: Callable[[dict], float]) -> float:
    """Returns what rank 1 gains over rank 0 in PSNR, super-resolution, in dB."""
    first, second = (psnr(row["super_resolution"]) for row in paper_rows("table4")[:2])
    return second - first


def _table_5_spread() -> float:
    """Returns the largest range of the printed PSNR over Table 5's positive constants, in dB."""
    columns = ([row[task]["psnr"] for row in paper_rows("table5")[1:]] for task in TASKS[:2])
    return max(max(column) - min(column) for column in columns)


def _table_6_gap_rotated() -> float:
    """Returns Table 6's :func:`_gap` with the second PSNR of a column put last."""
    worst = 0.0
    for task in TASKS[:2]:
        psnr, mse = ([row[task][name] for row in paper_rows("table6")] for name in ("psnr", "mse"))
        rotated = [psnr[0], *psnr[2:], psnr[1]]
        worst = max(worst, *(abs(p - _psnr(m)) for p, m in zip(rotated, mse, strict=True)))
    return worst


NUMBERS: dict[str, Callable[[], float]] = {
    "table_1_firsts_at_2500": lambda: _table_1_firsts(2500),
    "table_1_firsts_at_1000": lambda: _table_1_firsts(1000),
    "table_1_firsts_at_1000_exchanged": lambda: _table_1_firsts(1000, exchanged=True),
    "table_3_firsts_by_psnr": lambda: _table_3_firsts("psnr"),
    "table_3_firsts_by_ssim": lambda: _table_3_firsts("ssim"),
    "table_3_gap": lambda: _gap("table3"),
    "table_4_gap": lambda: _gap("table4", slice(2)),  # k = 0
    "table_4_gap_of_the_rest": lambda: _gap("table4", slice(2, None)),
    "table_4_gain_by_psnr": lambda: _table_4_gain(lambda cell: cell["psnr"]),
    "table_4_gain_by_mse": lambda: _table_4_gain(lambda cell: _psnr(cell["mse"])),
    "table_5_spread": _table_5_spread,
    "table_6_gap": lambda: _gap("table6"),
    "table_6_gap_rotated": _table_6_gap_rotated,
}
"""What the ledger may name."""

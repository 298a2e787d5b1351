"""Writes the tables of faces in README.md and docs/results.md again, from the records.

    python tools/tables.py

A table is known by the first cell of its head, and text around it stays. What new records change
in the sentences is for a person to mend; the script prints how many differences are beyond chance.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from diffoc.experiments.methods import METHODS
from diffoc.experiments.paper_tables import TASKS
from diffoc.experiments.records import rows_of
from diffoc.experiments.summary import by_image, differences, paired, select

ROOT = Path(__file__).parents[1]
IN_README = ("OURS", "PnP-ADMM", "DiffPIR", "DDRM", "DPS")
OURS, PAPERS = "ours", ("paper", "released")

Table = dict[str, list[str]]
"""The cells of a table's rows by their first ones: one for each task."""


def rows_with(nfe: int, records: str = "table1") -> pd.DataFrame:
    """Returns the results with a budget, of the methods and tasks that have all 32 faces.

    A ValueError tells of a method with several settings for a task: which of them does not.
    """
    rows = rows_of(ROOT / "data" / "records" / f"{records}_faces64.csv")
    rows = rows[(rows["nfe"] == nfe) & (rows["status"] == "ok")]
    each = rows.groupby(["method", "task"])
    for (method, task), settings in each["settings"].unique().items():
        if len(settings) > 1:
            raise ValueError(f"{method} has {', '.join(settings)} for {task}: keep the rows of one")
    return rows[each["image"].transform("nunique") == 32]


def cells(form: Callable[..., str], *some: pd.DataFrame) -> list[str]:
    """Returns a cell for each task, of the rows that each of the tables has of it, or a dash."""
    of_task = [[select(rows, task=task) for rows in some] for task in TASKS]
    return [form(*each) if all(map(len, each)) else "–" for each in of_task]


def score(rows: pd.DataFrame) -> str:
    """Returns mean PSNR and SSIM."""
    psnr, ssim = (by_image(rows, metric).mean() for metric in ("psnr", "ssim"))
    return f"{psnr:.2f} / {ssim:.3f}"


def work(rows: pd.DataFrame) -> str:
    """Returns mean evaluations F and products B."""
    return ", ".join(f"{rows[metric].mean():.0f}" for metric in ("evaluations", "products"))


def gap(first: pd.DataFrame, second: pd.DataFrame, metric: str = "psnr", digits: int = 2) -> str:
    """Returns the paired difference in a metric, with its interval."""
    mean, half = paired(first, second, metric)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def residuals(*some: pd.DataFrame) -> str:
    """Returns mean residuals in units of the noise."""
    return " / ".join(f"{rows['residual_over_noise'].mean():.2f}" for rows in some)


def split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the rows of each method, in the order of their PSNR on the first task."""
    first = select(rows, task=TASKS[0]).groupby("method")["psnr"].mean()
    names = dict.fromkeys(rows["method"])
    return {
        name: select(rows, method=name) for name in sorted(names, key=lambda n: -first.get(n, 0))
    }


def label(method: str) -> str:
    """Returns a method's name in tables."""
    return METHODS[method].label


def with_work(method: str, rows: pd.DataFrame) -> str:
    """Returns a method's name with the evaluations that most of its images took."""
    return f"{label(method)}, {rows['evaluations'].median():.0f} evaluations"


def headline(thousand: pd.DataFrame) -> Table:
    """Returns the paper's algorithm with its settings for NFE 2500, beside those for 1000."""
    rows = rows_of(ROOT / "data" / "records" / "table1_faces64.csv")
    rows = rows[rows["nfe"] == 2500]
    same = thousand.merge(rows[["task", "image"]])
    return {
        "faces": cells(lambda some: str(len(some)), rows),
        "PAPER, NFE 2500": cells(score, rows),
        "PAPER, NFE 1000": cells(score, same),
        "the first minus the second": cells(gap, rows, same),
        "residuals": cells(residuals, rows, same),
    }


def tables() -> dict[str, Table]:
    """Maps the first cell of a table's head to its rows."""
    usual, more, most = (split(rows_with(nfe)) for nfe in (300, 570, 1000))
    ours, papers = usual[OURS], [most[name] for name in PAPERS]
    equal = {label(name): cells(score, rows) for name, rows in more.items()}
    equal |= {f"OURS minus {label(name)}": cells(gap, ours, rows) for name, rows in more.items()}
    again = split(rows_with(300, "operators"))
    second = {label(name): cells(score, rows) for name, rows in again.items()}
    second |= {
        f"OURS minus {label(name)}": cells(gap, again[OURS], rows)
        for name, rows in again.items()
        if name != OURS
    }
    their = {f"{label(name)}, NFE 1000": cells(score, most[name]) for name in PAPERS}
    their |= {f"OURS minus {label(name)}": cells(gap, ours, most[name]) for name in PAPERS}
    their |= {f"{label(name)} minus DPS": cells(gap, most[name], usual["dps"]) for name in PAPERS}
    their |= {"residual, PAPER / RELEASED / OURS": cells(residuals, *papers, ours)}
    return {
        "method": {label(name): cells(score, rows) for name, rows in usual.items()},
        "F / B": {label(name): cells(work, rows) for name, rows in usual.items()},
        "OURS minus PnP-ADMM": {
            "PSNR, dB": cells(gap, ours, usual["pnp_admm"]),
            "SSIM": cells(partial(gap, metric="ssim", digits=3), ours, usual["pnp_admm"]),
        },
        "another operator": second,
        "570 evaluations": equal,
        "32 faces": their,
        "the same faces": headline(most["paper"]),
    }


def written(text: str, found: dict[str, Table]) -> str:
    """Returns a page with these tables in place of those that have their heads."""
    for head, rows in found.items():
        titles = [task.replace("_", " ") for task in TASKS]
        start = re.search(
            rf"^\| {re.escape(head)} \|(.*)\|\n(\| -.*\n)(\|.*\n)*", text, re.MULTILINE
        )
        if start is None:
            raise ValueError(f"there is no table that starts with {head!r}")
        kept = [titles.index(title.strip()) for title in start[1].split("|")]
        body = "".join(
            f"| {' | '.join([first, *(row[i] for i in kept)])} |\n" for first, row in rows.items()
        )
        table = f"| {head} |{start[1]}|\n{start[2]}{body}"
        text = text[: start.start()] + table + text[start.end() :]
    return text


def pages() -> dict[Path, str]:
    """Maps the two pages to what they should be."""
    found, most = tables(), split(rows_with(1000))
    scores = {name: found["method"][name] for name in IN_README}
    scores |= {with_work(name, most[name]): cells(score, most[name]) for name in PAPERS}
    readme = {"PSNR in dB / SSIM": scores}
    return {
        ROOT / name: written((ROOT / name).read_text(encoding="utf-8"), some)
        for name, some in (("docs/results.md", found), ("README.md", readme))
    }


def main() -> None:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    gaps = differences(rows_with(300), OURS, 300, "psnr")
    ahead = sum(each.corrected < 0.05 and each.mean > 0 for each in gaps)
    print(f"ours is ahead in {ahead} of {len(gaps)} comparisons in PSNR")


if __name__ == "__main__":
    main()

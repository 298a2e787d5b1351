"""The figures for print of the grids of :mod:`diffoc.experiments.ablations`, from their records."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from diffoc.experiments import ablation_summary as summary
from diffoc.experiments.records import rows_of
from diffoc.figures import plots

PSNR = "PSNR (dB)"


def _tables(folder: Path, pattern: str) -> Iterator[tuple[Path, pd.DataFrame]]:
    """Yields the paths and rows of the tables that have any."""
    for path in sorted(folder.glob(pattern)):
        if len(rows := rows_of(path)):
            yield path, rows


def from_ablations(folder: Path) -> Iterator[tuple[str, Figure, tuple[str, ...]]]:
    """Yields Figures 3 and 6 and Tables 4 to 6, of what has been run: names, figures, records.

    The folder has `few_steps_*.csv`, `rank_*.csv` and `robustness_*.csv`; each may be missing.
    """
    for path, rows in _tables(folder, "few_steps_*.csv"):
        for name, panels, xlabel in (
            ("budget", summary.equal_budgets(rows, "psnr"), "evaluations"),
            ("horizon", summary.equal_horizons(rows, "psnr"), "steps $T$"),
        ):
            if panels:
                figure = plots.quality_curves(panels, xlabel, PSNR)
                yield f"{path.stem}_{name}", figure, (path.name,)
    for path, rows in _tables(folder, "rank_*.csv"):
        if panels := summary.by_rank(rows, "psnr"):
            figure = plots.quality_curves(panels, "rank $k$", PSNR, logarithmic=False)
            yield path.stem, figure, (path.name,)
        if panels := summary.by_constant(rows, "psnr"):
            xlabel = "Tikhonov's constant $a$"
            figure = plots.quality_curves(panels, xlabel, PSNR, ticks=summary.CONSTANTS)
            yield f"{path.stem}_constant", figure, (path.name,)
    for path, rows in _tables(folder, "robustness_*.csv"):
        known = set(rows["prior"].map(summary.prior_label))
        priors = [name for name in summary.PRIORS if name in known]
        if panels := summary.by_prior(rows, "psnr", priors):
            yield path.stem, plots.quality_curves(panels, "prior", PSNR, ticks=priors), (path.name,)

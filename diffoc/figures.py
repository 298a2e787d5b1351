"""Figures: one style for all, and where they are kept."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

# Okabe & Ito's palette, distinguishable with every colour vision deficiency.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
}


def use_style() -> None:
    """Sets matplotlib's defaults to the project's style, for the running process."""
    mpl.rcParams.update(
        {
            "axes.prop_cycle": mpl.cycler(color=list(COLORS.values())),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "figure.dpi": 96,
            "figure.constrained_layout.use": True,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
            "lines.linewidth": 1.5,
        }
    )


def save(figure: Figure, name: str) -> Path:
    """Writes a figure as PNG and returns its path.

    It goes to the folder that the environment variable DIFFOC_FIGURES names, by default the
    project's `figures/`. The file has no date or version in it, so that equal figures are equal
    files.

    Args:
        figure: what to write.
        name: the file's name without its ending.
    """
    default = Path(__file__).resolve().parent.parent / "figures"
    folder = Path(os.environ.get("DIFFOC_FIGURES", default))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def sheet(images: Tensor, columns: int) -> Tensor:
    """Images side by side, in rows.

    Args:
        images: (B, 1, H, W) in [-1, 1]; what lies outside is clipped.
        columns: of the sheet; the last row is filled up with black.

    Returns:
        (rows * H, columns * W) uint8.
    """
    count, _, height, width = images.shape
    rows = -(-count // columns)
    filled = images.new_full((rows * columns, height, width), -1.0)
    filled[:count] = images[:, 0]
    grid = filled.reshape(rows, columns, height, width).transpose(1, 2)
    pixels = (grid.reshape(rows * height, columns * width) + 1) * 127.5
    return pixels.round().clamp(0, 255).byte()


def write_sheet(images: Tensor, path: Path, columns: int = 8) -> None:
    """Writes a :func:`sheet` as picture, each pixel twice as large."""
    pixels = sheet(images.cpu(), columns).numpy()
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(path)

"""Figures: one style for all, and where they are kept.

The notebooks save theirs with :func:`save`. Those for print are drawn by
:mod:`diffoc.figures.plots` and written with their sources by :func:`save_for_print`;
`python -m diffoc figures` makes them all.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.typing import RcKeyType
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from diffoc.data.files import replacing
from diffoc.data.provenance import ROOT, commit

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
MARKERS = "os^DvPX"

WIDTH = 5.5
"""Inches of a column of text in the paper's format (NeurIPS)."""

_BOTH: dict[RcKeyType, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}

PRINT = _BOTH | {
    # Opaque white, so that a dark page does not swallow the axes.
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.prop_cycle": cycler(color=list(COLORS.values()), marker=list(MARKERS)),
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # letters stay letters: type 3 is refused by some publishers
}
"""Sizes that need no scaling; lines differ by marker, too, for who prints in grey."""


def use_style() -> None:
    """Sets matplotlib's defaults to the project's style, for the running process."""
    own: dict[RcKeyType, Any] = {
        "axes.prop_cycle": cycler(color=list(COLORS.values())),
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "figure.dpi": 96,
        "lines.linewidth": 1.5,
    }
    mpl.rcParams.update(_BOTH | own)


def save(figure: Figure, name: str) -> Path:
    """Writes a figure as NAME.png into :func:`figure_folder`, and returns its path."""
    path = figure_folder() / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:  # without date and version equal figures are equal files
        figure.savefig(part, dpi=150, metadata={"Software": None})
    return path


def save_for_print(
    figure: Figure, name: str, sources: Sequence[str], folder: Path | None = None
) -> tuple[Path, Path]:
    """Writes a figure at its own size as PDF and PNG, and returns the two paths.

    The files' metadata say where it comes from: their name, without ending, is also their title,
    and the sources name records, or what was computed instead. The folder is by default `print`
    where :func:`save` writes.
    """
    folder = folder or figure_folder() / "print"
    folder.mkdir(parents=True, exist_ok=True)
    origin = f"commit {commit() or 'unknown'}; from {', '.join(sources)}"
    pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
    of_pdf = {"Title": name, "Subject": origin, "CreationDate": None}
    of_png = {"Title": name, "Description": origin, "Software": None}
    with mpl.rc_context(PRINT):
        with replacing(pdf) as part:
            figure.savefig(part, metadata=of_pdf)
        with replacing(png) as part:
            figure.savefig(part, dpi=300, metadata=of_png)
    return pdf, png


def figure_folder() -> Path:
    """Returns the folder that DIFFOC_FIGURES names, by default the project's `figures/`."""
    return Path(os.environ.get("DIFFOC_FIGURES", ROOT / "figures"))


def sheet(images: Tensor, columns: int) -> Tensor:
    """Returns images side by side, in rows of so many columns, the last filled up with black.

    They are grey (B, 1, H, W) or colour (B, 3, H, W) in [-1, 1]; what lies outside is clipped. The
    sheet is (rows * H, columns * W) uint8, or (rows * H, columns * W, 3) in colour.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    filled = images.new_full((rows * columns, channels, height, width), -1.0)
    filled[:count] = images
    grid = filled.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * height, columns * width, channels) + 1) * 127.5
    return pixels.round().clamp(0, 255).byte().squeeze(2)


def show(ax: Axes, image: Tensor) -> None:
    """Shows an image (C, H, W) of one channel or three, by what lies in [-1, 1]."""
    pixels = ((image.detach().cpu().float() + 1) / 2).clamp(0, 1).movedim(0, -1)
    ax.imshow(pixels.squeeze(-1), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def write_sheet(images: Tensor, path: Path, columns: int = 8, labels: Sequence[str] = ()) -> None:
    """Writes a :func:`sheet` as picture, each pixel twice as large, its rows labelled if wished."""
    pixels = sheet(images.cpu(), columns).numpy()
    picture = Image.fromarray(pixels.repeat(2, 0).repeat(2, 1))
    if labels:
        height = 2 * images.shape[-2]
        font = ImageFont.load_default(height / 8)
        margin = round(max(map(font.getlength, labels)) + height / 8)
        picture = ImageOps.expand(picture.convert("RGB"), (margin, 0, 0, 0), "white")
        draw = ImageDraw.Draw(picture)
        for row, label in enumerate(labels):
            place = (margin / 2, (row + 0.5) * height)
            draw.text(place, label, fill="black", font=font, anchor="mm")
    picture.save(path)

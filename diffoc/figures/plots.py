r"""One function for each figure for print: data in, figure out.

Widths are those of the paper's text, colours those of :data:`diffoc.figures.COLORS`. Nothing is
computed, read or written here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from diffoc.experiments.summary import Curve
from diffoc.figures import COLORS, MARKERS, PRINT, WIDTH, show


@mpl.rc_context(PRINT)
def steering(
    side: Tensor,
    density: Tensor,
    free: Tensor,
    controlled: Mapping[str, Tensor],
    measured: float,
    noise_std: float,
) -> Figure:
    """Draws paths in the plane with and without control, as the paper's Figure 1 sketches them.

    The prior's density (G, G) has rows along the second coordinate, on a grid of ascending
    coordinates `side`. States without control are (T + 1, B, 2), noise first; `controlled` has
    panels' titles and such states. The first coordinate was measured, with a noise that is half of
    the band's width.
    """
    figure = Figure(figsize=(WIDTH, 0.05 + WIDTH / len(controlled)))
    axes = figure.subplots(1, len(controlled), sharey=True, squeeze=False)[0]
    levels = density.max().item() * (0.03 + 0.97 * np.linspace(0, 1, 10))
    for ax, (title, states) in zip(axes, controlled.items(), strict=True):
        ax.contourf(side, side, density, levels=levels, cmap="Greys", alpha=0.5)
        band = {"color": COLORS["orange"], "alpha": 0.3, "lw": 0}
        ax.axvspan(measured - noise_std, measured + noise_std, label="measurement", **band)
        plain = {"marker": "", "lw": 0.9}
        for b in range(free.shape[1]):
            ax.plot(*free[:, b].T, ls=":", color=COLORS["black"], **plain)
            ax.plot(*states[:, b].T, color=COLORS["vermilion"], **plain)
        ax.plot(*free[0].T, "o", color="white", mec="black", mew=0.6)
        ax.plot(*free[-1].T, "o", color=COLORS["black"])
        ax.plot(*states[-1].T, "o", color=COLORS["vermilion"])
        ax.plot([], [], "o", color="white", mec="black", mew=0.6, label="noise $x_T$")
        ax.plot([], [], ":o", color=COLORS["black"], label="without control")
        ax.plot([], [], "-o", color=COLORS["vermilion"], label="with control")
        ax.set(title=title, xlabel="first coordinate, measured", aspect="equal")
    axes[0].set_ylabel("second coordinate")
    axes[0].legend(loc="lower left")
    return figure


@mpl.rc_context(PRINT)
def predicted_x0(
    times: Sequence[float], states: Tensor, tweedie: Tensor, rollout: Tensor, truth: Tensor
) -> Figure:
    """Draws the image that a state stands for, by Tweedie's formula and by rollout: Figure 2.

    The K states (K, C, H, W) are at times from 1, noise, to 0. The two predictions of x_0 from them
    have their shape; the truth is (C, H, W). What is shown lies in [-1, 1].
    """
    rows = {"$x_t$": states, "Tweedie": tweedie, "rollout": rollout}
    figure, axes = _grid(len(rows), len(times) + 1, truth.shape[-2:])
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, [*images, truth], strict=True):
            show(ax, image)
        line[0].set_ylabel(name)
    for ax, t in zip(axes[0], times, strict=False):
        ax.set_title(f"$t = {t:.2f}$")
    axes[0, -1].set_title("truth")
    return figure


@mpl.rc_context(PRINT)
def reconstructions(
    columns: Mapping[str, Sequence[Tensor]],
    rows: Sequence[str],
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draws truth, measurement and reconstructions side by side: Figures 3 and 4.

    Columns have titles and images from top to bottom, one for each of the named rows, (C, H, W), of
    one size or several, clipped to [-1, 1], and perhaps a caption for each, which may be empty.
    """
    shape = next(iter(columns.values()))[0].shape[-2:]
    figure, axes = _grid(len(rows), len(columns), shape, bool(captions))
    for column, (name, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(name)
        for b, (ax, image) in enumerate(zip(column, images, strict=True)):
            show(ax, image)
            if captions and name in captions and captions[name][b]:
                ax.set_xlabel(captions[name][b], labelpad=2)
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name)
    return figure


RECIPES = ("Ours", "OURS", "QUICK", "STOPPED", "COLD", "PAPER", "RELEASED")
"""What the labels of the controller's recipes, and of the paper's own rows, begin with."""


@mpl.rc_context(PRINT)
def metric_by_method(
    values: Mapping[str, Mapping[str, tuple[float, float]]], xlabel: str
) -> Figure:
    """Draws a metric with its interval, methods by tasks, as a picture of Tables 1 and 3.

    Recipes of the controller, :data:`RECIPES`, are vermilion squares, others blue dots. The values
    map a method to a task to mean and half-width of its interval; nan is no interval, and what is
    missing has no dot. The label is the metric and its unit.
    """
    tasks = list(dict.fromkeys(task for means in values.values() for task in means))
    if not tasks:
        raise ValueError("values is empty, expected a mean for at least one method and task")
    figure = Figure(figsize=(WIDTH, 0.7 + 0.17 * len(values)))
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for ax, task in zip(axes, tasks, strict=True):
        for place, (name, means) in enumerate(values.items()):
            if task in means:
                mean, half = means[task]
                marker, color = ("s", "vermilion") if name.startswith(RECIPES) else ("o", "blue")
                ax.errorbar(mean, place, xerr=half, fmt=marker, color=COLORS[color])
        ax.set_title(task.replace("_", "\n"))
        ax.grid(axis="y", lw=0.3, color="0.8")
        ax.margins(x=0.15)
        ax.locator_params(axis="x", nbins=3)
    axes[0].set_yticks(range(len(values)), values)
    axes[0].set_ylim(len(values) - 0.5, -0.5)
    figure.supxlabel(xlabel, fontsize=PRINT["axes.labelsize"])
    return figure


@mpl.rc_context(PRINT)
def quality_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str,
    logarithmic: bool = True,
    ticks: Sequence[str] | None = None,
) -> Figure:
    """Draws means of a metric over a budget or a setting, with intervals: Figure 3, Tables 4 to 6.

    The panels map a title to lines' labels to their curves, as
    :func:`diffoc.experiments.summary.by_budget` does; a half-width of nan is none. The abscissa is
    logarithmic, or its places are equally far apart; with `ticks` these are 0, 1, ... and have such
    names. Labels have units.
    """
    if not panels:
        raise ValueError("panels is empty, expected at least one")
    lines = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + (1.5 if ticks is None else 1.9) * height))
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        places = sorted({x for curve in curves.values() for x, _, _ in curve})
        as_given = logarithmic or ticks is not None
        for name, curve in curves.items():
            number = lines.index(name)
            ax.errorbar(
                [x if as_given else places.index(x) for x, _, _ in curve],
                [mean for _, mean, _ in curve],
                [half for _, _, half in curve],
                color=list(COLORS.values())[number % len(COLORS)],
                # With more lines than colours, a colour comes again with another marker.
                marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
                elinewidth=0.5,
                label=name.replace("_", " "),
            )
        if ticks is not None:
            ax.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor")
        elif logarithmic:
            ax.set_xscale("log")
            ax.set_xticks(places, [f"{x:g}" for x in places], minor=False)
            ax.minorticks_off()
        else:
            ax.set_xticks(range(len(places)), [f"{x:g}" for x in places])
        ax.set_title(title.replace("_", " "))
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.supxlabel(xlabel, fontsize=PRINT["axes.labelsize"])
    figure.supylabel(ylabel, fontsize=PRINT["axes.labelsize"])
    handles: dict[str, Any] = {}
    for ax in axes[: len(panels)]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    artists, ncols = list(handles.values()), min(3, len(lines))
    figure.legend(artists, list(handles), loc="outside upper center", ncols=ncols)
    return figure


@mpl.rc_context(PRINT)
def theorem_errors(
    constants: Sequence[float], errors: Mapping[str, Sequence[float]], bound: float
) -> Figure:
    """Draws what the theorems miss, over Tikhonov's constant, beside the slope -1 of a limit.

    The constants are positive and ascending. The errors map a line's label to its relative errors,
    one for each constant. The bound of rounding is drawn as a level.
    """
    figure = Figure(figsize=(WIDTH, 2.2))
    ax = figure.subplots()
    for name, values in errors.items():
        ax.loglog(constants, values, label=name)
    middle = len(constants) // 2
    scale = next(iter(errors.values()))[middle] * constants[middle]
    guide = [scale / a for a in constants]
    ax.loglog(constants, guide, ":", color="0.4", marker="", label="slope −1")
    ax.axhline(bound, color="0.4", lw=0.7, ls="--", label=f"{bound:g}")
    ax.set(xlabel="Tikhonov's constant $a$", ylabel="relative error", ylim=(1e-17, 10))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@mpl.rc_context(PRINT)
def sizes_over_time(times: Sequence[float], sizes: Mapping[str, Sequence[float]]) -> Figure:
    """Draws lengths of scores, by label, over times in [0, 1], on a logarithmic axis."""
    figure = Figure(figsize=(WIDTH, 2.0))
    ax = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for number, (name, values) in enumerate(sizes.items()):
        ax.semilogy(times, values, ls=styles[number % 4], marker="", label=name)
    ax.set(xlim=(1, 0), xlabel="time $t$, from noise to image", ylabel="length")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _grid(
    rows: int, columns: int, shape: Sequence[int], captions: bool = False
) -> tuple[Figure, np.ndarray]:
    side = (WIDTH - 0.2) / columns
    height = rows * side * shape[0] / shape[1]
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(WIDTH, height + 0.25 + 0.2 * captions), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)

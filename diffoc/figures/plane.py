"""What the notebooks draw in the plane: a prior's density, and a measured coordinate."""

import torch
from matplotlib.axes import Axes

from diffoc.figures import COLORS
from diffoc.theory.rollouts import PlanarMixture


def draw_prior(axis: Axes, setting: PlanarMixture, side: tuple[float, float] = (-3, 4.2)) -> None:
    """Draws the density of x_0 in grey and the measurement as a band, with equal units.

    The density's grid has `side` for its first and last coordinate, in both directions; the limits
    of the axis are left to the caller.
    """
    v = torch.linspace(*side, 180, dtype=torch.float64)
    grid = torch.cartesian_prod(v, v)
    density = setting.prior.log_prob(grid, torch.tensor(1e-3)).exp().reshape(180, 180).T
    axis.contourf(v, v, density, levels=12, cmap="Greys", alpha=0.6)
    y, s = setting.likelihood.y.item(), setting.likelihood.noise_std
    axis.axvspan(y - s, y + s, color=COLORS["orange"], alpha=0.2, lw=0)
    axis.axvline(y, color=COLORS["orange"], lw=1)
    axis.set(aspect="equal", xlabel="first coordinate (measured)", ylabel="second coordinate")

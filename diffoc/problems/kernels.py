"""Random kernels of motion blur."""

import math

import torch
from torch import Tensor

from diffoc.checks import check_within


def motion_kernel(side: int, intensity: float, generator: torch.Generator) -> Tensor:
    """Returns a random motion-blur kernel, (side, side) float64, not negative, with sum 1.

    A camera moves at constant speed along a random path, whose steps and headings have the
    distributions of the library `motionblur` by Levi Borodenko, which DPS and the paper use; its
    line of one pixel at twice the resolution is here a Gaussian of half a pixel. The side is odd;
    the intensity is 0 for a straight line to 1 for a long and winding one.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"side is {side}, expected an odd number")
    check_within(0, 1, intensity=intensity)
    steps = _random_steps(math.hypot(side, side), intensity, generator)
    path = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    path = path - path[1:].mean()
    path = path * torch.exp(1j * math.pi * torch.rand((), generator=generator).double())
    # Points at equal distances along the path, a tenth of a pixel apart.
    lengths = torch.cat([steps.new_zeros(1).real, steps.abs().cumsum(0)])
    at = torch.linspace(0, lengths[-1].item(), max(2, int(10 * lengths[-1])), dtype=torch.float64)
    index = torch.searchsorted(lengths, at, right=True).clamp(1, len(steps))
    share = (at - lengths[index - 1]) / (lengths[index] - lengths[index - 1])
    points = path[index - 1] + share * (path[index] - path[index - 1])
    pixels = torch.arange(side, dtype=torch.float64) - side // 2
    rows, columns = (
        torch.exp(-2 * (pixels[:, None] - part[None]).square())
        for part in (points.imag, points.real)
    )
    kernel = rows @ columns.mT
    return kernel / kernel.sum()


def _random_steps(diagonal: float, intensity: float, generator: torch.Generator) -> Tensor:
    """Returns the steps of a random path in the plane, complex, in the units of `diagonal`."""

    def uniform() -> float:
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    longest = 0.75 * diagonal * (uniform() + intensity**2 * uniform())
    lengths: list[float] = []
    total = 0.0
    while not lengths or total < longest:
        # Beta(1, 30), by the inverse of its distribution function.
        length = (1 - uniform() ** (1 / 30)) * (1.1 - intensity) * diagonal
        if length < longest:
            lengths.append(length)
            total += length

    widest = math.pi * intensity * uniform()
    # Beta(2, 20) is the second smallest of 21 uniform numbers: how often the heading flips.
    flip = torch.rand(21, generator=generator, dtype=torch.float64).sort().values[1].item()
    headings = [widest * (2 * uniform() - 1)]
    mode, right = intensity * widest, widest + 0.1
    while len(headings) < len(lengths):
        # Triangular on [0, right] with that mode, by the inverse of its distribution function.
        u = uniform()
        if u * right < mode:
            heading = math.sqrt(u * right * mode)
        else:
            heading = right - math.sqrt((1 - u) * right * (right - mode))
        sign = math.copysign(1, headings[-1]) if headings[-1] else 0
        headings.append(heading * (-sign if uniform() < flip else sign))
    return torch.polar(
        torch.tensor(lengths, dtype=torch.float64), torch.tensor(headings, dtype=torch.float64)
    )

"""What the authors' released code does, item by item, and against what it gave."""

from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser, GaussianPosterior
from azula.noise import VPSchedule
from torch import nn

FIXTURE = Path(__file__).parent / "fixtures" / "released.npz"
BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.cumprod(1 - BETA)


class NoisePredictor(nn.Module):
    """A network of the released code's kind: the noise, and what interpolates the variance.

    It is the exact one for pixels N(0, 0.7^2), and a small convolutional network beside it, whose
    weights are fractions of small whole numbers: the same on every machine.
    """

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        for step, p in zip((37, 53, 29, 41), self.parameters(), strict=True):
            numbers = torch.arange(p.numel(), dtype=torch.float64) * step % 101
            p.data = (numbers / 101 - 0.5).reshape(p.shape).float()
        self.requires_grad_(False)

    def forward(self, x, timesteps, u=None):
        bar = torch.from_numpy(BAR).to(x)[timesteps].reshape(-1, 1, 1, 1)
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        out = self.two(torch.tanh(self.one(x) + alpha))
        eps = sigma * x / (0.49 * bar + sigma**2) + 0.5 * alpha * out[:, :1]
        return torch.cat([eps, torch.tanh(out[:, 1:])], dim=1)


class Prior(Denoiser):
    """The network as azula denoiser with a variance, at the timestep next to the level of noise."""

    def __init__(self, network):
        super().__init__()
        self.network, self.schedule = network, VPSchedule(alpha_min=1e-2, sigma_min=1e-2)

    def forward(self, x_t, t, **kwargs):
        alpha, sigma = self.schedule(t)
        scale = (alpha**2 + sigma**2).rsqrt()
        timestep = torch.from_numpy(BAR).sub((scale * alpha).double() ** 2).abs().argmin()
        eps, v = self.network(scale * x_t, timestep.expand(len(x_t))).chunk(2, dim=1)
        return GaussianPosterior((x_t - sigma * eps) / alpha, (scale * sigma) ** 2 * v.exp())

"""Pictures that move: frames for the site's slider, and an animation of a reconstruction.

`python tools/moving.py` writes them to `figures/moving`.
"""

import io
from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser, Posterior
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffoc.baselines.dps import dps
from diffoc.data.images import portrait
from diffoc.data.provenance import ROOT
from diffoc.figures.paper import steered
from diffoc.figures.plots import reconstructions, steering
from diffoc.priors.pretrained import load_prior
from diffoc.problem import Problem
from diffoc.problems.tasks import NOISE_STD, as_picture, measure, task
from diffoc.recipe import OURS
from diffoc.reconstruct import reconstruct

COSTS = tuple(10.0 ** (exponent / 2) for exponent in range(-2, 9))
"""Control costs r of the slider's frames, 0.1 to 10,000."""


def pixels(figure: Figure, dpi: int = 144) -> np.ndarray:
    """Returns a figure drawn as an array (H, W, 3), uint8."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def write_steering(path: Path) -> None:
    """Writes Figure 1's paths for the control costs, one frame below the other, as lossless WebP.

    The site's slider shows one frame at a time.
    """
    frames = [pixels(steering(*steered(cost))) for cost in COSTS]
    Image.fromarray(np.concatenate(frames)).save(path, lossless=True, method=6)


class Recorded(Denoiser):
    """A prior that keeps the states it was asked about and the images it estimated.

    Attributes:
        seen: of each evaluation the time, the states and the estimates.
    """

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior, self.schedule = prior, prior.schedule
        self.seen: list[tuple[float, Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> Posterior:
        """Returns the prior's own answer, and records it."""
        posterior = self.prior(x_t, t, **kwargs)
        self.seen.append((t.item(), x_t.detach(), posterior.mean.detach()))
        return posterior

    def at(self, t: float) -> list[Tensor]:
        """Returns state and estimate of the latest evaluation that time t has come to."""
        begun = [seen for seen in self.seen if seen[0] >= t] or self.seen[:1]
        return [begun[-1][1][0], begun[-1][2][0]]


def write_reconstruction(path: Path) -> None:
    """Writes an animation of a face that comes out of a measurement, by DPS and by ours.

    Columns: the measurement, DPS, ours, the truth. The upper row has the states, the lower one the
    images that the denoiser estimates from them. A frame shows all at one noise level.
    """
    prior, truth = load_prior("faces64"), portrait("astronaut")
    generator = torch.Generator().manual_seed(0)
    physics = task("super_resolution", prior.image_shape, generator)
    y = measure(physics, truth, generator)
    ours, sampled = Recorded(prior), Recorded(prior)
    planned = reconstruct(Problem(physics, y, NOISE_STD), prior, OURS)
    with torch.no_grad():
        process = OURS.process(ours, len(planned.controls), truth, generator)
        x0 = process.rollout(planned.states[0], planned.controls)[-1]
    _, sigma = prior.schedule(torch.ones(()))
    noise = sigma * torch.randn(truth.shape, generator=generator)
    drawn = dps(sampled, physics, y, noise, generator, noise_std=NOISE_STD, steps=300, guidance=2.0)
    picture, made = as_picture(y, truth.shape[1:])[0], []
    for t in [*np.linspace(1, 0, 60), *[-1.0] * 20]:
        ends = t < 0
        columns = {
            "measurement": [picture, picture],
            "DPS": [drawn[0]] * 2 if ends else sampled.at(t),
            "ours": [x0[0]] * 2 if ends else ours.at(t),
            "truth": [truth[0], truth[0]],
        }
        figure = reconstructions(columns, ["state", "estimate"], {key: ["", ""] for key in columns})
        made.append(Image.fromarray(pixels(figure, 110)))
    made[0].save(path, save_all=True, append_images=made[1:], duration=90, loop=0, quality=70)


if __name__ == "__main__":
    folder = ROOT / "figures" / "moving"
    write_steering(folder / "steering.webp")
    write_reconstruction(folder / "super_resolution.webp")

"""What the tables hold fixed, as values that records name; `docs/protocol.md` explains them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from deepinv.physics import Physics

from diffoc.experiments.inaccurate import accurate_name
from diffoc.problems.tasks import NOISE_STD, TASKS, random_inpainting, task


@dataclass(frozen=True)
class Protocol:
    """How the methods of a table are compared.

    Attributes:
        name: what the records have in their column `protocol`.
        operator_per_image: the tasks where each image has its own mask, box or kernel, drawn from
            seed, task and image; in the others all share one, drawn from seed and task.
        held_out: the names of the tables' images; empty where a command names them.
        tuning: the names of the images that methods are tuned on, none of which is held out.
        noise_std: the measurements' noise, on the scale of images in [-1, 1].
        precision: the network's; None for any.
        product_cost: c, what a vector-Jacobian product costs in evaluations of the network; None
            where it was not measured.
        dropped: the range from which the fraction of pixels that random inpainting drops is drawn.
        noise_on_dropped: whether pixels that inpainting has dropped have noise.
    """

    name: str
    operator_per_image: tuple[str, ...] = tuple(TASKS)
    held_out: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    noise_std: float = NOISE_STD
    precision: str | None = None
    product_cost: float | None = None
    dropped: tuple[float, float] = (0.92, 0.92)
    noise_on_dropped: bool = False

    def operator(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Physics:
        """Returns a task for images (C, H, W), as :func:`diffoc.problems.tasks.task` does."""
        least, most = self.dropped
        if name == "random_inpainting" and least < most:
            share = torch.rand((), generator=generator).item()
            return random_inpainting(shape, generator, least + (most - least) * share)
        return task(name, shape, generator)


ONE_OPERATOR = Protocol(
    name="images clipped to [-1, 1], not rounded; PSNR and MSE on [-1, 1]; SSIM on "
    "[0, 1], Gaussian 11x11 windows within the image; LPIPS 0.1 on [-1, 1], _01 on [0, 1]",
    operator_per_image=(),
)
"""The protocol of priors that have none of their own."""

COLOUR_FACES = Protocol(
    name="colour faces, an operator per image, 1",
    held_out=tuple(str(i) for i in range(0, 512, 16)),
    tuning=tuple(str(i) for i in range(8, 512, 64)),
    precision="float32",
    product_cost=0.9,
)
"""The protocol of the colour faces. The cost of a product is that of `faces64`, see the page."""

FFHQ = Protocol("FFHQ, the paper's text: an operator per image, 92 % dropped and no noise there, 1")
"""The protocol of the paper's text; a command names the folder of the images."""

FFHQ_RELEASED = replace(
    FFHQ,
    name="FFHQ, the released code: 30 to 70 % dropped and noise there, one motion kernel, 1",
    operator_per_image=("random_inpainting", "box_inpainting"),
    dropped=(0.3, 0.7),
    noise_on_dropped=True,
)
"""The protocol of the authors' code: a mask or box for each image, one kernel for a run."""

FFHQ_PROTOCOLS = {"paper": FFHQ, "released": FFHQ_RELEASED}


def protocol_of(prior: str) -> Protocol:
    """Returns the protocol of a prior's tables, and of its copies and latents."""
    images = accurate_name(prior).partition("/")[0].removesuffix("_latent")
    return {"faces64": COLOUR_FACES, "ffhq256": FFHQ}.get(images, ONE_OPERATOR)

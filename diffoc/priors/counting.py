"""What a method asked of its prior, whoever wrote the method."""

from contextlib import nullcontext

import torch
from azula.denoise import Denoiser, DiracPosterior, GaussianPosterior, Posterior
from torch import Tensor


class CountedPrior(Denoiser):
    """A prior that counts its evaluations, and the vector-Jacobian products taken through it.

    Args:
        prior: any azula denoiser.
        precision: "bfloat16" for autocast of the prior alone, or None.

    Attributes:
        evaluations: the number of evaluations of single images; divide it by the batch for those
            of an image.
        products: the number of products of single images, one whenever a gradient passes through
            the prior.
        of_each: the evaluations and products that each image of a batch needed for itself, (B,)
            each, from a method that computes some of them again for the others; else None.
    """

    of_each: tuple[Tensor, Tensor] | None = None

    def __init__(self, prior: Denoiser, precision: str | None = None) -> None:
        super().__init__()
        if precision not in (None, "bfloat16"):
            raise ValueError(f"precision is {precision!r}, expected None or 'bfloat16'")
        self.prior = prior
        self.schedule = prior.schedule
        self.precision = precision
        self.evaluations = self.products = 0

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> Posterior:
        self.evaluations += len(x_t)
        half = self.precision == "bfloat16"
        with torch.autocast(x_t.device.type, torch.bfloat16) if half else nullcontext():
            posterior = self.prior(x_t, t, **kwargs)
            mean = posterior.mean.to(x_t.dtype)
        if mean.grad_fn is not None:
            # Of the function, not of the tensor: gradients that end at the mean are no products.
            mean.grad_fn.register_prehook(lambda cotangents: self._count_product(len(x_t)))
        if isinstance(posterior, GaussianPosterior):
            return GaussianPosterior(mean, posterior.var.to(x_t.dtype))
        return DiracPosterior(mean)

    def work(self, images: int) -> list[tuple[float, float]]:
        """Returns evaluations and products of each image of a batch, equal shares by default."""
        if self.of_each is None:
            return [(self.evaluations / images, self.products / images)] * images
        evaluations, products = self.of_each
        return list(zip(evaluations.tolist(), products.tolist(), strict=True))

    def _count_product(self, images: int) -> None:
        self.products += images

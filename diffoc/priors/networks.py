r"""The small networks: two denoisers' backbones and a digit classifier.

A backbone maps a scaled noisy image and :math:`\log(\sigma_t / \alpha_t)` to an image; azula's
`KarrasDenoiser` makes a denoiser of it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from azula.nn.layers import SineEncoding
from azula.nn.unet import UNet
from torch import Tensor, nn

# The noise levels, relative to the signal's scale, that the backbones are trained for.
SIGMA_MIN, SIGMA_MAX = 2e-3, 80.0


class UNetBackbone(nn.Module):
    """An `azula.nn.unet.UNet` on images that may be folded, as a backbone for azula's denoisers.

    Folding trades resolution for channels (pixel-unshuffle): a 2 x 2 fold makes a 64 x 64 image
    cost what a 32 x 32 one costs. Noise levels beyond the trained ones are treated as the
    nearest of those. `channels` and `blocks` say how wide each level is, and how many residual
    blocks it has each way; a level halves the resolution of the one before. `features` is the size
    of the noise level's embedding.

    With `exact_means` the means of the estimate's channels are those of :meth:`with_exact_means`.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        blocks: Sequence[int],
        fold: int = 1,
        in_channels: int = 1,
        features: int = 64,
        exact_means: bool = False,
    ) -> None:
        super().__init__()
        self.fold = fold
        self.exact_means = exact_means
        if exact_means:
            self.register_buffer("mean", torch.zeros(in_channels))
            self.register_buffer("basis", torch.eye(in_channels))
            self.register_buffer("variances", torch.ones(in_channels))
        folded = in_channels * fold**2
        self.embedding = nn.Sequential(
            SineEncoding(features, omega=1e2),
            nn.Linear(features, features),
            nn.SiLU(),
            nn.Linear(features, features),
        )
        self.unet = UNet(
            folded,
            folded,
            hid_channels=channels,
            hid_blocks=blocks,
            mod_features=features,
            norm="group",
        )

    def forward(self, x: Tensor, log_sigma: Tensor, **kwargs: object) -> Tensor:
        """Maps images (B, C, H, W), sides multiples of the fold, and log-levels, () or (B,)."""
        if x.shape[-2] % self.fold or x.shape[-1] % self.fold:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected sides that {self.fold} divides"
            )
        level = log_sigma.clamp(math.log(SIGMA_MIN), math.log(SIGMA_MAX))
        folded = nn.functional.pixel_unshuffle(x, self.fold)
        y = self.unet(folded, self.embedding(level.expand(len(x))))
        y = nn.functional.pixel_shuffle(y, self.fold)
        return self.with_exact_means(x, y, log_sigma) if self.exact_means else y

    def measure_means(self, x: Tensor) -> None:
        """Takes mean and covariance of the channels' means from images (N, C, H, W)."""
        means = x.mean((-2, -1))
        self.mean.copy_(means.mean(0))
        variances, basis = torch.linalg.eigh(torch.atleast_2d(torch.cov(means.mT)))
        self.variances.copy_(variances)
        self.basis.copy_(basis)

    def with_exact_means(self, x: Tensor, y: Tensor, log_sigma: Tensor) -> Tensor:
        r"""Returns the backbone's output y, (B, C, H, W), with other means of the channels.

        An error of an image's mean is the one that a network sees least and a sampler keeps
        longest. Let the means of the channels over n pixels be Gaussian from image to image, with
        mean :math:`\mu` and covariance :math:`V \Lambda V^T`, and those of the noisy image be
        :math:`\bar x`. Then their posterior mean is

        .. math:: \bar m = \mu + V \Lambda (\Lambda + \sigma^2 / n)^{-1} V^T (\bar x - \mu) .

        EDM's denoiser is :math:`m = x / (1 + \sigma^2) + y \, \sigma / \sqrt{1 + \sigma^2}`, and
        its backbone is given :math:`x / \sqrt{1 + \sigma^2}`.
        """
        sigma = log_sigma.clamp(min=math.log(SIGMA_MIN)).exp().reshape(-1, 1)
        scale = (1 + sigma**2).sqrt()
        noisy = scale * x.mean((-2, -1))
        gain = self.variances / (self.variances + sigma**2 / x[0, 0].numel())
        along = ((noisy - self.mean)[..., None] * self.basis).sum(-2)
        mean = self.mean + ((gain * along)[:, None] * self.basis).sum(-1)
        wanted = (mean - noisy / scale**2) * scale / sigma
        return y + (wanted - y.mean((-2, -1)))[..., None, None]


class DigitClassifier(nn.Module):
    """Two convolutional and two linear layers, as in the paper's Appendix D; 0.42 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.SiLU(),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, 10) of images (B, 1, 28, 28) in [-1, 1]."""
        return self.head(self.features(x))


class ResidualClassifier(nn.Module):
    """A residual network with global pooling, to judge what :class:`DigitClassifier` guided."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            ResidualBlock(32),
            ResidualBlock(32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            ResidualBlock(64),
            ResidualBlock(64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions of normalised activations, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [
            layer
            for _ in range(2)
            for layer in (
                nn.GroupNorm(8, channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
        ]
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


NETWORKS: dict[str, Callable[[], UNetBackbone]] = {
    "mnist": lambda: UNetBackbone((48, 80, 96), (1, 2, 2), fold=2),
    "faces64": lambda: UNetBackbone((96, 160), (2, 3), fold=4, in_channels=3, exact_means=True),
    "faces64_latent": lambda: UNetBackbone((64, 112), (2, 3), in_channels=6),
}
"""What builds the backbone of each denoiser that ships, with random weights."""


def parameter_count(network: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(p.numel() for p in network.parameters())

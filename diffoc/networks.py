r"""The small networks: two denoisers' backbones and a digit classifier.

A backbone maps a scaled noisy image and :math:`\log(\sigma_t / \alpha_t)` to an image; azula's
`KarrasDenoiser` makes a denoiser of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DModel
from torch import Tensor, nn


class UNetBackbone(nn.Module):
    """A `diffusers.UNet2DModel` on images that may be folded, as a backbone for azula.

    Folding trades resolution for channels (pixel-unshuffle): a 2 x 2 fold makes a 64 x 64 image
    cost what a 32 x 32 one costs.

    Args:
        side: height and width of the images, divisible by fold * 2^(levels - 1).
        channels: of every level, each a multiple of 32.
        layers: residual blocks of every level.
        fold: side of the squares of pixels that become channels.
        in_channels: of the images.

    Raises:
        ValueError: if the image cannot be folded and halved so often.
    """

    def __init__(
        self,
        side: int,
        channels: Sequence[int],
        layers: int = 1,
        fold: int = 1,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        divisor = fold * 2 ** (len(channels) - 1)
        if side % divisor:
            raise ValueError(f"side is {side}, expected a multiple of {divisor}")
        self.fold = fold
        folded = in_channels * fold**2
        # Attention pays at the lowest resolution only.
        plain = len(channels) - 1
        self.unet = UNet2DModel(
            sample_size=side // fold,
            in_channels=folded,
            out_channels=folded,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            norm_num_groups=32,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, log_sigma: Tensor, **kwargs: object) -> Tensor:
        """Maps images (B, C, H, W) and log-noise-levels, () or (B,), to images."""
        x = nn.functional.pixel_unshuffle(x, self.fold)
        # The sinusoids' periods are made for timesteps up to 1000; log sigma spans about 10.
        y = self.unet(x, 100 * log_sigma.expand(len(x))).sample
        return nn.functional.pixel_shuffle(y, self.fold)


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
        """Logits (B, 10) of images (B, 1, 28, 28) in [-1, 1]."""
        return self.head(self.features(x))


def parameter_count(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in network.parameters())

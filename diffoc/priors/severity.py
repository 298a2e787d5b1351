r"""The severity encoder of Flash-Diffusion, Fabian et al. 2024, arXiv:2309.06642.

A network that sees a degraded picture returns the latents' estimate :math:`\hat z` and the
logarithm of the severity :math:`\hat\sigma`, its prediction of the estimate's own error
:math:`\bar\sigma = \|\hat z - z_0\| / \sqrt n`, n the number of latents. It is trained by
:mod:`diffoc.training.severity`. One network serves all tasks that measure a picture: it has to see
from the picture which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from azula.nn.unet import UNet
from torch import Tensor, nn

from diffoc.data.manifest import load_weights
from diffoc.priors.weights import load_into


class SeverityEncoder(nn.Module):
    """Maps pictures (B, 1, H, W) in [-1, 1] to latents (B, c, H / fold, W / fold) and severities.

    Args:
        channels: hidden, of every level.
        blocks: residual blocks of every level, each way.
        latents: c.
        fold: side of the squares of pixels that become channels.
    """

    def __init__(
        self,
        channels: Sequence[int] = (48, 80),
        blocks: Sequence[int] = (2, 3),
        latents: int = 4,
        fold: int = 4,
    ) -> None:
        super().__init__()
        self.fold = fold
        self.unet = UNet(
            fold**2,
            latents + 1,
            hid_channels=channels,
            hid_blocks=blocks,
            norm="group",
        )

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The latents' estimate (B, c, h, w) and log severities (B,)."""
        output = self.unet(nn.functional.pixel_unshuffle(picture, self.fold))
        return output[:, :-1], output[:, -1].flatten(1).mean(1)


def load_severity_encoder() -> SeverityEncoder:
    """The trained severity encoder of "faces64_latent", in evaluation mode, float32.

    Raises:
        ValueError: if the weights are not those of the manifest.
        FileNotFoundError: if they are missing.
    """
    network = SeverityEncoder()
    load_into(network, load_weights("faces64_severity"), "faces64_severity.safetensors")
    return network.eval().requires_grad_(False)

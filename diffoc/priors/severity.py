r"""The severity encoder of Flash-Diffusion, Fabian et al. 2024, arXiv:2309.06642.

A network that sees a degraded picture returns the latents' estimate :math:`\hat z` and the
logarithm of the severity :math:`\hat\sigma`, its prediction of the estimate's own error
:math:`\bar\sigma = \|\hat z - z_0\| / \sqrt n`, n the number of latents. It is trained by
:mod:`diffoc.training.severity`. One network serves all tasks that measure a picture: it has to see
from the picture which one it is.
"""

from collections.abc import Callable, Sequence

from azula.nn.unet import UNet
from torch import Tensor, nn

from diffoc.priors.weights import load_shipped


class SeverityEncoder(nn.Module):
    """Maps pictures (B, colours, H, W) in [-1, 1] to latents' estimates and log severities (B,).

    The latents are (B, latents, H / fold, W / fold). `channels` and `blocks` say how wide each
    level of the network is, and how many residual blocks it has each way.
    """

    def __init__(
        self,
        channels: Sequence[int] = (48, 80),
        blocks: Sequence[int] = (2, 3),
        latents: int = 6,
        fold: int = 4,
        colours: int = 3,
    ) -> None:
        super().__init__()
        self.fold = fold
        self.unet = UNet(
            colours * fold**2, latents + 1, hid_channels=channels, hid_blocks=blocks, norm="group"
        )

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        output = self.unet(nn.functional.pixel_unshuffle(picture, self.fold))
        return output[:, :-1], output[:, -1].flatten(1).mean(1)


SEVERITY_ENCODERS: dict[str, Callable[[], SeverityEncoder]] = {"faces64_severity": SeverityEncoder}
"""What builds each severity encoder, with random weights."""


def load_severity_encoder(name: str = "faces64_severity") -> SeverityEncoder:
    """Returns a trained one of :data:`SEVERITY_ENCODERS`, to evaluate, float32."""
    return load_shipped(SEVERITY_ENCODERS, name)

r"""The severity encoder of Flash-Diffusion, Fabian et al. 2024, arXiv:2309.06642.

A network that sees a degraded picture returns the latents' estimate :math:`\hat z` and the
logarithm of the severity :math:`\hat\sigma`, its prediction of the estimate's own error
:math:`\bar\sigma = \|\hat z - z_0\| / \sqrt n`, n the number of latents. It is trained by
:mod:`diffoc.training.severity`. One network serves all tasks that measure a picture: it has to see
from the picture which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from azula.nn.unet import UNet
from torch import Tensor, nn

from diffoc.data.manifest import load_weights
from diffoc.priors.weights import load_into


class SeverityEncoder(nn.Module):
    """Maps pictures in [-1, 1] to latents (B, c, H / fold, W / fold) and severities.

    Args:
        channels: hidden, of every level.
        blocks: residual blocks of every level, each way.
        latents: c.
        fold: side of the squares of pixels that become channels.
        colours: channels of the pictures (B, colours, H, W), 1 or 3.
    """

    def __init__(
        self,
        channels: Sequence[int] = (48, 80),
        blocks: Sequence[int] = (2, 3),
        latents: int = 4,
        fold: int = 4,
        colours: int = 1,
    ) -> None:
        super().__init__()
        self.fold = fold
        self.unet = UNet(
            colours * fold**2,
            latents + 1,
            hid_channels=channels,
            hid_blocks=blocks,
            norm="group",
        )

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The latents' estimate (B, c, h, w) and log severities (B,)."""
        output = self.unet(nn.functional.pixel_unshuffle(picture, self.fold))
        return output[:, :-1], output[:, -1].flatten(1).mean(1)


SEVERITY_ENCODERS: dict[str, Callable[[], SeverityEncoder]] = {
    "faces64_severity": SeverityEncoder,
    "faces64_rgb_severity": lambda: SeverityEncoder(latents=6, colours=3),
}
"""What builds each severity encoder, with random weights."""


def load_severity_encoder(name: str = "faces64_severity") -> SeverityEncoder:
    """The trained severity encoder of the latent prior of that name, in evaluation mode, float32.

    Args:
        name: a key of :data:`SEVERITY_ENCODERS`.

    Raises:
        ValueError: for another name, or if the weights are not those of the manifest.
        FileNotFoundError: if they are missing.
    """
    if name not in SEVERITY_ENCODERS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(SEVERITY_ENCODERS)}")
    network = SEVERITY_ENCODERS[name]()
    load_into(network, load_weights(name), f"{name}.safetensors")
    return network.eval().requires_grad_(False)

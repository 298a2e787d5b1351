"""The latent model of FFHQ of Rombach et al. 2022, from CompVis's own checkpoint.

It has the network of ADM on latents of a quarter of the side, and an autoencoder with 8192
codewords, as `models/ldm/ffhq256/config.yaml` of github.com/CompVis/latent-diffusion has them. The
weights are those averaged over the training, which its samplers take.
"""

from pathlib import Path

import torch
from azula.noise import Schedule
from azula.plugins.adm._src.unet import UNetModel
from diffusers import VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn

from diffoc.data.downloads import read_torch_file
from diffoc.priors.latent import DiffusersAutoencoder, LatentPrior
from diffoc.priors.pipelines import DiffusersDenoiser, Sampled
from diffoc.priors.weights import load_into

SIDE = 64  # of the latents
_LEVELS, _FIRST_STAGE_LEVELS = (1, 2, 3, 4), (1, 2, 4)  # widths, in those of the first


def load_compvis(path: Path, schedule: Schedule | None) -> LatentPrior:
    """Returns the prior of a checkpoint, for images (3, 256, 256); no code in the file is run.

    The widths of both networks are those of the weights.
    """
    state = read_torch_file(path, stand_ins=True).get("state_dict")
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of latent-diffusion: it has no state_dict")
    first_stage = _part(state, "first_stage_model.")
    denoiser = DiffusersDenoiser(_network(state, path), alphas_cumprod(), "epsilon", schedule)
    prior = LatentPrior(denoiser, DiffusersAutoencoder(_autoencoder(first_stage, path)))
    prior.image_shape, prior.decoded_shape = (3, SIDE, SIDE), (3, 4 * SIDE, 4 * SIDE)
    return prior


def alphas_cumprod() -> Tensor:
    r"""Returns :math:`\bar\alpha_i = \prod_{j \le i} (1 - \beta_j)`, (1000,), float64.

    The square roots of :math:`\beta_i` are equally spaced, from those of 0.0015 to 0.0195.
    """
    roots = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64)
    return (1 - roots**2).cumprod(0)


def _network(state: dict[str, Tensor], path: Path) -> nn.Module:
    trained = _part(state, "model.diffusion_model.")
    network = UNetModel(
        image_size=SIDE,
        in_channels=3,
        model_channels=_width(trained, "input_blocks.0.0.weight", path),
        out_channels=3,
        num_res_blocks=2,
        attention_resolutions=(8, 4, 2),
        channel_mult=_LEVELS,
        num_head_channels=32,
    )
    # The names of the averaged ones are without the points.
    averaged = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in trained}
    load_into(network, {k: state.get(v, trained[k]) for k, v in averaged.items()}, path)
    return Sampled(network)


def _autoencoder(state: dict[str, Tensor], path: Path) -> VQModel:
    width, levels = _width(state, "encoder.conv_in.weight", path), len(_FIRST_STAGE_LEVELS)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(n * width for n in _FIRST_STAGE_LEVELS),
        layers_per_block=2,
        num_vq_embeddings=_width(state, "quantize.embedding.weight", path),
        scaling_factor=1.0,
    )
    named = convert_ldm_vae_checkpoint(state, network.config)
    named["quantize.embedding.weight"] = state["quantize.embedding.weight"]
    load_into(network, named, path)
    return network


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _width(state: dict[str, Tensor], name: str, path: Path) -> int:
    if not isinstance(state.get(name), Tensor) or not state[name].ndim:
        raise ValueError(f"{path} is no checkpoint of latent-diffusion on FFHQ: it has no {name}")
    return len(state[name])

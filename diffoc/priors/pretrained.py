r"""Pretrained priors by name: ours from `data/`, those of others from the cache or the hub.

Every prior is an azula denoiser on images in [-1, 1]. A network depends on the noise only
through the ratio :math:`\sigma_t / \alpha_t`, so the schedule it is used with need not be the one
it was trained with: with :math:`c = (\alpha_t^2 + \sigma_t^2)^{-1/2}`, :math:`c x_t` is a sample
of the variance-preserving process at :math:`\bar\alpha = (c \alpha_t)^2`.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from azula.denoise import Denoiser, DiracPosterior, KarrasDenoiser
from azula.noise import Schedule, VPSchedule
from azula.plugins import adm
from azula.plugins.adm._src.unet import AttentionBlock, ResBlock
from azula.plugins.utils import load_cards
from torch import Tensor, nn

from diffoc.checks import check_default_device, check_member
from diffoc.data.downloads import RemoteFile, fetch, find, read_torch_file
from diffoc.priors.autoencoder import load_autoencoder
from diffoc.priors.latent import LatentPrior, load_pipeline
from diffoc.priors.networks import NETWORKS
from diffoc.priors.pipelines import (
    check_schedule,
    check_within_levels,
    from_hub,
    load_pixel_model,
    scales_of_images,
)
from diffoc.priors.weights import difference, load_into, load_shipped, read_checkpoint

SHIPPED = {"mnist": (1, 28, 28), "faces64": (3, 64, 64), "faces64_latent": (6, 16, 16)}

# Sizes: that of imagenet256 is exact, as its checksum is; those of ffhq256 and of the latent one,
# which holds its network twice, are four bytes a parameter; ffhq64's is a rough one.
REMOTE = {
    "ffhq256": RemoteFile(
        "ffhq_10m.pt",
        "https://drive.google.com/uc?id=1BGwhRWUoguF-D8wlZ65tf227gp3cDUDh",
        374_000_000,
    ),
    "imagenet256": RemoteFile(
        "256x256_diffusion_uncond.pt",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_diffusion_uncond.pt",
        2_211_383_297,
        "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
    ),
    "ffhq64": RemoteFile(
        "edm-ffhq-64x64-uncond-vp.pkl",
        "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl",
        250_000_000,
    ),
    "ffhq256_latent": RemoteFile(
        "ffhq256_latent.ckpt",
        "model.ckpt of https://ommer-lab.com/files/latent-diffusion/ffhq.zip",
        2_400_000_000,
    ),
}
_SHAPES = SHIPPED | {
    "ffhq256": (3, 256, 256),
    "imagenet256": (3, 256, 256),
    "ffhq64": (3, 64, 64),
    "ffhq256_latent": (3, 64, 64),
}
_ADM_CARDS = {"ffhq256": "ffhq_256x256", "imagenet256": "imagenet_256x256"}


def default_schedule() -> Schedule:
    """Returns azula's variance-preserving one with sigma / alpha from 0.01 to 100."""
    return VPSchedule(alpha_min=1e-2, sigma_min=1e-2)


def shape_of(name: str) -> tuple[int, ...]:
    """Returns the shape (C, H, W) of the states of a prior that we know by name."""
    check_member(sorted(_SHAPES), name=name)
    return _SHAPES[name]


def load_prior(
    name_or_path: str | Path,
    schedule: Schedule | None = None,
    *,
    allow_pickle: bool = False,
    learned_variance: bool = False,
) -> Denoiser:
    """Returns a pretrained prior: an azula denoiser on images in [-1, 1], to evaluate.

    It is in torch's default precision, float32 unless that was changed. Its attribute `image_shape`
    is the shape (C, H, W) of its images. Latent models are loaded as a
    :class:`diffoc.priors.latent.LatentPrior`, whose states are latents.

    Args:
        name_or_path: one of

            - "mnist" (1, 28, 28), "faces64" (3, 64, 64) and "faces64_latent", of the faces'
              latents (6, 16, 16): ours, in the repository;
            - "ffhq256" (3, 256, 256), the weights of Chung et al. 2023 that the paper uses, and
              "imagenet256" (3, 256, 256), of Dhariwal & Nichol 2021, both ADM networks; their
              heads for the variance are cut off, and means are not clipped to [-1, 1], because
              a controller needs the derivatives;
            - "ffhq256_latent", the latent model of FFHQ of Rombach et al. 2022, of latents
              (3, 64, 64), once CompVis's checkpoint lies in the cache as `ffhq256_latent.ckpt`;
            - "ffhq64" (3, 64, 64), of Karras et al. 2022, for which see `allow_pickle`;
            - an unconditional pixel model of `diffusers`: "owner/name" on the Hugging Face hub,
              such as "1aurent/mnist-28", or a local folder; or a latent one, such as
              "CompVis/ldm-celebahq-256", or Stable Diffusion 1.5, to which no prompt is given;
            - a checkpoint of our trainer, a path ending in .pt.
        schedule: of the noise; by default azula's variance-preserving one with
            sigma / alpha from 0.01 to 100, about what these networks were trained for; of a model
            of diffusers as far as its betas reach. For networks with timesteps, of ADM, CompVis and
            diffusers, it stays within the levels of their training.
        learned_variance: whether "ffhq256" or "imagenet256" keeps its head for the variance of
            ancestral steps, see :class:`diffoc.baselines.released.AncestralProcess`.
        allow_pickle: whether the file of "ffhq64", which is Python code as much as data, may be
            run. It also needs a clone of https://github.com/NVlabs/edm on the Python path.

    Raises:
        TypeError: if `name_or_path` is neither a name nor a path.
        FileNotFoundError: if a file is missing and cannot be downloaded.
        ValueError: for an unknown name, a file that is damaged or of another kind, for "ffhq64"
            without `allow_pickle`, and for `learned_variance` of others.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path is {name_or_path!r}, expected a name or a path")
    check_default_device()
    check_schedule(schedule)
    given, schedule = schedule, schedule or default_schedule()
    if learned_variance and str(name_or_path) not in _ADM_CARDS:
        raise ValueError(f"learned_variance is for {' and '.join(_ADM_CARDS)} only")
    name, path = str(name_or_path), Path(name_or_path)
    if name in SHIPPED:
        network = load_shipped(NETWORKS[name], name)
        network.to(memory_format=torch.channels_last)  # an evaluation takes a tenth less, and more
        prior = _of_ours(network, name, schedule)
    elif name in _ADM_CARDS:
        prior = _load_adm(name, schedule, learned_variance)
    elif name == "ffhq64":
        prior = _load_edm(schedule, allow_pickle)
    elif name == "ffhq256_latent":
        from diffoc.priors.compvis import load_compvis  # diffusers is slow to import

        prior = evaluate_once(load_compvis(find(REMOTE[name]), given))
    elif path.suffix == ".pt":
        prior = _of_ours(*_network_of_checkpoint(path), schedule)
    elif path.is_file():
        raise ValueError(
            f"name_or_path is the file {name}: of files only checkpoints of `python -m diffoc "
            "train`, ending in .pt, are read; name a folder of a diffusers model, or one of "
            f"{', '.join(sorted([*SHIPPED, *REMOTE]))}"
        )
    elif name and path.is_dir():
        prior = _load_folder(path, given)
    elif isinstance(name_or_path, Path):
        raise FileNotFoundError(f"name_or_path is the path {name}, where there is nothing")
    elif name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        prior = _load_folder(from_hub(name), given)
    else:
        raise ValueError(
            f"name_or_path is {name!r}, expected one of {sorted([*SHIPPED, *REMOTE])}, the name "
            "owner/name of a diffusers model, a folder that holds one, or a checkpoint "
            "of `python -m diffoc train`, ending in .pt"
        )
    return prior.eval().requires_grad_(False)


def _of_ours(network: nn.Module, name: str, schedule: Schedule) -> Denoiser:
    prior = KarrasDenoiser(network, schedule)
    if name.endswith("_latent"):
        prior = LatentPrior(prior, load_autoencoder())
        prior.decoded_shape = SHIPPED[name.removesuffix("_latent")]
    prior.image_shape = SHIPPED[name]
    return prior


def _network_of_checkpoint(path: Path) -> tuple[nn.Module, str]:
    state = read_checkpoint(path)
    for name in SHIPPED:
        network = NETWORKS[name]()
        if not difference(network, state["average"]):
            load_into(network, state["average"], f"path {path}")
            return network, name
    raise ValueError(f"path {path} holds another network than those of {', '.join(SHIPPED)}")


def _load_folder(folder: Path, schedule: Schedule | None) -> Denoiser:
    latent = (folder / "vae").is_dir() or (folder / "vqvae").is_dir()
    return (load_pipeline if latent else load_pixel_model)(folder, schedule)


def untrained_adm(
    name: str, channels: int | None = None, learned_variance: bool = False
) -> Denoiser:
    """Returns the network of "ffhq256" or "imagenet256" as initialised: it ends in zeros.

    Its schedule is azula's own for these networks; under `torch.device("meta")` it takes no memory.
    The channels are those of the first level, a multiple of 32, by default as many as the weights
    have; those of the others are in proportion. It may have the head for the variance, too.
    """
    check_member(_ADM_CARDS, name=name)
    config = dict(load_cards(adm)[_ADM_CARDS[name]].config)
    if channels is not None:
        if channels < 32 or channels % 32:  # ADM's norms have 32 groups
            raise ValueError(f"channels is {channels}, expected a multiple of 32")
        config["num_channels"] = channels
    prior = adm.make_model(**config, clip_mean=False, learn_var=learned_variance)
    prior.image_shape = _SHAPES[name]
    return evaluate_once(prior).eval().requires_grad_(False)


def evaluate_once(prior: Denoiser) -> Denoiser:
    """Takes azula's checkpoints out of an ADM network, in place, and returns it.

    They evaluate a block again in every backward pass, 0.74 F each; the controller recomputes whole
    steps instead, once for all products.
    """
    for block in prior.modules():
        if isinstance(block, ResBlock | AttentionBlock):
            block.forward = block._forward
    return prior


def _load_adm(name: str, schedule: Schedule, learned_variance: bool) -> Denoiser:
    path = fetch(REMOTE[name])
    state = read_torch_file(path)
    prior = untrained_adm(name, learned_variance=learned_variance)
    check_within_levels(schedule, 1 - prior.sigmas.double().square())
    # The second half of the output channels is the interpolation of the variance.
    for key, value in prior.backbone.state_dict().items():
        if key in ("out.2.weight", "out.2.bias") and isinstance(state.get(key), Tensor):
            state[key] = state[key][: len(value)]
    load_into(prior.backbone, state, path)
    prior.schedule = schedule
    take_nearest_timesteps(prior)
    return prior


def take_nearest_timesteps(prior: Denoiser) -> None:
    """Makes an azula `AblatedDenoiser` take the timestep nearest to a level of noise, in place.

    azula takes the first whose level is at least as high: by rounding alone, that is one too many
    for about half of the levels that are exactly those of a timestep. Halves of the way between
    levels, in place of the levels, make the same search find the nearest.
    """
    prior.sigmas = (prior.sigmas[1:] + prior.sigmas[:-1]) / 2


class EDMDenoiser(Denoiser):
    r"""A network :math:`D(x_0 + \sigma z; \sigma)` of Karras et al. 2022 as azula denoiser.

    azula's own `ElucidatedDenoiser` asks for a class label, which these networks have not. The
    backbone is called with images (B, C, H, W) and sigma (B,).
    """

    def __init__(self, backbone: Callable[[Tensor, Tensor], Tensor], schedule: Schedule) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        alpha, sigma = scales_of_images(self.schedule, t, x_t)
        ratio = (sigma / alpha).flatten().expand(len(x_t))
        return DiracPosterior(self.backbone(x_t / alpha, ratio).to(x_t))


def _load_edm(schedule: Schedule, allow_pickle: bool) -> Denoiser:
    file = REMOTE["ffhq64"]
    if not allow_pickle:
        raise ValueError(
            f"allow_pickle is False, but {file.name} is a pickle that runs code when it is read: "
            "pass allow_pickle=True if you trust it"
        )
    path = fetch(file)
    try:
        with path.open("rb") as content:
            backbone = pickle.load(content)["ema"]
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{path} needs the module {error.name!r}: clone https://github.com/NVlabs/edm and add "
            "the folder to PYTHONPATH"
        ) from error
    except Exception as error:  # a damaged pickle fails anywhere
        raise ValueError(f"{path} is damaged ({error!r}): remove it and try again") from error
    prior = EDMDenoiser(backbone, schedule)
    prior.image_shape = _SHAPES["ffhq64"]
    return prior

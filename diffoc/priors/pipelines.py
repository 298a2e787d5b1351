"""Models of `diffusers`, from folders or the Hugging Face hub, as azula denoisers."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule, VPSchedule
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from diffoc.checks import check_kind, check_member, one_line
from diffoc.data.downloads import cache_folder

if TYPE_CHECKING:
    from diffusers import ModelMixin


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# Of a network that is told more than images and a timestep, which nobody tells it here.
CONDITIONS = (
    "num_class_embeds",
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
# Every version of diffusers has written these, and weights do not show them: where they are
# missing, another network might be built than was trained.
_UNET = (
    "center_input_sample",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
)
UNSEEN = {
    "UNet2DModel": ("act_fn", *_UNET),
    "UNet2DConditionModel": ("act_fn", *_UNET),
    "AutoencoderKL": ("act_fn",),
    "VQModel": ("act_fn",),
}


class Sampled(nn.Module):
    """A network of images and timesteps, to be called as one of `diffusers` is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.network(x, timestep))


class DiffusersDenoiser(Denoiser):
    r"""An unconditional `diffusers` network as azula denoiser.

    The network expects :math:`\sqrt{\bar\alpha_i} x_0 + \sqrt{1 - \bar\alpha_i} z` and the
    timestep i; a noise level between two timesteps gets a fractional one, by linear
    interpolation in the logarithm of the signal-to-noise ratio.

    Args:
        backbone: the network, a `diffusers.UNet2DModel`.
        alphas_cumprod: the levels :math:`\bar\alpha_i` of its training, decreasing, (steps,); the
            last may be 0, which counts as :math:`2^{-24}`: what is asked for lies before it.
        prediction_type: what it predicts, "epsilon", "sample" (of x_0) or "v_prediction".
        schedule: the noise schedule, within the levels of `alphas_cumprod`, beyond which the
            network was not trained; None for :func:`schedule_within`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        alphas_cumprod: Tensor,
        prediction_type: str,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        check_member(PREDICTION_TYPES, prediction_type=prediction_type)
        self.backbone = backbone
        self.prediction_type = prediction_type
        bar = alphas_cumprod.double().clamp(min=2**-24)
        self.schedule = schedule or schedule_within(bar)
        check_within_levels(self.schedule, bar)
        self.register_buffer("log_snr", (bar / (1 - bar)).log(), persistent=False)

    def timestep(self, log_snr: Tensor) -> Tensor:
        """Returns the fractional timestep of a log-SNR, between the first and the last one."""
        increasing = self.log_snr.flip(0)
        index = torch.searchsorted(increasing, log_snr.to(increasing)).clamp(1, len(increasing) - 1)
        below, above = increasing[index - 1], increasing[index]
        fraction = ((log_snr - below) / (above - below)).clamp(0, 1)
        return len(increasing) - 1 - (index - 1 + fraction)

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        alpha, sigma = scales_of_images(self.schedule, t, x_t)
        scale = torch.rsqrt(alpha**2 + sigma**2)
        signal, noise, x = scale * alpha, scale * sigma, scale * x_t
        timestep = self.timestep(2 * torch.log(alpha / sigma).flatten().double())
        output = self.backbone(x, timestep.to(x).expand(len(x))).sample
        # A head for the variance would be the second half of the channels.
        output = output[:, : x.shape[1]]
        if self.prediction_type == "epsilon":
            return DiracPosterior((x - noise * output) / signal)
        if self.prediction_type == "sample":
            return DiracPosterior(output)
        return DiracPosterior(signal * x - noise * output)


def check_schedule(schedule: Schedule | None) -> None:
    """Raises an error unless a schedule, if there is one, begins with less noise than it ends."""
    if schedule is None:
        return
    check_kind(Schedule, schedule=schedule)
    first, last = _ratios_of(schedule)
    if not 0 <= first < last < math.inf:
        raise ValueError(
            f"schedule has sigma / alpha from {first:.3g} at time 0 to {last:.3g} at time 1, "
            "expected finite numbers that grow"
        )


def check_within_levels(schedule: Schedule, alphas_cumprod: Tensor) -> None:
    """Raises a ValueError if a schedule leaves the levels, (steps,), of a network's training."""
    (first, last), (least, most) = _ratios_of(schedule), _ratios(alphas_cumprod)
    # The usual schedules differ from the usual betas by less than a hundredth.
    if first < 0.99 * least or last > 1.01 * most:
        raise ValueError(
            f"schedule has sigma / alpha from {first:.3g} to {last:.3g}, but the network was "
            f"trained from {least:.3g} to {most:.3g}: leave schedule out, or take one within"
        )


def _ratios_of(schedule: Schedule) -> tuple[float, float]:
    alpha, sigma = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    first, last = (sigma / alpha).tolist()
    return first, last


def schedule_within(alphas_cumprod: Tensor) -> VPSchedule:
    r"""Returns a variance-preserving schedule within the levels, (steps,), of a network's training.

    .. math:: \frac{\sigma_0}{\alpha_0} \ge \sqrt{\frac{1 - \bar\alpha_0}{\bar\alpha_0}}, \qquad
              \frac{\sigma_1}{\alpha_1} \le \sqrt{\frac{1 - \bar\alpha_n}{\bar\alpha_n}}

    Where they reach further than sigma / alpha from 0.01 to 100, it ends there.
    """
    least, most = _ratios(alphas_cumprod)
    sigma_min = max(0.01, least)
    alpha_min = max(0.01, ((1 + sigma_min**2) / (1 + most**2)) ** 0.5)
    return VPSchedule(alpha_min=alpha_min, sigma_min=sigma_min)


def _ratios(alphas_cumprod: Tensor) -> tuple[float, float]:
    ratios = (1 / alphas_cumprod.double()[[0, -1]] - 1).sqrt()
    return ratios[0].item(), ratios[1].item()


def from_hub(name: str) -> Path:
    """Returns the folder of a model "owner/name", downloaded if need be."""
    folder = cache_folder() / "hub"
    try:
        return Path(
            snapshot_download(
                name,
                cache_dir=folder,
                allow_patterns=["*.json", "*.txt", "*.safetensors", "*.bin"],
                # Of Stable Diffusion: the same weights in other forms, and a filter of images.
                ignore_patterns=["v1-5-*", "*.fp16.*", "*.non_ema.*", "safety_checker/*"],
            )
        )
    except HFValidationError as error:
        raise ValueError(
            f"name_or_path is {name!r}, which is no name on the hub: {error}"
        ) from error
    except Exception as error:  # network, hub and disk make it fail anywhere
        raise FileNotFoundError(
            f"{name} is no folder here, not in {folder}, and cannot be downloaded "
            f"({error or type(error).__name__}): fetch the files of "
            f"https://huggingface.co/{name}/tree/main (as a rule 1 to 500 MB) by hand, and pass "
            "the folder you put them in as name_or_path"
        ) from error


def load_pixel_model(folder: Path, schedule: Schedule | None) -> DiffusersDenoiser:
    """Returns the unconditional `UNet2DModel` of a folder, or of the pipeline in it."""
    from diffusers import UNet2DModel  # slow to import

    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    network = load_network(unet, UNet2DModel)
    scheduler = alphas_cumprod_of(folder)
    try_network(network, unet)
    prior = DiffusersDenoiser(network, *scheduler, schedule)
    prior.image_shape = (network.config.in_channels, *sides_of(network))
    return prior


@torch.no_grad()
def try_network(network: Any, folder: Path) -> None:
    """Evaluates a UNet at its smallest size: some wrong settings show nowhere before."""
    channels = network.config.in_channels
    try:
        side = 2 ** len(network.config.block_out_channels)
        output = network(torch.zeros(1, channels, side, side), torch.ones(1)).sample
    except Exception as error:
        raise ValueError(
            f"{folder} has settings in config.json that its network fails with: {one_line(error)}"
        ) from error
    if tuple(output.shape) not in ((1, n * channels, side, side) for n in (1, 2)):
        raise ValueError(
            f"{folder} has a network that makes {tuple(output.shape)} of {channels} channels, "
            "expected as many or twice as many"
        )
    if not output.isfinite().all():
        raise ValueError(f"{folder} has a network whose output is not finite")


def load_network(folder: Path, *kinds: type[ModelMixin]) -> ModelMixin:
    """Returns a folder's network of `diffusers`, of one of these kinds; code in it never runs."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if kind is None:
        names = " or a ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{folder} holds a {name}, expected a {names}")
    known = inspect.signature(kind.__init__).parameters
    if unknown := [key for key in config if key not in known and not key.startswith("_")]:
        raise ValueError(
            f"{folder} has the setting {unknown[0]} in config.json, which {kind.__name__} of "
            "diffusers does not have here: update diffusers, or remove it where it does nothing"
        )
    if missing := [key for key in UNSEEN[kind.__name__] if key not in config]:
        raise ValueError(
            f"{folder} has no {missing[0]} in config.json, and the weights do not show it: add it"
        )
    if told := [key for key in CONDITIONS if config.get(key)]:
        raise ValueError(
            f"{folder} holds a conditional network, {told[0]} is {config[told[0]]!r} in "
            "config.json: expected an unconditional one, or text as the only condition"
        )
    if config.get("latents_mean") or config.get("latents_std"):
        raise ValueError(
            f"{folder} has latents_mean or latents_std in config.json: an autoencoder whose "
            "latents are shifted channel by channel is not supported"
        )
    try:
        network, loading = kind.from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # settings of any kind make it fail anywhere
        if not any(folder.glob("diffusion_pytorch_model*")):
            raise FileNotFoundError(
                f"{folder} has no weights of the network: {one_line(error)}"
            ) from error
        raise ValueError(
            f"{folder} holds no {kind.__name__}, or is damaged: {one_line(error)}"
        ) from error
    if missing := loading["missing_keys"]:  # diffusers would leave them at random
        raise ValueError(f"{folder} is damaged: {missing[0]} is not in the weights")
    if loading["unexpected_keys"]:  # of a network with more layers than config.json says
        raise ValueError(
            f"{folder} has weights of another network than config.json describes: nothing there "
            f"takes {loading['unexpected_keys'][0]}"
        )
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise ValueError(f"{folder} has weights that are not finite")
    return network


def sides_of(network: ModelMixin) -> tuple[int, int]:
    """Returns height and width of what a network of `diffusers` was made for."""
    size = network.config.sample_size
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        place = getattr(network.config, "_name_or_path", "network")
        raise ValueError(
            f"{place}: sample_size is {size!r} in config.json, expected one or two numbers"
        )
    return sides


def alphas_cumprod_of(folder: Path) -> tuple[Tensor, str]:
    """Returns what a pipeline's scheduler says: the levels (steps,), and the prediction type."""
    import diffusers

    home = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config = read_json(home / "scheduler_config.json")
    name = config.get("_class_name")
    # Of its own class, which has defaults of its own for what the settings do not say.
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    try:
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise TypeError("this is no scheduler")
        scheduler = cast("Any", kind).from_config(config)
        bar = scheduler.alphas_cumprod.cpu()
    except Exception as error:  # settings of any kind make it fail anywhere
        raise ValueError(
            f"{home} has the scheduler {name}, whose settings make no betas ({one_line(error)}): "
            "expected one with discrete timesteps, such as DDPMScheduler or DDIMScheduler"
        ) from error
    if len(bar) < 2 or not (bar.diff() < 0).all() or not 0 <= bar[-1] < bar[0] < 1:
        raise ValueError(f"{home} has betas whose noise does not grow step by step")
    once = {"prediction_type": "sample"} if config.get("predict_epsilon") is False else {}
    prediction_type = {**scheduler.config, **once, **config}.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"{home} has the prediction_type {prediction_type!r}, expected one of "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    return bar, prediction_type


def read_json(path: Path) -> dict:
    """Returns the content of one of a pipeline's json files."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a diffusers model or pipeline there")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected settings by name")
    return content


def scales_of_images(schedule: Schedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns signal and noise scales at t, shaped to multiply images."""
    alpha, sigma = schedule(t)
    shape = alpha.shape + (1,) * (x.ndim - max(1, alpha.ndim))
    return alpha.reshape(shape), sigma.reshape(shape)

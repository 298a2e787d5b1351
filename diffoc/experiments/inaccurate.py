r"""Priors that are wrong on purpose, by name: what is left of a method without its network?

- "faces64+noise0.1": Gaussian noise of 0.1 root mean squares of every tensor of weights;
- "untrained faces64": the network as its library initialises it, of pixel priors;
- "random ffhq256": the same, but what the library initialises with zeros is drawn as well;
- "identity faces64": no network at all.

An ADM network's last convolution starts at zero, so untrained it predicts no noise whatever it
sees: :math:`m(x, t) = x / \alpha_t`, and a step only rescales its state. That is the identity in
another gauge; hence "random". Of ADM, "ffhq256/32" has 32 channels in place of 128, and
"ffhq256/32/64" is that for images of 64 pixels.

The identity is the denoiser :math:`m(x, t) = x` with :math:`\alpha_t = 1`: every first-order step
is :math:`h_t(x) = x`, and the image is the start plus the sum of all controls. With the control
cost r and T steps that leaves regularised least squares,

.. math:: \min_{x_0} \; \frac{\|A x_0 - y\|^2}{2 s^2} + \frac{r}{2 T} \|x_0 - x_1\|^2 .
"""

import re
from typing import Any

import torch
from azula.denoise import Denoiser, DiracPosterior, KarrasDenoiser
from azula.noise import VESchedule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffoc.checks import check_at_least, check_member
from diffoc.priors.networks import NETWORKS
from diffoc.priors.pretrained import SHIPPED, default_schedule, load_prior, shape_of, untrained_adm

UNTRAINED, RANDOM, IDENTITY = "untrained ", "random ", "identity "
"""What a prior's name begins with."""

_NOISE = re.compile(r"(.+)\+noise(\d+(?:\.\d+)?(?:e-?\d+)?)", re.ASCII)

_OURS = ("mnist", "faces64")

MOST = 4096
"""The most channels, and the largest side, that a name may ask for."""


class IdentityDenoiser(Denoiser):
    """The denoiser of images of a shape (C, H, W) that leaves its input as it is."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.schedule = VESchedule(sigma_min=1e-2, sigma_max=1e2)
        self.image_shape = shape

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        return DiracPosterior(x_t.clone())  # another tensor, to which gradients can be hooked


def is_inaccurate(name: str) -> bool:
    """Returns whether :func:`load_inaccurate` knows a prior of that name."""
    return name.startswith((UNTRAINED, RANDOM, IDENTITY)) or _NOISE.fullmatch(name) is not None


def accurate_name(name: str) -> str:
    """Returns the name of the prior that a wrong one is made of."""
    for prefix in (UNTRAINED, RANDOM, IDENTITY):
        name = name.removeprefix(prefix)
    noisy = _NOISE.fullmatch(name)
    return noisy[1] if noisy else name


def load_inaccurate(name: str, learned_variance: bool = False) -> Denoiser:
    """Returns a prior of the module's names, always the same, on the CPU and in evaluation mode.

    With `learned_variance` an ADM network has its head for the variance.
    """
    if noisy := _NOISE.fullmatch(name):
        prior = load_prior(noisy[1], learned_variance=learned_variance)
        return add_noise(prior, float(noisy[2]))
    base = accurate_name(name)
    if name.startswith(IDENTITY):
        network, _, side = sizes_of(base)
        channels, *own = shape_of(network)
        return IdentityDenoiser((channels, *([side] * 2 if side else own)))
    if not name.startswith((UNTRAINED, RANDOM)):
        raise ValueError(f"name is {name!r}, expected such as 'faces64+noise0.1'")
    with torch.random.fork_rng(), _SameDraws():
        torch.manual_seed(0)
        prior = _untrained(base, learned_variance)
        if name.startswith(RANDOM):
            draw_zeros(prior)
    return prior


def add_noise(prior: Denoiser, level: float) -> Denoiser:
    """Adds Gaussian noise to the weights of a prior, in place, and returns it.

    The level, at least 0, is relative to the root mean square of every tensor. The noise of two
    levels differs only by a factor.
    """
    check_at_least(0, level=level)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in prior.parameters():
            # In float64, see _SameDraws.
            noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(weights)
            weights += level * weights.square().mean().sqrt() * noise
    return prior


def draw_zeros(network: nn.Module) -> None:
    """Draws weights that are all zero from N(0, 1 / fan-in), in place; biases stay zero."""
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1 and not weights.any():
                weights.normal_(std=weights[0].numel() ** -0.5)


class _SameDraws(TorchDispatchMode):
    """Makes random weights, so their SHA-256, the same on every CPU.

    torch scales uniform numbers, and draws normal ones in float32, by vector instructions: the
    last digits differ between CPUs. Uniform numbers in [0, 1[ and normal ones in float64 do not.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return func(*args, **kwargs)
        x, given = args[0], args[1:]
        first, second = torch.tensor([*given, *(0.0, 1.0)[len(given) :]]).to(x.dtype).double()
        if func is torch.ops.aten.uniform_.default:
            return x.copy_(first + (second - first) * torch.rand(x.shape, **kwargs).double())
        return x.copy_(first + second * torch.randn(x.shape, dtype=torch.float64, **kwargs))


def _untrained(name: str, learned_variance: bool) -> Denoiser:
    if name in _OURS:
        prior = KarrasDenoiser(NETWORKS[name](), default_schedule())
        prior.image_shape = SHIPPED[name]
        return prior.eval().requires_grad_(False)
    network, channels, side = sizes_of(name)
    check_member((*_OURS, "ffhq256", "imagenet256"), prior=network)
    prior = untrained_adm(network, channels, learned_variance)
    if side:
        prior.image_shape = (prior.image_shape[0], side, side)
    return prior


def sizes_of(name: str) -> tuple[str, int | None, int | None]:
    """Returns network, channels and side of "ffhq256/32/64"; None for what is the network's own."""
    network, *given = name.split("/")
    # ADM's norms have 32 groups of channels, and its network halves the sides five times.
    steps = (32, 2**5)
    good = [
        size.isascii() and size.isdigit() and int(size) % step == 0 and 0 < int(size) <= MOST
        for size, step in zip(given, steps, strict=False)
    ]
    if len(given) > 2 or not all(good):
        raise ValueError(
            f"prior is {name!r}, expected {network}, {network}/CHANNELS or {network}/CHANNELS/SIDE "
            f"with multiples of 32 up to {MOST}"
        )
    channels, side = (*map(int, given), None, None)[:2]
    return network, channels, side

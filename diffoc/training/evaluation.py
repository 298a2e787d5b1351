"""What training and the cards of the small networks report: denoising, samples, accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from azula.denoise import Denoiser
from azula.noise import VESchedule
from azula.sample import HeunSampler
from torch import Tensor, nn

from diffoc.data.images import as_states
from diffoc.data.manifest import load_weights
from diffoc.priors.networks import SIGMA_MAX, SIGMA_MIN, DigitClassifier, ResidualClassifier
from diffoc.priors.pretrained import load_prior
from diffoc.problems.metrics import frechet_between, frechet_distance, moments
from diffoc.training.trainer import time_of

SIGMAS = (0.1, 0.3, 1.0)


def trained(name: str) -> Denoiser:
    """A prior of the repository, with the schedule it was trained with: sigma from 0.002 to 80."""
    return load_prior(name, VESchedule(SIGMA_MIN, SIGMA_MAX))


def denoising_report(prior: Denoiser, held_out: np.ndarray) -> dict[str, float]:
    """PSNR in dB of denoised held-out images.

    Args:
        prior: made by :func:`trained`.
        held_out: uint8, (N, H, W).
    """
    return {f"psnr_sigma_{s:g}": round(denoising_psnr(prior, held_out, s), 2) for s in SIGMAS}


@torch.no_grad()
def digits_report(
    samples: Tensor, classifier: DigitClassifier | ResidualClassifier, real: Tensor
) -> dict[str, float | list[float]]:
    """What a classifier says of samples of digits.

    Args:
        samples: (N, 1, 28, 28) in [-1, 1].
        classifier: of digits.
        real: held-out digits in the same form, for the Fréchet distance.

    Returns:
        confident: the fraction whose largest probability is above 0.9; confident_real: of `real`;
        classes: the fraction of each class among the samples, largest probability;
        frechet: the distance to `real` in the classifier's last hidden layer (128 features);
        frechet_real: that of one half of `real` to the other, what a perfect prior would score.
    """
    generated, truth = classifier(samples).softmax(1), classifier(real).softmax(1)
    counts = generated.argmax(1).bincount(minlength=10) / len(samples)
    of_samples, of_real = classifier.features(samples), classifier.features(real)
    return {
        "confident": round((generated.amax(1) > 0.9).float().mean().item(), 4),
        "confident_real": round((truth.amax(1) > 0.9).float().mean().item(), 4),
        "classes": [round(c, 3) for c in counts.tolist()],
        "frechet": round(frechet_distance(of_samples, of_real), 3),
        "frechet_real": round(frechet_distance(of_real[::2], of_real[1::2]), 3),
    }


@torch.no_grad()
def frechet_to_digits(samples: Tensor, classifier: DigitClassifier) -> float:
    """The Fréchet distance of images to MNIST's test digits, whose moments are in the repository.

    Args:
        samples: (N, 1, 28, 28) in [-1, 1]; fewer than some thousand bias it upwards.
        classifier: its last hidden layer (128 features) is where the distance is taken.
    """
    real = load_weights("digit_features")
    features = classifier.features(samples)
    return frechet_between(moments(features), (real["mean"], real["covariance"]))


def report(name: str, samples: int = 1000, seed: int = 0) -> tuple[dict, Tensor]:
    """All that a card reports of a prior, and the samples that were judged.

    Args:
        name: "mnist" or "faces64".
        samples: how many to draw.
        seed: of the samples.

    Raises:
        FileNotFoundError: if the held-out images are missing.
    """
    from diffoc.data import images as data
    from diffoc.priors.weights import classifier

    prior = trained(name)
    generator = torch.Generator().manual_seed(seed)
    if name == "mnist":
        held_out, _ = data.mnist("test")
        drawn = draw_samples(prior, (samples, 1, 28, 28), generator)
        real = torch.from_numpy(held_out).float().unsqueeze(1) / 127.5 - 1
        judged = digits_report(drawn, classifier(), real)
        # Every tenth suffices; the first thousand would not, as the set may be sorted by class.
        return denoising_report(prior, held_out[::10]) | judged, drawn
    held_out = data.faces("test")
    drawn = draw_samples(prior, (samples, 1, 64, 64), generator)
    return denoising_report(prior, held_out), drawn


@torch.no_grad()
def denoising_psnr(prior: Denoiser, images: np.ndarray, sigma: float, seed: int = 0) -> float:
    """Mean PSNR in dB of denoised images at a noise level, on the [-1, 1] scale (peak 2).

    Args:
        prior: a denoiser made by :func:`denoiser`.
        images: as :func:`as_states` takes them.
        sigma: noise standard deviation.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = as_states(images)
    noisy = x + sigma * torch.randn(x.shape, generator=generator)
    level = time_of(torch.tensor(sigma))
    device = next(prior.parameters()).device
    estimate = [prior(part.to(device), level.to(device)).mean.cpu() for part in noisy.split(64)]
    error = (torch.cat(estimate) - x).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


@torch.no_grad()
def draw_samples(
    prior: Denoiser,
    shape: tuple[int, ...],
    generator: torch.Generator,
    steps: int = 32,
    decode: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Unconditional samples in [-1, 1] by Heun's method with steps uniform in log sigma.

    Args:
        prior: a denoiser made by :func:`denoiser`.
        shape: (B, C, H, W).
        generator: of the initial noise.
        steps: of the sampler; each takes two evaluations.
        decode: makes images of samples, before they are clipped.
    """
    device = next(prior.parameters()).device
    noise = SIGMA_MAX * torch.randn(shape, generator=generator)
    sampler = HeunSampler(prior, steps=steps, silent=True)
    parts = [decode(sampler(part.to(device)).cpu()) for part in noise.split(50)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images (N, 28, 28), uint8, that a classifier names rightly."""
    x = torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1
    device = next(network.parameters()).device
    guess = torch.cat([network(part.to(device)).argmax(1).cpu() for part in x.split(500)])
    return (guess == torch.from_numpy(labels)).float().mean().item()

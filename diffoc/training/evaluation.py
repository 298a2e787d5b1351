"""What training and the cards of the small networks report: denoising, samples, accuracy."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser
from azula.noise import VESchedule
from azula.sample import HeunSampler
from torch import Tensor, nn

from diffoc.data import images as data
from diffoc.data.files import try_folder
from diffoc.data.images import as_states
from diffoc.data.manifest import load_weights
from diffoc.priors.autoencoder import Autoencoder, reconstruction_psnr
from diffoc.priors.networks import SIGMA_MAX, SIGMA_MIN, DigitClassifier, ResidualClassifier
from diffoc.priors.pretrained import load_prior
from diffoc.priors.severity import SeverityEncoder, severities
from diffoc.priors.weights import classifier, load_into, read_weights
from diffoc.problems.metrics import frechet_between, frechet_distance, moments
from diffoc.training.trainer import denoiser, time_of

SIGMAS = (0.1, 0.3, 1.0)


def trained(name: str) -> Denoiser:
    """Returns a prior of the repository with its training's schedule: sigma from 0.002 to 80."""
    return load_prior(name, VESchedule(SIGMA_MIN, SIGMA_MAX))


@torch.no_grad()
def digits_report(
    samples: Tensor, classifier: DigitClassifier | ResidualClassifier, real: Tensor
) -> dict[str, float | list[float]]:
    """Returns what a classifier says of samples of digits and of real, held-out ones.

    Both are (N, 1, 28, 28) in [-1, 1]. `confident` is the fraction whose largest probability is
    above 0.9, `confident_real` that of the real ones, `classes` that of each class among the
    samples. `frechet` is the distance to the real ones in the classifier's last hidden layer (128
    features), `frechet_real` that of one half of them to the other, a perfect prior's score.
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
    """Returns the Fréchet distance of images to MNIST's test digits, whose moments ship.

    The samples are (N, 1, 28, 28) in [-1, 1]; fewer than some thousand bias it upwards. It is taken
    in the classifier's last hidden layer, of 128 features.
    """
    real = load_weights("digit_features")
    features = classifier.features(samples)
    return frechet_between(moments(features), (real["mean"], real["covariance"]))


def report(name: str, samples: int) -> tuple[dict, Tensor]:
    """Returns all that a card reports of "mnist" or "faces64", and the samples it was judged by."""
    prior = trained(name)
    held_out = data.mnist("test")[0] if name == "mnist" else data.colour_faces("test")
    shape = (samples, *as_states(held_out[:1]).shape[1:])
    drawn = draw_samples(prior, shape, torch.Generator().manual_seed(0))
    # Of digits every tenth; the first thousand would not do, as the set may be sorted by class.
    some = held_out[::10] if name == "mnist" else held_out
    numbers: dict = {f"psnr_sigma_{s:g}": round(denoising_psnr(prior, some, s), 2) for s in SIGMAS}
    if name == "mnist":
        numbers |= digits_report(drawn, classifier(), as_states(held_out))
    return numbers, drawn


def score(
    network: nn.Module,
    held_out: np.ndarray,
    labels: np.ndarray | None = None,
    decode: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[str, Tensor | None]:
    """Returns what a network is worth on held-out images as text, and a denoiser's samples.

    A classifier is one that labels are given for. `decode` makes images of samples.
    """
    _, text = _judged(network, held_out, labels)
    if labels is not None or isinstance(network, Autoencoder | SeverityEncoder):
        return text, None
    shape = (16, *as_states(held_out[:1]).shape[1:])
    generator = torch.Generator().manual_seed(0)
    return text, draw_samples(denoiser(network), shape, generator, decode=decode)


def worth(network: nn.Module, held_out: np.ndarray, labels: np.ndarray | None = None) -> float:
    """Returns one number by which two networks of a kind are compared, the larger the better.

    It is a classifier's accuracy, an autoencoder's PSNR, a denoiser's mean over the three levels,
    or a severity encoder's error, with the opposite sign. Arguments are as for :func:`score`.
    """
    return _judged(network, held_out, labels)[0]


def _judged(
    network: nn.Module, held_out: np.ndarray, labels: np.ndarray | None
) -> tuple[float, str]:
    """Returns :func:`worth`, and the same in words."""
    if labels is not None:
        share = accuracy(network, held_out, labels)
        return share, f"accuracy {share:.4f}"
    if isinstance(network, Autoencoder):
        psnr = reconstruction_psnr(network, held_out)
        return psnr, f"PSNR {psnr:.2f}"
    if isinstance(network, SeverityEncoder):
        pairs = severities(network, as_states(held_out), torch.Generator().manual_seed(0))
        correlation, error = torch.corrcoef(pairs.log())[0, 1], pairs[1].mean().item()
        return -error, f"RMSE {error:.3f}, correlation of severities {correlation:.3f}"
    levels = [denoising_psnr(denoiser(network), held_out, sigma) for sigma in SIGMAS]
    text = " / ".join(f"{psnr:.2f}" for psnr in levels)
    return sum(levels) / len(levels), f"PSNR at sigma 0.1, 0.3, 1: {text}"


def worth_of_file(
    path: Path, network: nn.Module, held_out: np.ndarray, labels: np.ndarray | None = None
) -> float:
    """Returns what a file's weights of such a network are worth, minus infinity without a file."""
    if not path.exists():
        return -math.inf
    before = copy.deepcopy(network)
    load_into(before, read_weights(path), f"path {path}")
    return worth(before, held_out, labels)


def write_unless_worse(write: Callable[[Path], Path], folder: Path, lost: float) -> Path:
    """Writes weights into a folder, or beside it those that are worth `lost` less than its own.

    `write` takes a folder and returns the file that it wrote there. A ValueError says where worse
    weights are: in the subfolder "worse". What is worth no number is worse.
    """
    if lost <= 0:
        return write(folder)
    beside = folder / "worse"
    try_folder(beside)
    path = write(beside)
    raise ValueError(
        f"out has {folder / path.name}, which is better by {lost:.3g} on held-out images: it "
        f"stays, and the new weights are in {path}"
    )


@torch.no_grad()
def denoising_psnr(prior: Denoiser, images: np.ndarray, sigma: float) -> float:
    """Returns the mean PSNR in dB (peak 2) of denoised images at a noise level sigma.

    The prior is made by :func:`diffoc.training.trainer.denoiser`.
    """
    x = as_states(images)
    noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
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
    """Returns samples in [-1, 1] by Heun's method with steps uniform in log sigma.

    The prior is made by :func:`diffoc.training.trainer.denoiser`, the shape is (B, C, H, W). Each
    step takes two evaluations. `decode` makes images of samples, before they are clipped.
    """
    device = next(prior.parameters()).device
    noise = SIGMA_MAX * torch.randn(shape, generator=generator)
    sampler = HeunSampler(prior, steps=steps, silent=True)
    parts = [decode(sampler(part.to(device)).cpu()) for part in noise.split(50)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction of images (N, 28, 28), uint8, that a classifier names rightly."""
    x = as_states(images)
    device = next(network.parameters()).device
    guess = torch.cat([network(part.to(device)).argmax(1).cpu() for part in x.split(500)])
    return (guess == torch.from_numpy(labels)).float().mean().item()

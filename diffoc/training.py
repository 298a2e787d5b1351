r"""The trainer of the small denoisers and of the digit classifier.

A training run is a function of its recipe and seed: every random number comes from one generator
whose state is part of the checkpoint, so a run that was stopped and resumed ends with the same
weights, bit for bit on one machine, as one that was not. Denoisers are preconditioned as in EDM
(Karras et al. 2022, arXiv:2206.00364) by azula's `KarrasDenoiser`; the noise level is log-normal,
and the weights that count are an exponential moving average.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VESchedule
from torch import Tensor, nn

from diffoc.networks import DigitClassifier, UNetBackbone

SIGMA_MIN, SIGMA_MAX = 2e-3, 80.0


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides its data and seed.

    Attributes:
        build: makes the network.
        images: the number of images to see.
        batch: images of a step.
        rate: the learning rate after warm-up; it decays to zero as a cosine.
        warmup: images of the linear warm-up.
        decay: of the moving average, per step.
        log_sigma: mean and standard deviation of log sigma (denoisers).
        flip: whether to mirror images at random.
    """

    build: Callable[[], nn.Module]
    images: int
    batch: int = 64
    rate: float = 1e-3
    warmup: int = 10_000
    decay: float = 0.999
    log_sigma: tuple[float, float] = (-1.0, 1.4)
    flip: bool = False


RECIPES = {
    "mnist": Recipe(lambda: UNetBackbone(28, (64, 96), fold=2), images=3_000_000),
    "faces64": Recipe(lambda: UNetBackbone(64, (96, 160), fold=4), images=5_000_000, flip=True),
    "classifier": Recipe(DigitClassifier, images=900_000, batch=128, decay=0.998),
}


@dataclass
class Run:
    """A training run in progress.

    Attributes:
        recipe: what is done.
        network: the weights that are optimised.
        average: their moving average, the result.
        optimizer: AdamW.
        generator: the source of all randomness after the initialisation.
        seen: images so far.
        losses: of the steps since they were last read.
    """

    recipe: Recipe
    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    seen: int = 0
    losses: list[float] = field(default_factory=list)


def start(recipe: Recipe, seed: int = 0) -> Run:
    """A run that has seen nothing yet.

    Args:
        recipe: what to train.
        seed: of the initialisation and of everything drawn later.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = recipe.build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=1e-2)
    average = copy.deepcopy(network).requires_grad_(False)
    return Run(recipe, network, average, optimizer, torch.Generator().manual_seed(seed))


def save(run: Run, path: Path) -> None:
    """Writes a checkpoint; the old one is replaced only by a complete new one."""
    state = {
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "seen": run.seen,
    }
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def resume(recipe: Recipe, path: Path) -> Run:
    """The run whose checkpoint lies at `path`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it belongs to another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path {path} is no checkpoint: call start() for a new run")
    state = torch.load(path, weights_only=True)
    run = start(recipe)
    try:
        run.network.load_state_dict(state["network"])
        run.average.load_state_dict(state["average"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"path {path} is a checkpoint of another network") from error
    run.optimizer.load_state_dict(state["optimizer"])
    run.generator.set_state(state["generator"])
    run.seen = state["seen"]
    return run


def learning_rate(recipe: Recipe, seen: int) -> float:
    """Linear warm-up, then a cosine to zero at the recipe's last image."""
    if seen < recipe.warmup:
        return recipe.rate * (seen + recipe.batch) / (recipe.warmup + recipe.batch)
    progress = (seen - recipe.warmup) / max(1, recipe.images - recipe.warmup)
    return recipe.rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def denoising_loss(network: nn.Module, x: Tensor, run: Run) -> Tensor:
    r"""EDM's loss :math:`E[(1/\sigma^2 + 1) \|m(x + \sigma z, \sigma) - x\|^2]` per pixel.

    Args:
        network: a backbone.
        x: clean images in [-1, 1], (B, C, H, W).
        run: gives the noise's distribution and generator.
    """
    mean, std = run.recipe.log_sigma
    log_sigma = mean + std * torch.randn(len(x), generator=run.generator)
    sigma = log_sigma.exp().clamp(SIGMA_MIN, SIGMA_MAX)
    z = torch.randn(x.shape, generator=run.generator)
    expanded = sigma.reshape(-1, 1, 1, 1)
    estimate = denoiser(network)(x + expanded * z, time_of(sigma)).mean
    return ((1 / expanded**2 + 1) * (estimate - x).square()).mean()


def denoiser(network: nn.Module) -> KarrasDenoiser:
    """A backbone as azula denoiser, with sigma from 0.002 to 80; its schedule may be exchanged."""
    return KarrasDenoiser(network, VESchedule(SIGMA_MIN, SIGMA_MAX))


def time_of(sigma: Tensor) -> Tensor:
    """The time at which the schedule of :func:`denoiser` has the noise level sigma."""
    return torch.log(sigma / SIGMA_MIN) / math.log(SIGMA_MAX / SIGMA_MIN)


def step(run: Run, images: np.ndarray, labels: np.ndarray | None = None) -> float:
    """One optimisation step on a random batch; returns its loss.

    Args:
        run: changed in place.
        images: the training set, uint8, (N, H, W).
        labels: of the images, for a classifier; None for a denoiser.
    """
    recipe = run.recipe
    index = torch.randint(len(images), (recipe.batch,), generator=run.generator).numpy()
    x = torch.from_numpy(images[index]).float().unsqueeze(1) / 127.5 - 1
    if recipe.flip:
        mirrored = torch.rand(len(x), generator=run.generator) < 0.5
        x = torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(-1), x)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, run.seen)
    if labels is None:
        loss = denoising_loss(run.network, x, run)
    else:
        target = torch.from_numpy(labels[index]).long()
        loss = nn.functional.cross_entropy(run.network(shift(x, run.generator)), target)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
    run.optimizer.step()
    run.seen += recipe.batch
    # A young average forgets its random start faster.
    decay = min(recipe.decay, run.seen / (run.seen + 10 * recipe.batch))
    with torch.no_grad():
        for mean, new in zip(run.average.parameters(), run.network.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)
    return loss.item()


def shift(x: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """Images moved by up to `most` pixels each way, the gap filled with black."""
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    height, width = x.shape[-2:]
    padded = nn.functional.pad(x, (most,) * 4, value=-1.0)
    return padded[..., down : down + height, right : right + width]


def train(
    run: Run,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    checkpoint: Path | None = None,
    every_seconds: float = 120.0,
    report: Callable[[Run, float], None] | None = None,
) -> None:
    """Trains until the recipe's last image, writing checkpoints on the way.

    Args:
        run: changed in place.
        images, labels: as in :func:`step`.
        checkpoint: where to write them, every so many seconds and at the end.
        every_seconds: between checkpoints and reports.
        report: called with the run and the images per second at the same rhythm.
    """
    mark, seen = time.monotonic(), run.seen
    while run.seen < run.recipe.images:
        run.losses.append(step(run, images, labels))
        elapsed = time.monotonic() - mark
        if elapsed > every_seconds or run.seen >= run.recipe.images:
            if checkpoint:
                save(run, checkpoint)
            if report:
                report(run, (run.seen - seen) / elapsed)
            run.losses.clear()
            mark, seen = time.monotonic(), run.seen


@torch.no_grad()
def denoising_psnr(network: nn.Module, images: np.ndarray, sigma: float, seed: int = 0) -> float:
    """Mean PSNR in dB of denoised images at a noise level, on the [-1, 1] scale (peak 2).

    Args:
        network: a backbone.
        images: uint8, (N, H, W).
        sigma: noise standard deviation.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1
    noisy = x + sigma * torch.randn(x.shape, generator=generator)
    level = time_of(torch.tensor(sigma))
    estimate = [denoiser(network)(part, level).mean for part in noisy.split(64)]
    error = (torch.cat(estimate) - x).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


@torch.no_grad()
def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images (N, 28, 28), uint8, that a classifier names rightly."""
    x = torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1
    guess = torch.cat([network(part).argmax(1) for part in x.split(500)])
    return (guess == torch.from_numpy(labels)).float().mean().item()

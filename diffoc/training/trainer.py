r"""The trainer of the small denoisers and of the digit classifier.

A training run is a function of its plan and seed: every random number comes from one generator
whose state is part of the checkpoint, so a run that was stopped and resumed ends with the same
weights, bit for bit on one machine, as one that was not. Denoisers are preconditioned as in EDM
(Karras et al. 2022, arXiv:2206.00364) by azula's `KarrasDenoiser`; the noise level is log-normal,
and the weights that count are an exponential moving average.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VESchedule
from torch import Tensor, nn

from diffoc.data.files import replacing
from diffoc.data.images import as_states
from diffoc.priors.autoencoder import Autoencoder, autoencoding_loss
from diffoc.priors.networks import (
    NETWORKS,
    SIGMA_MAX,
    SIGMA_MIN,
    DigitClassifier,
    ResidualClassifier,
    UNetBackbone,
)
from diffoc.priors.severity import SeverityEncoder, severity_loss
from diffoc.priors.weights import load_into, read_checkpoint
from diffoc.training.states import LinearDenoiser, changes, excess, faint


@dataclass(frozen=True)
class Plan:
    """What a training run depends on besides its data and seed.

    Attributes:
        build: a function that makes the network.
        images: the number of images to see.
        batch: the number of images in a step.
        rate: the learning rate after warm-up; it decays to zero as a cosine.
        warmup: the number of images in the linear warm-up.
        decay: the factor by which the moving average decays in a step.
        log_sigma: the mean and standard deviation of log sigma, for denoisers.
        flip: whether to mirror images at random.
        faint: the share of a denoiser's batch that has less image and less noise than its level
            says, see :mod:`diffoc.training.states`.
        contraction: the weight of a denoiser's excess gain, see there.
        loss: a function of the network, a batch and the generator, for what is no denoiser and no
            classifier.
    """

    build: Callable[[], nn.Module]
    images: int
    batch: int = 64
    rate: float = 1e-3
    warmup: int = 10_000
    decay: float = 0.999
    log_sigma: tuple[float, float] = (-1.0, 1.4)
    flip: bool = False
    faint: float = 0.0
    contraction: float = 0.0
    loss: Callable[[Any, Tensor, torch.Generator], Tensor] | None = None


PLANS = {
    "mnist": Plan(
        NETWORKS["mnist"],
        images=2_700_000,
        rate=2e-3,
        decay=0.9995,
        log_sigma=(-0.3, 1.2),  # around 1, where the digit is decided
    ),
    "faces64": Plan(
        NETWORKS["faces64"],
        images=700_000,
        batch=32,
        rate=2e-3,
        flip=True,
        faint=0.4,
        contraction=20.0,
    ),
    "faces64_autoencoder": Plan(
        Autoencoder, images=50_000, batch=32, rate=2e-3, flip=True, loss=autoencoding_loss
    ),
    "faces64_severity": Plan(
        SeverityEncoder, images=24_000, batch=32, flip=True, loss=severity_loss
    ),
    # Latents are twice as wide as images: the noise levels move with them.
    "faces64_latent": Plan(
        NETWORKS["faces64_latent"], images=100_000, batch=32, rate=2e-3, log_sigma=(-0.4, 1.4)
    ),
    "classifier": Plan(DigitClassifier, images=900_000, batch=128, decay=0.998),
    "judge": Plan(ResidualClassifier, images=600_000, batch=128, decay=0.998),
}


@dataclass
class Run:
    """A training run in progress.

    Attributes:
        network: the network with the weights that are optimised.
        average: the network with their moving average, the result.
        generator: the source of all randomness after the initialisation, on the CPU so that every
            device sees the same numbers.
        precision: the precision of the forward and backward passes, torch.float32 or
            torch.bfloat16; weights, optimiser and loss stay in float32.
        seen: the number of images seen so far.
        linear: the training images' Gaussian, where the plan has faint states; see :func:`train`.
        losses: the losses of the steps since they were last read.
    """

    plan: Plan
    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    precision: torch.dtype = torch.float32
    seen: int = 0
    linear: LinearDenoiser | None = None
    losses: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Returns where the weights are."""
        return next(self.network.parameters()).device


def start(
    plan: Plan,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    weights: Mapping[str, Tensor] | None = None,
) -> Run:
    """Returns a run that has seen nothing yet.

    The seed is that of the initialisation and of everything drawn later. It begins with weights, of
    an earlier run's average, say, or with random ones.
    """
    if precision not in (torch.float32, torch.bfloat16):
        raise ValueError(f"precision is {precision}, expected torch.float32 or torch.bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = plan.build()
    if weights is not None:
        load_into(network, weights, "weights")
    # On a CPU neither memory format is faster; tensor cores want the channels last.
    on_cpu = torch.device(device).type == "cpu"
    layout = torch.contiguous_format if on_cpu else torch.channels_last
    network = network.to(device).to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.rate, weight_decay=1e-2)
    average = copy.deepcopy(network).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    return Run(plan, network, average, optimizer, generator, precision)


def save(run: Run, path: Path) -> None:
    """Writes a checkpoint; the old one is replaced only by a complete new one."""
    state = {
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "seen": run.seen,
    }
    with replacing(path) as part:
        torch.save(state, part)


def resume(
    plan: Plan,
    path: Path,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> Run:
    """Returns the run whose checkpoint lies at `path`; device and precision are as for `start`."""
    state = read_checkpoint(path)
    run = start(plan, device=device, precision=precision)
    load_into(run.network, state["network"], f"path {path}")
    load_into(run.average, state["average"], f"path {path}")
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        run.generator.set_state(state["generator"])
    except Exception as error:  # what is wrong there fails anywhere
        raise ValueError(f"path {path} is damaged, begin anew without it: {error!r}") from error
    run.seen = state["seen"]
    return run


def learning_rate(plan: Plan, seen: int) -> float:
    """Returns a linear warm-up, then a cosine to zero at the plan's last image."""
    if seen < plan.warmup:
        return plan.rate * (seen + plan.batch) / (plan.warmup + plan.batch)
    progress = (seen - plan.warmup) / max(1, plan.images - plan.warmup)
    return plan.rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def denoising_loss(network: nn.Module, x: Tensor, run: Run) -> Tensor:
    r"""Returns EDM's loss :math:`E[(1/\sigma^2 + 1) \|m(x + \sigma z, \sigma) - x\|^2]` per pixel.

    Images x are clean. The plan may add the penalty of :mod:`diffoc.training.states`.
    """
    mean, std = run.plan.log_sigma
    log_sigma = mean + std * torch.randn(len(x), generator=run.generator)
    sigma = log_sigma.exp().clamp(SIGMA_MIN, SIGMA_MAX).to(x.device)
    z = torch.randn(x.shape, generator=run.generator).to(x.device)
    expanded = sigma.reshape(-1, 1, 1, 1)
    states, target, k = x + expanded * z, x, 0
    if run.linear is not None:
        k = round(run.plan.faint * len(x))
        first = faint(x[:k], z[:k], sigma[:k], run.linear, run.generator)
        states, target = (
            torch.cat([some, rest[k:]]) for some, rest in zip(first, (states, x), strict=True)
        )
    mean = denoiser(network)
    estimate = mean(states, time_of(sigma)).mean
    loss = ((1 / expanded**2 + 1) * (estimate - target).square()).mean()
    if run.plan.contraction:
        change = changes(x[k:], run.generator)
        after = mean(states[k:] + change, time_of(sigma[k:])).mean
        penalty = excess(estimate[k:].detach(), after, change, sigma[k:]).square().mean()
        loss = loss + run.plan.contraction * penalty
    return loss


def denoiser(network: nn.Module) -> KarrasDenoiser:
    """Returns a backbone as azula denoiser, whose schedule has sigma from 0.002 to 80."""
    return KarrasDenoiser(network, VESchedule(SIGMA_MIN, SIGMA_MAX))


def time_of(sigma: Tensor) -> Tensor:
    """Returns the time at which the schedule of :func:`denoiser` has the noise level sigma."""
    return torch.log(sigma / SIGMA_MIN) / math.log(SIGMA_MAX / SIGMA_MIN)


def step(
    run: Run, images: np.ndarray, labels: np.ndarray | None = None, forward: nn.Module | None = None
) -> float:
    """Takes one optimisation step of a run on a random batch, and returns its loss.

    The training set is given as :func:`as_states` takes it, with labels for a classifier. `forward`
    may be the run's network, compiled.
    """
    plan, forward = run.plan, run.network if forward is None else forward
    index = torch.randint(len(images), (plan.batch,), generator=run.generator).numpy()
    x = as_states(images[index])
    if plan.flip:
        mirrored = torch.rand(len(x), generator=run.generator) < 0.5
        x = torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(-1), x)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(plan, run.seen)
    device = run.device
    with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == torch.bfloat16):
        if labels is not None:
            target = torch.from_numpy(labels[index]).long().to(device)
            logits = forward(shift(x, run.generator).to(device))
            loss = nn.functional.cross_entropy(logits.float(), target)
        elif plan.loss:
            loss = plan.loss(forward, x.to(device), run.generator)
        else:
            loss = denoising_loss(forward, x.to(device), run)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
    run.optimizer.step()
    run.seen += plan.batch
    # A young average forgets its random start faster.
    decay = min(plan.decay, run.seen / (run.seen + 10 * plan.batch))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(run.average.parameters()), list(run.network.parameters()), 1 - decay
        )
    return loss.item()


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images moved by up to two pixels each way, the gap filled with black."""
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    height, width = x.shape[-2:]
    padded = nn.functional.pad(x, (2, 2, 2, 2), value=-1.0)
    return padded[..., down : down + height, right : right + width]


def train(
    run: Run,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    checkpoint: Path | None = None,
    every_seconds: float = 120.0,
    report: Callable[[Run, float], None] | None = None,
    compile: bool = False,
) -> None:
    """Trains until the plan's last image, on images and labels as for :func:`step`.

    Every `every_seconds` and at the end a checkpoint is written, and `report` is called with the
    run and the images per second. The network may be compiled, which pays on a GPU.
    """
    forward = run.network
    for network in (run.network, run.average):
        if isinstance(network, UNetBackbone) and network.exact_means:
            network.measure_means(as_states(images).to(run.device))
    if run.plan.faint:
        run.linear = LinearDenoiser.fit(as_states(images).to(run.device))
    if compile:
        forward = torch.compile(run.network)  # type: ignore[assignment]  # a module, typed as function
    mark, seen = time.monotonic(), run.seen
    while run.seen < run.plan.images:
        run.losses.append(step(run, images, labels, forward))
        elapsed = time.monotonic() - mark
        if elapsed > every_seconds or run.seen >= run.plan.images:
            if checkpoint:
                save(run, checkpoint)
            if report:
                report(run, (run.seen - seen) / elapsed)
            run.losses.clear()
            mark, seen = time.monotonic(), run.seen

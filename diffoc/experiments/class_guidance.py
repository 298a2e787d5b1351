r"""Digits from a label: the controller with a classifier's likelihood, and guidance beside it.

The terminal cost is :math:`-\log p(c \mid x_0)` of a classifier (Section 6, Figure 5). The process
is ancestral with frozen noise, so that the uncontrolled one draws samples of the prior, and a
control costs what it changes of that noise:

.. math:: \tfrac12 \sum_i \|u_i\|^2 / c_i^2,

with :math:`c_i` the standard deviation of the noise that entered the state before step i. For
controls that do not look at the noise to come, the mean of this is the Kullback-Leibler divergence
of the controlled process from the prior's; a plan for one draw of the noise sees all of it.

Guidance looks one step ahead (Theorem 4.3) and is the first guess; the plan then lowers the cost of
the controls as far as the classifier stays sure.
"""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from azula.denoise import Denoiser
from safetensors.torch import save_file
from torch import Tensor

from diffoc.checks import check_at_least, check_tensor, evaluating
from diffoc.costs import ClassLikelihood, ControlCost
from diffoc.data import mnist
from diffoc.data.files import appending, csv_text
from diffoc.data.images import as_states
from diffoc.data.provenance import environment
from diffoc.experiments.records import COUNTS, ENVIRONMENT
from diffoc.priors.counting import CountedPrior
from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import classifier
from diffoc.problems.metrics import frechet_distance
from diffoc.process import ReverseProcess, draw_noise
from diffoc.result import Result
from diffoc.rules import LineSearch
from diffoc.solve import solve

SHARPNESS = 3000.0
"""Weight of -log p(c | x_0) against the controls' cost. With weight 1 the cheapest plan gives the
class up: controls cost more than the nats they gain. With this, all below 0.999 is dear."""

DIGIT = (1, 28, 28)
"""The shape of what the classifiers take."""

DAMPING = 1.0
"""Tikhonov's constant in units of the control cost's weights: a full step goes half of the way
to the controls that the gradient asks for."""


def noise_weights(process: ReverseProcess) -> Tensor:
    """Returns the weights :math:`1 / c_i^2` of the control cost, (T,); the process is ancestral."""
    if process.method != "ddpm" or process.mode != "input":
        raise ValueError(
            f"process is {process.method} in {process.mode} mode, expected ddpm in input mode"
        )
    _, sigma = process.denoiser.schedule(process.times[0])
    before = torch.tensor([sigma.item(), *(c for _, _, c in process.coefficients[:-1])])
    return 1 / before**2


def ancestral(
    prior: Denoiser, steps: int, labels: Tensor, first: int = 0
) -> tuple[ReverseProcess, Tensor]:
    """Returns an ancestral process of T steps, and its initial states, (B, ...) float32.

    The labels are (B,) int64. An image's noise is seeded by its label and its number, which counts
    from `first`: it is the same in any batch.
    """
    drawn = []
    for i, label in enumerate(labels.tolist(), start=first):
        generator = torch.Generator().manual_seed(10 * i + label)
        drawn.append(draw_noise(steps + 1, (1, *prior.image_shape), generator))
    noise = torch.cat(drawn, dim=1).float()
    process = ReverseProcess(prior, steps, "ddpm", noise=noise[1:])
    _, sigma = prior.schedule(process.times[0])
    return process, sigma.item() * noise[0]


def planned(process: ReverseProcess, cost: ClassLikelihood, x: Tensor, strength: float) -> Result:
    """Returns images by an iteration of iLQR of rank 0 from guidance's controls of a strength.

    The process is ancestral, in input mode, the initial states are (B, ...). It takes at most 6 T
    evaluations: an iteration tries three step sizes, and images that refuse all roll out again.
    """
    weights = noise_weights(process)
    return solve(
        process,
        lambda x0: SHARPNESS * cost(x0),
        x,
        guidance_controls(process, cost, x, strength)[0],
        control_cost=ControlCost(weights),
        rank=0,
        iterations=1,
        rule=LineSearch(trials=3, contraction=0.25),
        regularization=DAMPING * weights,
    )


@dataclass(frozen=True)
class Way:
    """A way to make digits: T steps, guidance's strength or None, and whether it begins a plan."""

    steps: int
    strength: float | None
    plan: bool = False


WAYS = {
    "prior": Way(50, None),
    "guidance": Way(50, 4.0),
    "control": Way(50, 4.0, plan=True),
    "dps": Way(300, 2.0),
}
"""Ours, its first guess, DPS with as many evaluations as ours may take, and no guidance.

Strengths are those of 1, 2 and 4 for which the judge agreed most often on 50 to 80 other images."""

COLUMNS = (
    *("prior", "way", "label", "images", "steps", "strength", *COUNTS),
    *("guided", "judged", "sure", "diversity", "frechet", "seconds", *ENVIRONMENT, "commit"),
)
_HEADER = ",".join(COLUMNS) + "\n"


def make(way: Way, prior: Denoiser, label: int, images: int) -> Tensor:
    """Returns digits of a label, (images, 1, 28, 28)."""
    labels = torch.full((images,), label)
    process, x = ancestral(prior, way.steps, labels)
    if way.strength is None:
        with torch.no_grad():
            return process.rollout(x)[-1]
    cost = ClassLikelihood(classifier("mnist").requires_grad_(False), labels)
    if way.plan:
        return planned(process, cost, x, way.strength).x0
    return guidance_controls(process, cost, x, way.strength)[1]


@torch.no_grad()
def measures(digits: Tensor, label: int, real: Tensor) -> dict[str, float]:
    """Returns what can be said of digits (N, 1, 28, 28), N at least 2, made from one label.

    "guided" is the fraction that the guiding classifier assigns to the label, "judged" that of the
    second classifier, which no method has seen. "sure" is the fraction for which the second one's
    largest probability is above 0.9, "diversity" the mean Euclidean distance of two of the images,
    and "frechet" the distance to `real` digits of that label in the second one's last hidden layer.
    """
    guide, judge = classifier("mnist"), classifier("judge")
    probability = judge(digits).softmax(1)
    return {
        "guided": (guide(digits).argmax(1) == label).float().mean().item(),
        "judged": (probability.argmax(1) == label).float().mean().item(),
        "sure": (probability.amax(1) > 0.9).float().mean().item(),
        "diversity": torch.pdist(digits.flatten(1)).mean().item(),
        "frechet": frechet_distance(judge.features(digits), judge.features(real)),
    }


def record(
    path: Path, folder: Path, images: int, labels: Sequence[int] = range(10), name: str = "mnist"
) -> None:
    """Makes digits of labels in all ways, and appends a row for each to a table, a CSV file.

    Rows that the table has are not made again. The digits, `images` of each way and label, at least
    2, go to a folder as `WAY_LABEL.safetensors`. The prior is one of digits, (1, 28, 28), by its
    name for :func:`diffoc.load_prior`; a ValueError refuses another.
    """
    prior = load_prior(name)
    if tuple(prior.image_shape) != DIGIT:
        raise ValueError(
            f"prior {name!r} makes {tuple(prior.image_shape)}, expected digits {DIGIT}"
        )
    digits, classes = mnist("test")
    torch.set_flush_denormal(True)
    with appending(path, lambda content: _parse(path, content)[1]) as append:
        if not path.stat().st_size:
            append(_HEADER)
        done = {(row["way"], row["label"]) for row in read(path) if row["prior"] == name}
        wanted = [(way, label) for label in labels for way in WAYS if (way, str(label)) not in done]
        for way, label in wanted:
            real = as_states(digits[classes == label])
            counted = CountedPrior(prior)
            counted.image_shape = prior.image_shape
            began = time.perf_counter()
            made = make(WAYS[way], counted, label, images).cpu()
            seconds = (time.perf_counter() - began) / images
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"digits": made}, folder / f"{way}_{label}.safetensors")
            row = {"prior": name, "way": way, "label": label, "images": images, **environment()}
            row |= {"steps": WAYS[way].steps, "strength": WAYS[way].strength or 0.0}
            row |= {key: getattr(counted, key) / images for key in COUNTS}
            row |= {key: f"{value:.6g}" for key, value in measures(made, label, real).items()}
            row["seconds"] = f"{seconds:.3f}"
            append(csv_text(COLUMNS, [row]))
            print(", ".join(f"{key} {row[key]}" for key in COLUMNS[:14]), flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a table that :func:`record` wrote, but for one that it did not finish.

    A ValueError refuses a table of another version, and a row that has not all of its columns.
    """
    return _parse(path, path.read_bytes())[0]


def _parse(path: Path, content: bytes) -> tuple[list[dict[str, str]], int]:
    """Returns the complete rows of a table's content, and the number of bytes they take."""
    if _HEADER.encode().startswith(content):
        return [], 0  # was stopped before its first row
    size = content.rfind(b"\n") + 1
    rows = list(csv.reader(content[:size].decode(errors="replace").splitlines()))
    if rows[:1] != [list(COLUMNS)] or any(len(row) != len(COLUMNS) or "" in row for row in rows):
        raise ValueError(f"{path} is damaged, or no table of this version: name another")
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:]], size


def guidance_controls(
    process: ReverseProcess, cost: Callable[[Tensor], Tensor], x: Tensor, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Returns guidance's controls, (T, B, ...), and the images that they lead to, (B, ...).

    The posterior mean that a step uses is moved to that of the conditional score, where the cost
    is a negative log-likelihood and its value at Tweedie's estimate stands for that of x_t:

    .. math:: u = -w \, b_t \, \frac{\sigma_t^2}{\alpha_t} \nabla_{x_t} \ell_0(m(x_t, t)) .

    The process is in input mode: a control after the last step would act on the image itself, and
    is left out. The cost :math:`\ell_0` maps images (B, ...) to costs (B,), each image to its own.
    The strength w is 1 for the score, and 0 for no guidance. The work is T evaluations and T
    products.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233; at Tweedie's estimate, Chung et al. 2022,
    arXiv:2209.14687.
    """
    check_at_least(0, strength=strength)
    check_tensor("x", x)
    if process.mode != "input":
        raise ValueError(f"process is in {process.mode} mode, expected input")
    controls, u = [], torch.zeros_like(x)
    for i in range(process.horizon):
        controls.append(u)
        x = (x + u).detach().requires_grad_()
        t = process.times[i].to(x)
        alpha, sigma = process.denoiser.schedule(t)
        with torch.enable_grad(), evaluating(process.denoiser, cost):
            mean = process.denoiser(x, t).mean.to(x.dtype)
            (gradient,) = torch.autograd.grad(cost(mean).sum(), x)
        _, b, _ = process.coefficients[i]
        u = -strength * b * sigma**2 / alpha * gradient
        x = process.affine(i, x, mean).detach()
    return torch.stack(controls), x

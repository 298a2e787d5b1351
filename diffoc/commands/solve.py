"""The subcommand solve: from a picture, or a measurement, to files."""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from azula.denoise import Denoiser
from deepinv.physics import Inpainting, Physics
from matplotlib.figure import Figure
from torch import Tensor

from diffoc.baselines.noise_level import times_of_levels
from diffoc.baselines.paper import PAPER
from diffoc.baselines.released import RELEASED
from diffoc.checks import check_member
from diffoc.data.files import replacing, try_folder
from diffoc.data.pictures import (
    OVER_WHITE,
    picture_size,
    read_picture,
    read_transparency,
    write_picture,
)
from diffoc.figures import show
from diffoc.priors import pretrained
from diffoc.priors.latent import LatentPrior
from diffoc.problem import Problem
from diffoc.problems.metrics import SMALLEST, image_metrics
from diffoc.problems.tasks import NOISE_STD, measure, measured, task
from diffoc.recipe import COLD, OURS, QUICK, STOPPED, Recipe
from diffoc.reconstruct import reconstruct
from diffoc.result import Result

FROM_PICTURES = ("super_resolution", "gaussian_blur", "random_inpainting", "box_inpainting")
"""Their measurement is a picture that says all that is needed to know A."""

FAMILIAR = {"faces64": {0.3: 27.6, 1.0: 21.8}}
"""The PSNR in dB, by noise level, that 99 % of 512 held-out faces reach (cards of the priors)."""

WRITTEN = ("measurement.png", "reconstruction.png", "comparison.png", "report.json")
"""What `solve` writes beside measurement.npz, which stays as it is where it was read."""

TWIN = (
    "the image and its twin, turned by 180 degrees, explain the measurement equally well: "
    "--starts N tries several starts, and the cheapest image is written"
)
"""A note on phase retrieval."""

RECIPES = {recipe.name: recipe for recipe in (OURS, QUICK, STOPPED, COLD, PAPER, RELEASED)}
"""What `--recipe` names; the tables run the same ones."""


@dataclass(frozen=True)
class Settings:
    """What `solve` does.

    Attributes:
        task: a key of :data:`diffoc.problems.tasks.TASKS`.
        prior: a name or path for :func:`diffoc.load_prior`.
        noise_std: the measurement's noise, on the scale of images in [-1, 1].
        recipe: a key of :data:`RECIPES`.
        budget, steps, iterations, rank: numbers that replace the recipe's; None leaves them. A
            budget replaces the recipe's iterations, too; with iterations given, both are limits; it
            limits the steps of a guess alone.
        starts: the number of starts, of which the cheapest image is written.
        seed: the seed of mask, kernel, noise and whatever else is random.
    """

    task: str
    prior: str
    noise_std: float = NOISE_STD
    recipe: str = OURS.name
    budget: int | None = None
    steps: int | None = None
    iterations: int | None = None
    rank: int | None = None
    starts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_member(RECIPES, recipe=self.recipe)
        self.changed  # noqa: B018  refuses what the recipe cannot have

    @property
    def changed(self) -> Recipe:
        """Returns the recipe as tuned for the task, with what was given in place of its own.

        What was tuned goes together: where steps or iterations were given it is left out. A budget
        takes away a limit of iterations.
        """
        names = ("budget", "steps", "iterations", "rank")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        recipe = RECIPES[self.recipe]
        if self.budget is not None and given.get("iterations", recipe.iterations) == 0:
            # A guess alone has two evaluations a step.
            given["steps"] = min(given.get("steps", recipe.steps), given.pop("budget") // 2)
        recipe = replace(recipe, **given).at(self.task)
        limited = recipe.iterations and self.iterations is None
        return replace(recipe, iterations=None) if self.budget and limited else recipe


@dataclass(frozen=True)
class Case:
    """An inverse problem: operator, measurement (1, ...), and the truth (1, C, H, W) if known."""

    physics: Physics
    y: Tensor
    truth: Tensor | None
    notes: list[str]


def solve(args: argparse.Namespace) -> int:
    """Reconstructs a picture from a measurement of it, and writes what happened."""
    chosen = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
    given = args.image or args.measurement
    if given.name in WRITTEN and given.parent.resolve() == args.out.resolve():
        raise ValueError(f"out is {args.out}, where {given} would be written over: name another")
    try_folder(args.out)
    prior = pretrained.load_prior(args.prior)
    if isinstance(prior, LatentPrior):
        raise ValueError(f"prior is {args.prior}, one of latents: expected one of images")
    if args.measurement:
        if args.crop:
            raise ValueError("crop is given, but it is of a picture: a measurement is taken whole")
        case = from_measurement(args.measurement, prior.image_shape, settings)
    else:
        case = from_picture(args.image, prior.image_shape, settings, args.crop)
        assert case.truth is not None
        case.notes.extend(unfamiliar(prior, settings, case.truth))
    if args.task == "phase_retrieval":
        case.notes.append(TWIN)
    for note in case.notes:
        print(f"note: {note}")
    result, report = run(case, prior, settings, args.device)
    for path in write(args.out, case, result.x0, report):
        print(path)
    if report["metrics"]:
        print(", ".join(f"{name} {value:g}" for name, value in report["metrics"].items()))
    print(
        f"residual {report['residual_over_noise']:g} of the noise, "
        f"{report['evaluations']} evaluations, {report['seconds']:g} s"
    )
    return 0


def from_picture(
    path: Path,
    shape: tuple[int, int, int],
    settings: Settings,
    crop: tuple[int, int, int] | None = None,
) -> Case:
    """Simulates the measurement of a picture; arguments and errors as for `read_picture`."""
    if min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"prior is {settings.prior!r}, with images of {shape[1]} x {shape[2]}: solve measures "
            f"SSIM, which needs sides of {SMALLEST} or more"
        )
    truth, notes = read_picture(path, shape, crop)
    generator = torch.Generator().manual_seed(settings.seed)
    physics = task(settings.task, shape, generator)
    y = measure(physics, truth, generator, settings.noise_std)
    return Case(physics, y, truth, notes + saturation(y, settings.task))


@torch.no_grad()
def unfamiliar(prior: Denoiser, settings: Settings, truth: Tensor) -> list[str]:
    """Returns a note where a prior of faces denoises a picture worse than its held-out faces.

    Faces that are sharper or stranger than those get it, too, and smooth pictures of anything do
    not: it says how well the prior knows the picture, (1, C, H, W), not what is in it. There are no
    notes for priors that are not in :data:`FAMILIAR`.
    """
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    for ratio, least in FAMILIAR.get(settings.prior, {}).items():
        t = times_of_levels(prior.schedule, torch.tensor([ratio])).to(truth)
        alpha, _ = prior.schedule(t)
        error = prior(alpha.reshape(-1, 1, 1, 1) * (truth + ratio * noise), t).mean - truth
        psnr = 10 * math.log10(4 / error.square().mean().item())
        if psnr < least:
            return [
                f"the prior knows tight crops of faces, and this picture little: it denoises it to "
                f"{psnr:.1f} dB at noise {ratio:g}, and 99 % of its held-out faces to {least} dB "
                "or better; expect details of faces where there are none"
            ]
    return []


def saturation(y: Tensor, task_name: str) -> list[str]:
    """Returns a note with the share of a measurement (B, C, H, W) that a PNG file clips."""
    share = (picture_of(y, task_name).abs() > 1).float().mean().item()
    if not share:
        return []
    return [
        f"measurement.png clips {100 * share:.1f} % of the values to black or white: start again "
        "from measurement.npz, which has them all"
    ]


def from_measurement(path: Path, shape: tuple[int, int, int], settings: Settings) -> Case:
    """Reads the measurement of an image (C, H, W).

    It is a measurement.npz that an earlier run wrote, whose task and seed must be those of the
    settings; or a picture, for the tasks of :data:`FROM_PICTURES`. Inpainting takes one whose
    dropped pixels are transparent.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    physics = task(settings.task, shape, generator)
    expected = physics.A(torch.zeros(1, *shape)).shape
    if path.suffix == ".npz":
        y = _read_measurement(path, expected, settings)
        return Case(physics, y, None, saturation(y, settings.task))
    if settings.task not in FROM_PICTURES:
        raise ValueError(
            f"measurement {path} is not an .npz file: with a picture the task must be one of "
            f"{', '.join(FROM_PICTURES)}"
        )
    size = picture_size(path)
    if size != expected[-2:]:
        raise ValueError(
            f"measurement {path} is {size[0]} x {size[1]} (height x width), expected "
            f"{expected[-2]} x {expected[-1]} for {settings.task} with images of {shape}"
        )
    y, notes = read_picture(path, expected[1:])
    if isinstance(physics, Inpainting):
        mask = read_transparency(path)
        physics = Inpainting(shape, mask=mask)
        y = y * mask
        notes = [note for note in notes if note != OVER_WHITE]  # what is transparent is dropped
    return Case(physics, y, None, notes)


def _read_measurement(path: Path, shape: torch.Size, settings: Settings) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a measurement there")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            y, name, seed = archive["y"], str(archive["task"]), int(archive["seed"])
            finite = np.isfinite(y).all()
    except Exception as error:  # a damaged file makes the reader fail anywhere
        raise ValueError(f"measurement {path} is damaged or another file: {error}") from error
    if (name, seed) != (settings.task, settings.seed):
        raise ValueError(
            f"measurement {path} is of the task {name!r} with seed {seed}, not "
            f"{settings.task!r} with seed {settings.seed}: name the same"
        )
    if y.shape != shape or not finite or not np.isrealobj(y):
        raise ValueError(f"measurement {path} has shape {y.shape}, expected finite {tuple(shape)}")
    return torch.from_numpy(y).float()


def run(case: Case, prior: Denoiser, settings: Settings, device: str) -> tuple[Result, dict]:
    """Returns a case's result, whose image is the cheapest of all starts, and a report for JSON."""
    problem = Problem(case.physics.to(device), case.y.to(device), settings.noise_std)
    began = time.perf_counter()
    result = reconstruct(
        problem,
        prior.to(device),
        settings.changed,
        generator=torch.Generator().manual_seed(settings.seed),
        starts=settings.starts,
        progress=True,
    )
    seconds = time.perf_counter() - began
    best = int(result.cost.argmin())
    x0 = result.x0[best : best + 1]
    assert result.residual_over_noise is not None
    costs = [round(cost, 4) for cost in result.cost.tolist()]
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "notes": case.notes,
        "metrics": None,
        "residual_over_noise": round(result.residual_over_noise[best].item(), 4),
        "cost": costs[best],
        "evaluations": int(result.evaluations.sum()),
        "vector_jacobian_products": int(result.products.sum()),
        "seconds": round(seconds, 2),
    }
    if settings.starts > 1:
        report["costs_of_starts"] = costs
    if case.truth is not None:
        values = image_metrics(x0.cpu(), case.truth)
        report["metrics"] = {name: round(v.item(), 4) for name, v in values.items()}
    return replace(result, states=result.states[:, best : best + 1]), report


def write(folder: Path, case: Case, image: Tensor, report: dict) -> list[Path]:
    """Writes measurement, reconstruction (1, C, H, W), comparison and report; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = report["settings"]
    with replacing(folder / "measurement.npz") as part:
        np.savez(part, y=case.y.numpy(), task=settings["task"], seed=settings["seed"])
    mask = measured(case.physics, case.y)[0, :1] if isinstance(case.physics, Inpainting) else None
    write_picture(picture_of(case.y, settings["task"])[0], folder / "measurement.png", mask)
    write_picture(image[0], folder / "reconstruction.png")
    with replacing(folder / "comparison.png") as part:
        _comparison(case, image, report).savefig(part, dpi=100)
    with replacing(folder / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    return [folder / name for name in ("measurement.npz", *WRITTEN)]


def picture_of(y: Tensor, task_name: str) -> Tensor:
    """Returns a measurement (B, C, H, W) as images; Fourier magnitudes on a logarithmic scale."""
    if task_name != "phase_retrieval":
        return y
    magnitudes = y.clamp(min=1e-3).log()
    low, high = magnitudes.min(), magnitudes.max()
    return 2 * (magnitudes - low) / (high - low) - 1


def _comparison(case: Case, image: Tensor, report: dict) -> Figure:
    settings, metrics = report["settings"], report["metrics"]
    title = settings["task"].replace("_", " ")
    shown = {} if case.truth is None else {"truth\n": case.truth[0]}
    shown[f"measurement\n{title}"] = picture_of(case.y, settings["task"])[0]
    score = f"\n{metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}" if metrics else ""
    shown[f"reconstruction{score}"] = image[0]
    figure = Figure(figsize=(2.6 * len(shown), 3), layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        show(axes, picture)
        axes.set_title(name, fontsize=10)
    return figure

"""Everything behind `python -m diffoc solve`: from a picture, or a measurement, to files."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser
from deepinv.physics import Inpainting, LinearPhysics, Physics
from matplotlib.figure import Figure
from torch import Tensor

from diffoc.data.files import replacing
from diffoc.data.pictures import picture_size, read_picture, read_transparency, write_picture
from diffoc.experiments.controllers import ITERATIONS, STEPS
from diffoc.greedy import greedy_controls
from diffoc.lowrank import MatrixFree
from diffoc.problems.metrics import image_metrics
from diffoc.problems.tasks import NOISE_STD, likelihood, measure, measured, noise_level, task
from diffoc.process import ReverseProcess
from diffoc.rules import LBFGS, Adam
from diffoc.solve import Result, image_units, solve

# Their measurement is a picture that says all that is needed to know A.
FROM_PICTURES = ("super_resolution", "gaussian_blur", "random_inpainting", "box_inpainting")


@dataclass(frozen=True)
class Settings:
    """What `solve` does: by default as in :mod:`diffoc.experiments.methods`.

    Attributes:
        task: a key of :data:`diffoc.problems.tasks.TASKS`.
        prior: a name or path for :func:`diffoc.load_prior`.
        noise_std: of the measurement.
        steps, iterations: of the controller; fewer of these if the residual is the noise's.
        update: "lbfgs", or the paper's "adam" with its rate, annealed, and the rank of its
            Gauss-Newton terminal Hessian.
        rate, rank: see there.
        control_cost: weight of half the squared norm of the controls.
        seed: of mask, kernel and noise.

    Raises:
        ValueError: for another update.
    """

    task: str
    prior: str
    noise_std: float = NOISE_STD
    steps: int = STEPS
    iterations: int = ITERATIONS
    update: str = "lbfgs"
    rate: float = 0.02
    rank: int = 0
    control_cost: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.update not in ("lbfgs", "adam"):
            raise ValueError(f"update is {self.update!r}, expected 'lbfgs' or 'adam'")


@dataclass(frozen=True)
class Case:
    """An inverse problem: operator, measurement (1, ...), and the truth (1, C, H, W) if known."""

    physics: Physics
    y: Tensor
    truth: Tensor | None
    notes: list[str]


def from_picture(path: Path, shape: tuple[int, int, int], settings: Settings) -> Case:
    """Simulates the measurement of a picture; arguments and errors as for `read_picture`."""
    truth, notes = read_picture(path, shape)
    generator = torch.Generator().manual_seed(settings.seed)
    physics = task(settings.task, shape, generator)
    y = measure(physics, truth, generator, settings.noise_std)
    return Case(physics, y, truth, notes)


def from_measurement(path: Path, shape: tuple[int, int, int], settings: Settings) -> Case:
    """Reads a measurement.

    Args:
        path: a measurement.npz that an earlier run wrote, whose task and seed must be those of
            `settings`; or a picture, for the tasks of :data:`FROM_PICTURES`. Inpainting takes one
            whose dropped pixels are transparent.
        shape: (C, H, W) of the image.
        settings: the task.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the measurement does not fit task and prior.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    physics = task(settings.task, shape, generator)
    expected = physics.A(torch.zeros(1, *shape)).shape
    if path.suffix == ".npz":
        return Case(physics, _read_measurement(path, expected, settings), None, [])
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


def reconstruct(
    case: Case, prior: Denoiser, settings: Settings, device: str = "cpu", progress: bool = True
) -> tuple[Result, dict]:
    """Runs the controller, of linear tasks from the greedy guess, and measures what came out.

    Args:
        case: the problem.
        prior: with images of its shape.
        settings: of the controller.
        device: where to compute.
        progress: whether to show a bar.

    Returns:
        The result, and a report that can be written as JSON.
    """
    prior, physics, y = prior.to(device), case.physics.to(device), case.y.to(device)
    process = ReverseProcess(prior, settings.steps)
    # The most probable noise: a random start would only add the texture of a sample.
    start = torch.zeros(1, *prior.image_shape, device=device)
    level = noise_level(physics, y, settings.noise_std)
    began = time.perf_counter()
    guess, evaluations = None, 0
    if isinstance(physics, LinearPhysics):
        guess = greedy_controls(process, physics, y, start, settings.noise_std)
        evaluations = settings.steps
    lbfgs = LBFGS(units=image_units(prior.schedule, process.times))
    result = solve(
        process,
        likelihood(physics, y, settings.noise_std),
        start,
        guess,
        control_cost=settings.control_cost,
        rank=settings.rank,
        derivatives=MatrixFree(hessian="gauss_newton"),
        iterations=settings.iterations,
        rule=lbfgs if settings.update == "lbfgs" else Adam(settings.rate, anneal=True),
        residual=lambda x0: physics.A(x0) - y,
        noise_level=level,
        progress=progress,
    )
    seconds = time.perf_counter() - began
    residual = (physics.A(result.x0) - y).square().mean().sqrt().item()
    report = {
        "settings": asdict(settings),
        "notes": case.notes,
        "metrics": None,
        "residual_over_noise": round(residual / level, 4),
        "cost": round(result.cost.item(), 4),
        "evaluations": evaluations + result.evaluations.item(),
        "vector_jacobian_products": result.products.item(),
        "seconds": round(seconds, 2),
    }
    if case.truth is not None:
        values = image_metrics(result.x0.cpu(), case.truth)
        report["metrics"] = {name: round(v.item(), 4) for name, v in values.items()}
    return result, report


def write(folder: Path, case: Case, image: Tensor, report: dict) -> list[Path]:
    """Writes measurement, reconstruction, comparison and report, and returns their paths.

    Args:
        folder: made if it does not exist.
        case: the problem.
        image: the reconstruction, (1, C, H, W).
        report: of :func:`reconstruct`.
    """
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
    names = ("measurement.npz", "measurement.png", "reconstruction.png", "comparison.png")
    return [folder / name for name in (*names, "report.json")]


def picture_of(y: Tensor, task_name: str) -> Tensor:
    """A measurement as images in [-1, 1]; Fourier magnitudes on a logarithmic scale.

    Args:
        y: (B, C, H, W).
        task_name: whose measurement it is.
    """
    if task_name != "phase_retrieval":
        return y
    magnitudes = y.clamp(min=1e-3).log()
    low, high = magnitudes.min(), magnitudes.max()
    return 2 * (magnitudes - low) / (high - low) - 1


def _comparison(case: Case, image: Tensor, report: dict) -> Figure:
    settings, metrics = report["settings"], report["metrics"]
    title = settings["task"].replace("_", " ")
    shown = {f"measurement\n{title}": picture_of(case.y, settings["task"])[0]}
    score = f"\n{metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}" if metrics else ""
    shown[f"reconstruction{score}"] = image[0]
    if case.truth is not None:
        shown = {"truth\n": case.truth[0], **shown}
    figure = Figure(figsize=(2.6 * len(shown), 3), layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        values = ((picture + 1) / 2).clamp(0, 1).movedim(0, -1).cpu()
        axes.imshow(values, vmin=0, vmax=1, cmap="gray", interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    return figure

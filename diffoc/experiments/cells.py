"""What the tables compare: images, tasks, methods and their budgets as cells, and how one is run.

Measurements depend on the seed and the image alone, so that all methods see the same, in whatever
batches: the task's mask or kernel is one for all images of a seed, noise and initial state are each
image's own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser
from deepinv.physics import Physics
from torch import Tensor

from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.data.downloads import cache_folder, sha256_of
from diffoc.data.pictures import read_picture, write_picture
from diffoc.data.provenance import digest, short
from diffoc.experiments.inaccurate import accurate_name, is_inaccurate, load_inaccurate
from diffoc.experiments.methods import EDGE_GAIN, METHODS, TRIALS, settings_of
from diffoc.experiments.records import METRICS, Cell, Row, as_json
from diffoc.experiments.runs import method_errors
from diffoc.priors.counting import CountedPrior
from diffoc.priors.pretrained import REMOTE, SHIPPED, load_prior
from diffoc.problems.metrics import image_metrics
from diffoc.problems.perceptual import LPIPS, SMALLEST, perceptual_metrics
from diffoc.problems.tasks import NOISE_STD, TASKS, measure, noise_level, task

TABLES = {"table1": tuple(TASKS)[:5]}
"""The tasks of the paper's tables; the records of Table 1 have the metrics of Table 3 too."""

LATENT = {"faces64": "faces64_latent"}
"""The priors that methods in a latent space use in place of others."""

PROTOCOL = (
    "images clipped to [-1, 1], not rounded; PSNR and MSE on [-1, 1]; SSIM on "
    "[0, 1], Gaussian 11x11 windows within the image; LPIPS 0.1 on [-1, 1], _01 on [0, 1]"
)


def held_out_faces() -> list[str]:
    """Names of the 32 faces of the tables: every 16th of the test set."""
    return [str(i) for i in range(0, 512, 16)]


def few_faces() -> list[str]:
    """Eight of :func:`held_out_faces`, every fourth, for what takes many runs."""
    return held_out_faces()[::4]


def tuning_faces() -> list[str]:
    """Eight others, from the test set too, for what has to be tuned; in no table."""
    return [str(i) for i in range(8, 512, 64)]


@dataclass(frozen=True)
class Computer:
    """Computes cells, in this process or in another; see :data:`diffoc.experiments.runs.Compute`.

    Attributes:
        folder: of pictures, or None for the test set of faces, whose names are numbers.
        device: "cpu", "cuda" or "cuda:i".
    """

    folder: Path | None = None
    device: str = "cpu"

    def __call__(self, cell: Cell) -> tuple[list[Row], Tensor]:
        """A row for every image, and the reconstructions on the CPU.

        Raises:
            diffoc.problems.tasks.UnsupportedTask: if the method cannot do the task.
            diffoc.experiments.runs.MethodError: if it fails.
        """
        prior, weights = load_once(cell.prior, self.device)
        shape = getattr(prior, "decoded_shape", prior.image_shape)
        truth = read_images(cell.images, shape, self.folder)
        physics = _task(cell.task, shape, cell.seed)
        operator = {"noise_std": NOISE_STD, "sha256": digest(dict(physics.named_buffers()))}
        hashes = [digest(image) for image in truth]
        noise = [_generator(cell.seed, cell.task, name, "noise") for name in hashes]
        y = torch.cat([measure(physics, x[None], g) for x, g in zip(truth, noise, strict=True)])
        starts = [_generator(cell.seed, name, "start") for name in hashes]
        start = torch.stack([torch.randn(prior.image_shape, generator=g) for g in starts])
        _, sigma = prior.schedule(torch.ones(()))
        counted = CountedPrior(prior, None if cell.precision == "float32" else cell.precision)
        counted.image_shape = prior.image_shape
        generator = _generator(cell.seed, cell.task, *hashes, device=self.device)
        physics, y = physics.to(self.device), y.to(self.device)
        x = (sigma.cpu() * start).to(self.device)

        began = _clock(self.device)
        run = METHODS[cell.method].run
        with method_errors():
            x0 = run(counted, physics, y, x, generator, noise_std=NOISE_STD, **cell.keywords)
            x0, seconds = x0.detach(), (_clock(self.device) - began) / len(truth)
            metrics = metrics_of(x0.float().cpu(), truth)
        residual = (physics.A(x0) - y).square().flatten(1).mean(dim=1).sqrt()
        metrics["residual_over_noise"] = residual / noise_level(physics, y)
        common = {
            "evaluations": f"{counted.evaluations / len(truth):g}",
            "products": f"{counted.products / len(truth):g}",
            "seconds": f"{seconds:.3f}",
            "weights_sha256": weights,
            "operator": as_json(operator),
            "protocol": PROTOCOL,
        }
        rows = [
            # Nine digits tell all numbers of float32 apart.
            common | {"image_sha256": h} | {k: f"{metrics[k][i].item():.9g}" for k in metrics}
            for i, h in enumerate(hashes)
        ]
        return rows, x0.float().cpu()


def check_inputs(cells: Sequence[Cell], computer: Computer, keep: Path | None = None) -> None:
    """Loads what cells need, each prior and picture once, before the first of them is computed.

    Args:
        cells: that are to be computed.
        computer: that will do it.
        keep: the folder for the reconstructions, which is made; None if they are not kept.

    Raises:
        ValueError: if a method does not have a setting, or a picture does not fit the prior.
        OSError: if weights or pictures are missing, or the folder cannot be written.
    """
    for prior in dict.fromkeys(cell.prior for cell in cells):
        network, _ = load_once(prior, computer.device)
        shape = getattr(network, "decoded_shape", network.image_shape)
        for name in dict.fromkeys(x for cell in cells if cell.prior == prior for x in cell.images):
            read_images([name], shape, computer.folder)
    for method, settings in dict.fromkeys((cell.method, cell.settings) for cell in cells):
        known = inspect.signature(METHODS[method].run).parameters
        if unknown := [key for key in json.loads(settings) if key not in known]:
            raise ValueError(f"settings has {unknown[0]!r}, which {method} does not have")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=keep):
            pass


def metrics_of(x0: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The metrics of the tables, (B,) each, of names in :data:`diffoc.experiments.records.METRICS`.

    Those of LPIPS are there where its weights are, for images that its networks can take.
    """
    metrics = image_metrics(x0, truth)
    if min(truth.shape[-2:]) >= SMALLEST:
        metrics |= perceptual_metrics(x0, truth, [name for name in METRICS if name in LPIPS])[0]
    return metrics


def read_images(names: Sequence[str], shape: Sequence[int], folder: Path | None) -> Tensor:
    """Images by name, (B, C, H, W) in [-1, 1]: of a folder, or of the test set of faces.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if pictures have another size than `shape`, or faces are not what is asked for.
    """
    if folder is None:
        if tuple(shape) != SHIPPED["faces64"]:
            raise ValueError(f"images is missing: the prior's images are {tuple(shape)}, no faces")
        faces = torch.from_numpy(_faces()[[int(name) for name in names]])
        return faces.float().unsqueeze(1) / 127.5 - 1
    pictures = []
    for name in names:
        picture, notes = read_picture(folder / name, shape)
        if notes:
            raise ValueError(f"{folder / name} does not fit the prior: {', '.join(notes)}")
        pictures.append(picture)
    return torch.cat(pictures)


@cache
def _task(name: str, shape: tuple[int, ...], seed: int) -> Physics:
    """The same object for all cells, because some methods decompose it, once, which takes long."""
    return task(name, shape, _generator(seed, name))


@cache
def _faces() -> np.ndarray:
    return data.faces("test")


@cache
def load_once(name: str, device: str) -> tuple[Denoiser, str]:
    """A prior on a device, and the first digits of the SHA-256 of its weights.

    Args:
        name: as for :func:`diffoc.load_prior`, or a name of :mod:`diffoc.experiments.inaccurate`.
        device: where to put it.
    """
    prior = load_inaccurate(name) if is_inaccurate(name) else load_prior(name)
    if name in SHIPPED:
        found = short(manifest.manifest_entry(f"{name}.safetensors")["sha256"])
    elif name in REMOTE:
        found = short(sha256_of(cache_folder() / REMOTE[name].name))
    else:
        found = digest(prior.state_dict())
    return prior.to(device), found


def cells_of(
    prior: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    images: Sequence[str],
    batch: int,
    precision: str,
    overrides: dict | None = None,
) -> list[Cell]:
    """The grid, task by task.

    Args:
        prior: a name for :func:`load_once`; methods in a latent space use that of :data:`LATENT`.
        tasks, methods, seeds, images: of the grid.
        budgets: of it, in evaluations, at least 1 each.
        batch: images of a cell, at least 1.
        precision: "bfloat16" or "float32".
        overrides: keyword arguments for the methods in place of their own.

    Raises:
        ValueError: if there is no such task or method, the method was not tuned, or a number is out
            of its range.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    if min(budgets, default=1) < 1:
        raise ValueError(f"budgets has {min(budgets)}, expected at least 1")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"tasks has {unknown[0]!r}, expected some of {', '.join(TASKS)}")
    cells = []
    for name, method, nfe in product(tasks, methods, budgets):
        # A trial with random weights has nothing that could be tuned for it.
        known = accurate_name(prior)
        settings = as_json(settings_of(known, method, name, nfe, overrides or {}))
        used = LATENT.get(prior, prior) if METHODS[method].latent else prior
        for seed, start in product(seeds, range(0, len(images), batch)):
            some = tuple(images[start : start + batch])
            cells.append(Cell(used, precision, name, method, nfe, settings, seed, some))
    return cells


def tuning_cells(cell: Cell, values: Iterable[float]) -> dict[float, Cell]:
    """A cell with each of some values of its method's tuned keyword."""
    keyword, _ = METHODS[cell.method].tuned or ("", ())
    return {
        value: replace(cell, settings=as_json(cell.keywords | {keyword: value})) for value in values
    }


def best_value(trials: Mapping[float, list[Row]]) -> float | None:
    """The value with the highest mean PSNR, or None if none has one.

    Args:
        trials: rows of every value.
    """
    scores = _scores(trials)
    # What is not finite is refused by the metrics, so the largest is one.
    return max(scores, key=scores.__getitem__, default=None)


def next_value(trials: Mapping[float, list[Row]], largest: float = math.inf) -> float | None:
    """The value beyond the grid's edge that is worth a trial, or None.

    The grid goes on by the factor of its last two values while the best is at its edge and ahead of
    its neighbour by more than `EDGE_GAIN`, to twice as many values as it may have at first.

    Args:
        trials: rows of every value so far.
        largest: that the keyword may be.
    """
    scores, tried = _scores(trials), sorted(trials)
    best = best_value(trials)
    if best not in (tried[0], tried[-1]) or not 2 <= len(tried) < 2 * TRIALS:
        return None
    neighbour = tried[1] if best == tried[0] else tried[-2]
    if 0 in (best, neighbour) or scores[best] - scores.get(neighbour, -math.inf) <= EDGE_GAIN:
        return None
    value = best * best / neighbour
    value = round(value) if isinstance(best, int) else float(f"{value:.2g}")
    return None if value > largest or value in tried else value


def _scores(trials: Mapping[float, list[Row]]) -> dict[float, float]:
    return {
        value: sum(float(row["psnr"]) for row in rows) / len(rows)
        for value, rows in trials.items()
        if rows[0]["status"] == "ok"
    }


def keep_in(folder: Path) -> Callable[[Cell, Tensor], None]:
    """A function that writes a cell's images as PNG: FOLDER/task/method-nfe-seed/name.png."""

    def keep(cell: Cell, images: Tensor) -> None:
        place = folder / cell.task / f"{cell.method}-{cell.nfe}-{cell.seed}"
        place.mkdir(parents=True, exist_ok=True)
        for name, image in zip(cell.images, images, strict=True):
            write_picture(image, place / f"{Path(name).stem}.png")

    return keep


def work_of(cell: Cell) -> tuple[int, int]:
    """Evaluations and products of a cell, of all its images, as planned."""
    work = METHODS[cell.method].work
    evaluations, products = work(cell.keywords) if work else (cell.nfe, cell.nfe)
    return evaluations * len(cell.images), products * len(cell.images)


def time_prior(prior: str, batch: int, precision: str, device: str) -> tuple[float, float]:
    """Seconds of an evaluation and of a product of a prior, for each image of a batch."""
    network, _ = load_once(prior, device)
    counted = CountedPrior(network, None if precision == "float32" else precision)
    x = torch.zeros(batch, *network.image_shape, device=device, requires_grad=True)
    times = []
    for _ in range(2):  # the first warms up
        began = _clock(device)
        mean = counted(x, torch.tensor(0.5, device=device)).mean
        between = _clock(device)
        torch.autograd.grad(mean.sum(), x)
        times = [(between - began) / batch, (_clock(device) - between) / batch]
        del mean
    return times[0], times[1]


def _clock(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _generator(*what: object, device: str = "cpu") -> torch.Generator:
    """A source of randomness for what is named, independent of those for other things."""
    hashed = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(hashed[:8], "big") >> 1)

"""What the tables compare: images, tasks, methods and their budgets as cells, and how one is run.

Measurements depend only on the seed and the image, so that all methods see the same, whatever the
batches: noise and initial state are each image's own, and so is the task's mask or kernel where the
:mod:`protocol <diffoc.experiments.protocol>` says so.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import NoReturn

import numpy as np
import torch
from azula.denoise import Denoiser
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor

from diffoc.baselines import Given
from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.data.downloads import cache_folder, sha256_of
from diffoc.data.pictures import read_picture, write_picture
from diffoc.data.provenance import digest, short
from diffoc.experiments import records
from diffoc.experiments.benchmark import clock
from diffoc.experiments.inaccurate import accurate_name, is_inaccurate, load_inaccurate
from diffoc.experiments.methods import METHODS, equal_work, prior_of, settings_of
from diffoc.experiments.protocol import COLOUR_FACES, Protocol, protocol_of
from diffoc.experiments.records import COUNTS, METRICS, Cell, Row, as_json, in_batches
from diffoc.experiments.runs import method_errors, recorded, whole_products
from diffoc.priors.counting import CountedPrior
from diffoc.priors.latent import LatentPrior
from diffoc.priors.pretrained import REMOTE, SHIPPED, load_prior
from diffoc.problem import Problem
from diffoc.problems.metrics import image_metrics
from diffoc.problems.perceptual import LPIPS, SMALLEST, perceptual_metrics
from diffoc.problems.tasks import TASKS, UnsupportedTask, for_each, measure


def few_faces() -> list[str]:
    """Returns eight of the held-out faces, every fourth, for what takes many runs."""
    return list(COLOUR_FACES.held_out[::4])


@dataclass(frozen=True)
class Computer:
    """Computes cells, in this process or in another; see :data:`diffoc.experiments.runs.Compute`.

    Attributes:
        folder: the pictures' folder; None for the test set of faces, whose names are numbers.
        device: "cpu", "cuda" or "cuda:i".
        protocol: how images are measured; None for the protocol of the prior's tables.
    """

    folder: Path | None = None
    device: str = "cpu"
    protocol: Protocol | None = None

    def __call__(self, cell: Cell) -> tuple[list[Row], Tensor]:
        """Returns a row for every image, and the reconstructions on the CPU."""
        method, protocol = METHODS[cell.method], self.protocol or protocol_of(cell.prior)
        # Without one it is the prior that has been loaded for all others.
        head = (True,) if cell.keywords.get("learned_variance") else ()
        prior, weights = load_once(cell.prior, self.device, *head)
        if method.latent and not isinstance(prior, LatentPrior):
            raise UnsupportedTask(f"{cell.method} needs a prior in a latent space: {cell.prior}")
        shape = getattr(prior, "decoded_shape", prior.image_shape)
        truth = read_images(cell.images, shape, self.folder)
        hashes = [digest(image) for image in truth]
        each = cell.task in protocol.operator_per_image
        drawn = [(protocol, cell.task, shape, cell.seed, h if each else None) for h in hashes]
        parts = [_operator(*which, "cpu") for which in drawn]
        noise = [_generator(cell.seed, cell.task, name, "noise") for name in hashes]
        pairs = zip(parts, truth, noise, strict=True)
        noise_std, on_dropped = protocol.noise_std, protocol.noise_on_dropped
        y = torch.cat([measure(A, x[None], g, noise_std, on_dropped) for A, x, g in pairs])
        starts = [_generator(cell.seed, name, "start") for name in hashes]
        start = torch.stack([torch.randn(prior.image_shape, generator=g) for g in starts])
        _, sigma = prior.schedule(torch.ones(()))
        counted = CountedPrior(prior, None if cell.precision == "float32" else cell.precision)
        counted.image_shape = prior.image_shape
        generator = _generator(cell.seed, cell.task, *hashes, device=self.device)
        physics = for_each([_operator(*which, self.device) for which in drawn])
        y, x = y.to(self.device), (sigma.cpu() * start).to(self.device)

        began = clock(self.device)
        with method_errors(cell.keywords):
            x0 = method.run(counted, physics, y, x, generator, noise_std=noise_std, **cell.keywords)
            x0, seconds = x0.detach(), (clock(self.device) - began) / len(truth)
            metrics = metrics_of(x0.float(), truth.to(self.device))
        problem = Problem(physics, y, noise_std)
        metrics["residual_over_noise"] = problem.residual_over_noise(x0)
        rows, common = [], {"weights_sha256": weights, "protocol": protocol.name}
        common["seconds"] = f"{seconds:.3f}"
        work = counted.work(len(truth))
        for i, (h, A, spent) in enumerate(zip(hashes, parts, work, strict=True)):
            operator = {"noise_std": noise_std, "sha256": digest(dict(A.named_buffers()))}
            row = {"image_sha256": h, "operator": as_json(operator)}
            # Nine digits tell all numbers of float32 apart.
            row |= {key: f"{values[i].item():.9g}" for key, values in metrics.items()}
            row |= {key: f"{count:g}" for key, count in zip(COUNTS, spent, strict=True)}
            rows.append(common | row)
        return rows, x0.float().cpu()


def check_inputs(cells: Sequence[Cell], computer: Computer) -> None:
    """Loads what cells need, each prior and picture once, before the first of them is computed."""
    for method, settings in dict.fromkeys((cell.method, cell.settings) for cell in cells):
        check_settings(method, json.loads(settings))
    for prior in dict.fromkeys(cell.prior for cell in cells):
        network, _ = load_once(prior, computer.device)
        of_images = {cell.method for cell in cells if not METHODS[cell.method].latent}
        if isinstance(network, LatentPrior) and of_images:
            raise ValueError(
                f"prior is {prior!r}, one of latents, which {min(of_images)} does not take: name "
                "one of images"
            )
        shape = getattr(network, "decoded_shape", network.image_shape)
        for name in dict.fromkeys(x for cell in cells if cell.prior == prior for x in cell.images):
            read_images([name], shape, computer.folder)


def check_recorded(
    cells: Sequence[Cell], computer: Computer, path: Path, pictures: bool = True
) -> None:
    """Raises a ValueError if a table has results of cells from other inputs than they have now.

    Inputs are weights, precision, protocol and, where `pictures` is set, the pictures: a name or a
    path may have another content than when the table was begun.
    """
    known, digests = recorded(path), {}
    for one in (one for cell in cells for one in records.alone(cell)):
        row = known.get(one)
        if row is None or row["status"] != "ok":
            continue
        network, weights = load_once(one.prior, computer.device)
        protocol = computer.protocol or protocol_of(one.prior)
        now = {"precision": one.precision, "protocol": protocol.name}
        if not is_inaccurate(one.prior):  # else they are made here, up to this machine's rounding
            now["weights_sha256"] = weights
        if pictures:
            shape = getattr(network, "decoded_shape", network.image_shape)
            if (shape, one.images) not in digests:
                truth = read_images(one.images, shape, computer.folder)
                digests[shape, one.images] = digest(truth[0])
            now["image_sha256"] = digests[shape, one.images]
        for key, value in now.items():
            if row[key] not in ("", value):
                raise ValueError(
                    f"out is {path}, which has {records.describe(one)} with {key} {row[key]!r}, "
                    f"but it is {value!r} now: name another with --out"
                )


def check_settings(method: str, settings: dict) -> None:
    """Raises a ValueError if a method does not have a setting, or refuses it before it begins."""
    run = inspect.unwrap(METHODS[method].run)
    known = inspect.signature(run).parameters
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"settings has {key!r}, which {method} does not have")
        if isinstance(value, bool) != (known[key].annotation in (bool, "bool")):
            kind = "a number or a word" if isinstance(value, bool) else "true or false"
            raise ValueError(f"settings of {method}: {key} is {value!r}, expected {kind}")
    if run is METHODS[method].run:  # one that checks nothing before it begins
        return
    nothing = torch.zeros(1, 1, 8, 8)
    given = Given(_NoPrior(), _NoOperator(), nothing, nothing, torch.Generator(), 1.0)
    try:
        run(given, **settings)
    except (_Begun, UnsupportedTask):
        pass
    except (ValueError, TypeError) as error:
        raise ValueError(f"settings of {method}: {error}") from error


class _Begun(BaseException):
    """A method has found nothing wrong with its settings; no check of an operator catches it."""


class _NoPrior(LatentPrior):
    """What a method gets in place of a prior, to tell when it begins."""

    def __init__(self) -> None:
        Denoiser.__init__(self)

    def __getattr__(self, name: str) -> NoReturn:
        raise _Begun


class _NoOperator(LinearPhysics):
    """What a method gets in place of an operator, to tell when it begins."""

    def A(self, *args: object, **options: object) -> NoReturn:
        raise _Begun

    A_adjoint = A


def metrics_of(x0: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Returns the metrics of the tables, (B,) each, by names of the records' `METRICS`.

    LPIPS is among them where its weights are, for images that its networks can take.
    """
    metrics = image_metrics(x0, truth)
    if min(truth.shape[-2:]) >= SMALLEST:
        metrics |= perceptual_metrics(x0, truth, [name for name in METRICS if name in LPIPS])[0]
    return metrics


def read_images(names: Sequence[str], shape: Sequence[int], folder: Path | None) -> Tensor:
    """Returns images by name, (B, C, H, W) in [-1, 1]: of a folder, or of the test set of faces."""
    if folder is None:
        if tuple(shape) != (3, 64, 64):
            raise ValueError(f"images is missing: the prior's images are {tuple(shape)}, no faces")
        return data.as_states(_faces()[[int(name) for name in names]])
    pictures = []
    for name in names:
        picture, notes = read_picture(folder / name, shape)
        if notes:
            raise ValueError(f"{folder / name} does not fit the prior: {', '.join(notes)}")
        pictures.append(picture)
    return torch.cat(pictures)


@lru_cache(maxsize=16)
def _operator(
    protocol: Protocol, name: str, shape: tuple[int, ...], seed: int, image: str | None, device: str
) -> Physics:
    # Some methods decompose an operator, which takes long: cells in a row share it, and nothing
    # changes it. One for all images has the image None.
    drawn = (seed, name) if image is None else (seed, name, image, "operator")
    return protocol.operator(name, shape, _generator(*drawn)).to(device)


@cache
def _faces() -> np.ndarray:
    return data.colour_faces("test")


@cache
def load_once(name: str, device: str, learned_variance: bool = False) -> tuple[Denoiser, str]:
    """Returns a prior on a device, and the first digits of the SHA-256 of its weights.

    The name is one for :func:`diffoc.load_prior`, or of :mod:`diffoc.experiments.inaccurate`. With
    a `learned_variance` it has the head that a setting of that name asks for.
    """
    if is_inaccurate(name):
        prior = load_inaccurate(name, learned_variance)
    else:
        prior = load_prior(name, learned_variance=learned_variance)
    if name in SHIPPED:
        weights = short(manifest.manifest_entry(f"{name}.safetensors")["sha256"])
    elif name in REMOTE:
        weights = short(sha256_of(cache_folder() / REMOTE[name].name))
    else:
        weights = digest(prior.state_dict())
    return prior.to(device), weights


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
    product_cost: float | None = None,
) -> list[Cell]:
    """Returns a grid by task and batch: methods that decompose an operator then share it.

    The prior is a name for :func:`load_once`; methods in a latent space use another. Budgets are of
    evaluations; a cell has `batch` images. The precision is "bfloat16" or "float32". The overrides
    replace keyword arguments of all methods, or as METHOD.KEY of one. With a
    `product_cost` each method has the evaluations that make its work equal, see
    :func:`diffoc.experiments.methods.equal_work`.
    """
    _check_grid(tasks, budgets)
    cells = []
    for name, seed, some in product(tasks, seeds, in_batches(images, batch)):
        for method, nfe in product(methods, budgets):
            n = nfe if product_cost is None else equal_work(method, name, nfe, product_cost)
            # A trial with random weights has nothing that could be tuned for it.
            settings = as_json(settings_of(accurate_name(prior), method, name, n, overrides or {}))
            used = prior_of(method, prior)
            cells.append(Cell(used, precision, name, method, n, settings, seed, some))
    return cells


def tuning_cells(
    prior: str,
    task: str,
    method: str,
    nfe: int,
    trials: Iterable[dict],
    precision: str,
    images: Sequence[str] | None = None,
) -> list[Cell]:
    """Returns a cell of the tuning images, or of others, for each of the settings to try."""
    _check_grid([task], [nfe])
    usual, images = METHODS[method].settings(task, nfe), images or protocol_of(prior).tuning
    if not images:
        raise ValueError(f"images is missing: name a folder of pictures to tune {prior} on")
    settings, used = [as_json(usual | trial) for trial in trials], prior_of(method, prior)
    return [Cell(used, precision, task, method, nfe, some, 0, tuple(images)) for some in settings]


def best_trial(trials: Sequence[Sequence[Row]]) -> int | None:
    """Returns the place of the trial whose rows have the highest mean PSNR, or None if none has."""
    scores = {
        i: sum(float(row["psnr"]) for row in rows) / len(rows)
        for i, rows in enumerate(trials)
        if all(row["status"] == "ok" for row in rows)
    }
    # What is not finite is refused by the metrics, so the largest is one.
    return max(scores, key=scores.__getitem__, default=None)


def _check_grid(tasks: Sequence[str], budgets: Sequence[int]) -> None:
    if min(budgets, default=1) < 1:
        raise ValueError(f"budgets has {min(budgets)}, expected at least 1")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"tasks has {unknown[0]!r}, expected some of {', '.join(TASKS)}")


def folder_of(cell: Cell) -> str:
    """Returns where a cell's images are kept; the digest in the name is of prior and settings."""
    other = hashlib.sha256(f"{cell.prior} {cell.settings}".encode()).hexdigest()[:8]
    return f"{cell.task}/{cell.method}-{cell.nfe}-{cell.seed}-{other}"


def keep_in(folder: Path) -> Callable[[Cell, Tensor], None]:
    """Returns what writes a cell's images as PNG in its own folder, see :func:`folder_of`."""

    def keep(cell: Cell, images: Tensor) -> None:
        place = folder / folder_of(cell)
        place.mkdir(parents=True, exist_ok=True)
        for name, image in zip(cell.images, images, strict=True):
            write_picture(image, place / f"{Path(name).stem}.png")

    return keep


def work_of(cell: Cell) -> tuple[int, int]:
    """Returns evaluations and products of a cell, of all its images, as planned."""
    evaluations, products = METHODS[cell.method].work(cell.keywords)
    return evaluations * len(cell.images), products * len(cell.images)


def time_prior(
    prior: str, batch: int, precision: str, device: str, repeats: int = 3
) -> tuple[float, float]:
    """Returns median seconds of an evaluation and of a product of a prior, by image of a batch."""
    whole_products()
    network, _ = load_once(prior, device)
    counted = CountedPrior(network, None if precision == "float32" else precision)
    x = torch.zeros(batch, *network.image_shape, device=device, requires_grad=True)
    times = []
    for _ in range(1 + repeats):  # the first warms up
        began = clock(device)
        mean = counted(x, torch.tensor(0.5, device=device)).mean
        between = clock(device)
        torch.autograd.grad(mean.sum(), x)
        times.append((between - began, clock(device) - between))
        del mean
    evaluation, product = (median(some) / batch for some in zip(*times[1:], strict=True))
    return evaluation, product


def _generator(*what: object, device: str = "cpu") -> torch.Generator:
    """Returns a source of randomness for what is named, independent of those for other things."""
    hashed = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(hashed[:8], "big") >> 1)

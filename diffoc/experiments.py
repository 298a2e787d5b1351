"""Reconstructions of held-out faces, ours beside DPS, as rows of a table with their provenance."""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from azula.denoise import Denoiser
from azula.guidance import DPSSampler
from deepinv.physics import Physics
from torch import Tensor

from diffoc import data
from diffoc.metrics import image_metrics
from diffoc.pretrained import load_prior
from diffoc.process import ReverseProcess
from diffoc.rules import LBFGS
from diffoc.solver import solve
from diffoc.tasks import NOISE_STD, likelihood, measure, noise_level, task

# Tuned by PSNR on the first two of `tuning_faces`, which no table has: the best of 0.1, 0.3, 1 and,
# but for super-resolution, 3.
DPS_GUIDANCE = {
    "super_resolution": 0.3,
    "random_inpainting": 0.3,
    "box_inpainting": 0.1,
    "gaussian_blur": 0.3,
    "motion_blur": 1.0,
}
"""Azula's zeta for the tasks of Table 1, for 1000 steps."""

DPS_STEPS = 1000
STEPS, ITERATIONS = 10, 80
"""Of DPS, and of the controller, whose line search may try nineteen times more: 1000 evaluations.

On the tuning faces ten steps and twice the iterations blur less than twenty steps."""

COLUMNS = (
    *("task", "method", "image", "psnr", "ssim", "mse", "residual_over_noise"),
    *("evaluations", "products", "seconds", "settings", "precision"),
    *("prior", "versions", "machine"),
)


def held_out_faces() -> Tensor:
    """The sixteen faces of the table, (16, 1, 64, 64) in [-1, 1]: every 32nd of the test set."""
    return _signed(data.faces("test")[::32])


def tuning_faces() -> Tensor:
    """Eight others, from the test set too, for what has to be tuned."""
    return _signed(data.faces("test")[16::64])


def control(prior: Denoiser, name: str, physics: Physics, y: Tensor) -> tuple[Tensor, dict]:
    """Reconstructions by the controller, and what they took.

    Args:
        prior: of images (1, 64, 64).
        name: of the task; not used, nothing here is tuned to it.
        physics, y: of the task, y (B, ...).
    """
    result = solve(
        ReverseProcess(prior, STEPS),
        likelihood(physics, y),
        y.new_zeros(len(y), *prior.image_shape),
        rank=0,
        iterations=ITERATIONS,
        update=LBFGS(),
        residual=lambda x0: physics.A(x0) - y,
        noise_level=noise_level(physics, y),
        precision="bfloat16",
    )
    settings = f"T {STEPS}, {ITERATIONS} iterations or discrepancy, L-BFGS, control cost 1"
    counts = {"evaluations": result.evaluations, "products": result.products}
    return result.x0, counts | {"settings": settings}


def dps(prior: Denoiser, name: str, physics: Physics, y: Tensor) -> tuple[Tensor, dict]:
    """Reconstructions by azula's DPS with 1000 steps; arguments as for :func:`control`."""

    def distances(x0: Tensor) -> Tensor:
        # azula takes one norm of everything: as it is of one number here, the images' norms add up
        # and do not influence each other.
        return (physics.A(x0.float()) - y).flatten(1).norm(dim=1).sum().reshape(1)

    guidance, steps = DPS_GUIDANCE[name], DPS_STEPS
    sampler = DPSSampler(prior, y.new_zeros(1), distances, zeta=guidance, steps=steps, silent=True)
    with torch.random.fork_rng(devices=[]), torch.autocast(y.device.type, torch.bfloat16):
        torch.manual_seed(4)
        x0 = sampler(torch.randn(len(y), *prior.image_shape)).float()
    counts = {"evaluations": steps, "products": steps}
    return x0, counts | {"settings": f"{steps} steps, guidance {guidance:g}"}


METHODS: dict[str, Callable[[Denoiser, str, Physics, Tensor], tuple[Tensor, dict]]] = {
    "control": control,
    "dps": dps,
}


def compare(path: Path, progress: Callable[[str], None] = print) -> None:
    """Fills the table of all tasks and methods; what it has already is kept.

    Args:
        path: of the table, CSV; rows are added task by task, so that it can be stopped.
        progress: called with a line for every task and method.

    Raises:
        FileNotFoundError: if the faces are missing.
    """
    rows = read(path) if path.exists() else []
    prior, truth = load_prior("faces64"), held_out_faces()
    done = {(row["task"], row["method"]) for row in rows}
    for name in DPS_GUIDANCE:
        generator = torch.Generator().manual_seed(0)
        physics = task(name, prior.image_shape, generator)
        y = measure(physics, truth, generator)
        for method in METHODS:
            if (name, method) in done:
                continue
            began = time.perf_counter()
            x0, counts = METHODS[method](prior, name, physics, y)
            seconds = (time.perf_counter() - began) / len(y)
            new = _rows(name, method, physics, y, x0, truth, counts, seconds)
            rows += new
            _write(path, rows)
            mean = sum(float(row["psnr"]) for row in new) / len(new)
            progress(f"{name:18s} {method:8s} {mean:6.2f} dB  {seconds:5.1f} s an image")


def _rows(
    name: str,
    method: str,
    physics: Physics,
    y: Tensor,
    x0: Tensor,
    truth: Tensor,
    counts: dict,
    seconds: float,
) -> list[dict[str, str]]:
    metrics = image_metrics(x0, truth)
    residual = (physics.A(x0) - y).square().flatten(1).mean(dim=1).sqrt()
    metrics["residual_over_noise"] = residual / noise_level(physics, y, NOISE_STD)
    packages = ("torch", "azula", "deepinv", "diffoc")
    common = {
        **{key: str(value) for key, value in counts.items()},
        "task": name,
        "method": method,
        "seconds": f"{seconds:.2f}",
        "precision": "bfloat16",
        "prior": "faces64 " + data.manifest_entry("faces64.safetensors")["sha256"][:12],
        "versions": " ".join(f"{package} {version(package)}" for package in packages),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    return [
        {**common, "image": str(i), **{key: f"{v[i].item():.4f}" for key, v in metrics.items()}}
        for i in range(len(y))
    ]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table that :func:`compare` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"path {path} is no table of this version: remove it and run again")
        return list(reader)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def _signed(faces: object) -> Tensor:
    return torch.from_numpy(faces).float().unsqueeze(1) / 127.5 - 1

"""The mixture priors that ship with the repository: their data, sizes and fits."""

import math
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffoc.data import faces, mnist
from diffoc.data.manifest import LICENSES, register_file
from diffoc.training.fitting import fit_mixture, log_likelihood


class _Recipe(NamedTuple):
    shape: tuple[int, int, int]
    components: int
    rank: int
    held_out: int  # the last so many training images choose K and r
    license: str
    source: str


MIXTURES = {
    "mnist": _Recipe(
        shape=(1, 28, 28),
        components=20,
        rank=60,
        held_out=10_000,
        license=LICENSES["mnist"],
        source="python -m diffoc fit mnist",
    ),
    "faces32": _Recipe(
        shape=(1, 32, 32),
        components=10,
        rank=97,
        held_out=1_000,
        license=LICENSES["faces"],
        source="python -m diffoc fit faces32",
    ),
}


def fit_mixture_prior(
    name: str, out_dir: Path | str, seed: int = 0, progress: bool = True
) -> dict[str, float]:
    """Fit one of the shipped mixtures on its whole training split, write and register the weights.

    Images are dequantised, v -> (v + u) / 127.5 - 1 with u uniform in [-1/2, 1/2), so that the
    density of 8-bit data is bounded and bits per dimension bound the code length of the bytes.

    Arguments:
        name: "mnist" or "faces32".
        out_dir: an existing folder; mixture_<name>.safetensors and its entry in manifest.json are
            written there.
        seed: of the start and the dequantisation.
        progress: print the likelihood at every step.

    Returns the numbers of the fit: sizes, steps, seconds, and the test split's log-likelihood in
    nats and bits per pixel. Raises ValueError for another name, FileNotFoundError if the folder or
    the data set is missing.
    """
    recipe = _recipe(name)
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise FileNotFoundError(f"out_dir {out_dir} is not a folder: create it first")
    generator = torch.Generator().manual_seed(seed)
    train = dequantise(training_images(name, "train"), generator)
    test = dequantise(training_images(name, "test"), generator)
    start = perf_counter()
    mixture = fit_mixture(
        train,
        recipe.components,
        recipe.rank,
        generator=generator,
        progress=_print_step if progress else None,
    )
    seconds = perf_counter() - start
    file = f"mixture_{name}.safetensors"
    tensors = {
        "log_weights": mixture.log_weights,
        "means": mixture.means.half(),  # costs 2e-6 nats a pixel, and is half as large
        "loadings": mixture.loadings.half(),
        "noise_variance": mixture.noise_variance,
    }
    shape = ",".join(map(str, recipe.shape))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out_dir / file, {"shape": shape})
    register_file(file, recipe.license, recipe.source, out_dir)
    nats = log_likelihood(mixture, test).double().mean().item() / test.shape[1]
    return {
        "components": recipe.components,
        "rank": recipe.rank,
        "images": len(train),
        "steps": len(mixture.history) - 1,
        "seconds": seconds,
        "train_nats_per_pixel": mixture.history[-1] / test.shape[1],
        "test_nats_per_pixel": nats,
        "test_bits_per_pixel": bits_per_pixel(nats),
    }


def compare_sizes(
    name: str, sizes: Iterable[tuple[int, int]], seed: int = 0, iterations: int = 100
) -> list[dict[str, float]]:
    """Held-out log-likelihood of mixtures of several sizes, the table that chose K and r.

    The last part of the training split (10,000 digits; 1,000 faces) is held out; the test split is
    not touched.

    Arguments:
        name: "mnist" or "faces32".
        sizes: pairs (K, r). (1, n - 1) is the maximum-likelihood Gaussian with a full covariance.
        seed: of start and dequantisation, the same for all sizes.
        iterations: most EM steps.

    Returns one row a size: components, rank, megabytes of the weights, seconds, and training and
    held-out log-likelihood in nats per pixel. Raises ValueError for another name.
    """
    held_out = _recipe(name).held_out
    generator = torch.Generator().manual_seed(seed)
    fitted = dequantise(training_images(name, "train", stop=-held_out), generator)
    rest = dequantise(training_images(name, "train", start=-held_out), generator)
    rows = []
    for components, rank in sizes:
        start = perf_counter()
        # One component is solved by its start; a full covariance needs float64.
        dtype, steps = (torch.float64, 0) if components == 1 else (torch.float32, iterations)
        mixture = fit_mixture(
            fitted.to(dtype),
            components,
            rank,
            iterations=steps,
            generator=torch.Generator().manual_seed(seed),
        )
        n = rest.shape[1]
        rows.append(
            {
                "components": components,
                "rank": rank,
                "MiB": 4 * components * (n * (rank + 1) + 2) / 2**20,
                "seconds": perf_counter() - start,
                "train": mixture.history[-1] / n,
                "held_out": log_likelihood(mixture, rest.to(dtype)).double().mean().item() / n,
            }
        )
    return rows


def training_images(
    name: str, split: str, start: int | None = None, stop: int | None = None
) -> np.ndarray:
    """The 8-bit images a shipped mixture is fitted to, flat; faces for fitting also mirrored.

    Arguments:
        name: "mnist" or "faces32".
        split: "train" or "test".
        start, stop: a slice of the split. Mirror images are added to training faces unless the
            slice is a held-out tail (start given).

    Returns (N, n) uint8. Raises ValueError for another name.
    """
    recipe = _recipe(name)
    images = mnist(split)[0] if name == "mnist" else faces(split, recipe.shape[-1])
    images = images[start:stop]
    if name == "faces32" and split == "train" and start is None:
        images = np.concatenate([images, images[:, :, ::-1]])
    return images.reshape(len(images), -1)


def dequantise(images: np.ndarray, generator: torch.Generator) -> Tensor:
    """8-bit images with uniform noise of one grey level, (v + u) / 127.5 - 1, u in [-1/2, 1/2).

    Returns float32 of the same shape. Raises ValueError unless images are uint8.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    u = torch.rand(images.shape, generator=generator) - 0.5
    return (torch.from_numpy(images) + u) / 127.5 - 1


def bits_per_pixel(nats_per_pixel: float) -> float:
    """Bound on the bits a pixel of 8-bit data, -(nats + log(2/255)) / log 2.

    The density of dequantised data, integrated over a grey level of width 2/255, is at most the
    probability of the byte (Theis, van den Oord and Bethge, arXiv 1511.01844).
    """
    return -(nats_per_pixel + math.log(2 / 255)) / math.log(2)


def _recipe(name: str) -> _Recipe:
    if name not in MIXTURES:
        raise ValueError(f"name must be one of {sorted(MIXTURES)}, got {name!r}")
    return MIXTURES[name]


def _print_step(step: int, likelihood: float) -> None:
    print(f"step {step:3d}  log-likelihood {likelihood:.3f}", flush=True)

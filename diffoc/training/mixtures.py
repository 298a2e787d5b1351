"""The mixture priors that ship with the repository: their data, sizes and fits."""

import math
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffoc.checks import check_member
from diffoc.data import faces, mnist
from diffoc.data.manifest import LICENSES, store_weights
from diffoc.priors.weights import read_weights
from diffoc.training.evaluation import write_unless_worse
from diffoc.training.fitting import PPCAMixture, fit_mixture, log_likelihood


class _Mixture(NamedTuple):
    shape: tuple[int, int, int]
    components: int
    rank: int
    data: str


MIXTURES = {
    "mnist": _Mixture((1, 28, 28), components=20, rank=60, data="mnist"),
    "faces32": _Mixture((1, 32, 32), components=10, rank=97, data="faces"),
}


def fit_mixture_prior(
    name: str, out_dir: Path | str, seed: int = 0, progress: bool = True
) -> dict[str, float]:
    """Fits one of the shipped mixtures on its whole training split, writes and registers it.

    Images are dequantised, v -> (v + u) / 127.5 - 1 with u uniform in [-1/2, 1/2), so that the
    density of 8-bit data is bounded and bits per dimension bound the code length of the bytes.

    The name is a key of :data:`MIXTURES`; mixture_<name>.safetensors and its entry in manifest.json
    go to an existing folder. The seed is that of the start and of the dequantisation. What is
    returned are the numbers of the fit: sizes, steps, seconds, and the test split's log-likelihood
    in nats and bits per pixel. A FileNotFoundError says that the folder or the data set is missing,
    a ValueError that the mixture that is there is better, or none of such images.
    """
    check_member(MIXTURES, name=name)
    sizes = MIXTURES[name]
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise FileNotFoundError(f"out_dir {out_dir} is not a folder: create it first")
    generator = torch.Generator().manual_seed(seed)
    train = dequantise(training_images(name, "train"), generator)
    test = dequantise(training_images(name, "test"), generator)
    n = test.shape[1]
    file = f"mixture_{name}"
    before = _worth_of_file(out_dir / f"{file}.safetensors", test)
    start = perf_counter()
    mixture = fit_mixture(
        train,
        sizes.components,
        sizes.rank,
        generator=generator,
        progress=_print_step if progress else None,
    )
    seconds = perf_counter() - start
    tensors = {
        "log_weights": mixture.log_weights,
        "means": mixture.means.half(),  # costs 2e-6 nats a pixel, and is half as large
        "loadings": mixture.loadings.half(),
        "noise_variance": mixture.noise_variance,
    }
    shape = {"shape": ",".join(map(str, sizes.shape))}
    source = f"python -m diffoc fit {name}"
    nats = _nats_per_pixel(mixture, test)

    def write(folder: Path) -> Path:
        return store_weights(file, tensors, LICENSES[sizes.data], source, folder, shape)

    write_unless_worse(write, out_dir, before - nats)
    return {
        "components": sizes.components,
        "rank": sizes.rank,
        "images": len(train),
        "steps": len(mixture.history) - 1,
        "seconds": seconds,
        "train_nats_per_pixel": mixture.history[-1] / n,
        "test_nats_per_pixel": nats,
        "test_bits_per_pixel": bits_per_pixel(nats),
    }


def _worth_of_file(path: Path, images: Tensor) -> float:
    """Returns the nats per pixel of images (N, n) under a mixture, minus infinity without a file.

    A ValueError says that the file holds no mixture on R^n.
    """
    if not path.exists():
        return -math.inf
    tensors = read_weights(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    K, n, r = (*shapes.get("loadings", ()), 0, 0, 0)[:3]
    mixture = {"log_weights": (K,), "means": (K, n), "loadings": (K, n, r), "noise_variance": (K,)}
    if shapes != mixture or n != images.shape[1]:
        raise ValueError(
            f"path {path} holds no mixture of {images.shape[1]} pixels: name another --out"
        )
    return _nats_per_pixel(PPCAMixture(**tensors), images)  # type: ignore[arg-type]  # no history


def _nats_per_pixel(mixture: PPCAMixture, images: Tensor) -> float:
    return log_likelihood(mixture, images).double().mean().item() / images.shape[1]


def training_images(name: str, split: str) -> np.ndarray:
    """Returns the 8-bit images a shipped mixture is fitted to, flat, (N, n).

    The name is a key of :data:`MIXTURES`. Faces of the split "train" are there mirrored, too.
    """
    images = mnist(split)[0] if name == "mnist" else faces(split, MIXTURES[name].shape[-1])
    if name == "faces32" and split == "train":
        images = np.concatenate([images, images[:, :, ::-1]])
    return images.reshape(len(images), -1)


def dequantise(images: np.ndarray, generator: torch.Generator) -> Tensor:
    """Returns uint8 images with uniform noise, (v + u) / 127.5 - 1, u in [-1/2, 1/2), float32."""
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    u = torch.rand(images.shape, generator=generator) - 0.5
    return (torch.from_numpy(images) + u) / 127.5 - 1


def bits_per_pixel(nats_per_pixel: float) -> float:
    """Returns a bound on the bits a pixel of 8-bit data, -(nats + log(2/255)) / log 2.

    The density of dequantised data, integrated over a grey level of width 2/255, is at most the
    probability of the byte (Theis, van den Oord and Bethge, arXiv 1511.01844).
    """
    return -(nats_per_pixel + math.log(2 / 255)) / math.log(2)


def _print_step(step: int, likelihood: float) -> None:
    print(f"step {step:3d}  log-likelihood {likelihood:.3f}", flush=True)

"""Writes notebook 09's picture of every method: `data/gallery_faces64.safetensors`.

    python tools/gallery.py          # the methods whose settings have changed
    python tools/gallery.py dps      # and these

Each image is Grace Hopper's, restored from one pixel in twelve with the settings that the trials of
its method chose; the paper's algorithm has its own. It takes some five seconds an image, a minute
for the paper's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffoc import load_prior
from diffoc.data import portrait
from diffoc.data.manifest import data_folder, load_weights, store_weights
from diffoc.experiments.methods import METHODS, prior_of, settings_of
from diffoc.experiments.records import as_json, rows_of
from diffoc.problems.tasks import NOISE_STD, measure, task

NAME, PRIOR, TASK, BUDGET = "gallery_faces64", "faces64", "random_inpainting", 300
PAPERS, THEIR_BUDGET = ("paper", "released"), 1000


def settings() -> dict[str, str]:
    """Returns the settings of the methods that the table has on the task, as JSON, by method."""
    rows = rows_of(data_folder() / "records" / f"table1_{PRIOR}.csv")
    names = rows[(rows["task"] == TASK) & (rows["nfe"] == BUDGET)]["method"].unique()
    return {name: as_json(_settings(name)) for name in (*names, *PAPERS)}


def _settings(method: str) -> dict:
    budget = THEIR_BUDGET if method in PAPERS else BUDGET
    return settings_of(PRIOR, method, TASK, budget, {})


def restored(method: str) -> Tensor:
    """Returns the image of a method, (C, H, W) in 8 bits."""
    truth = portrait("grace_hopper")
    g = torch.Generator().manual_seed(0)
    physics = task(TASK, truth.shape[1:], g)
    y = measure(physics, truth, g)
    used = load_prior(prior_of(method, PRIOR))
    g = torch.Generator().manual_seed(2)
    start = torch.randn(1, *used.image_shape, generator=g)
    x = METHODS[method].run(used, physics, y, start, g, noise_std=NOISE_STD, **_settings(method))
    return (x[0].clamp(-1, 1) * 127.5 + 127.5).round().byte()


def shown(folder: Path) -> dict[str, str]:
    """Returns the settings of the images that a folder's gallery has; none without a gallery."""
    path = folder / f"{NAME}.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def main() -> None:
    """Computes the images that are missing or asked for, and writes all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="to be computed in any case")
    again = parser.parse_args().methods
    wanted, known = settings(), shown(data_folder())
    images = load_weights(NAME) if known else {}
    for name, text in wanted.items():
        if name in again or known.get(name) != text:
            print(name, flush=True)
            images[name] = restored(name)
    store_weights(
        NAME,
        {name: images[name] for name in wanted},
        "research use, as the priors of faces; the portrait is the US Navy's, in the public domain",
        "python tools/gallery.py: one face by the methods of Table 1, see notebook 09",
        data_folder(),
        wanted,
    )


if __name__ == "__main__":
    main()

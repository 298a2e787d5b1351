"""What measures in the features of trained networks: LPIPS of images, and the network of FID.

The networks' weights belong to others. They are looked for in the cache and, as other programs
share them, in the folder of torch's hub, and are never downloaded in the middle of a run:
:func:`download` does that, on request. What cannot be computed is missing, with the reason, and
tables show a dash; no other number ever takes its name. The packages come with
`pip install -e '.[metrics]'`.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from diffoc.data.downloads import RemoteFile, fetch, find, read_torch_file

# Names carry the first eight digits of the checksum; sizes are rough.
WEIGHTS = {
    "alex": RemoteFile(
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        244_000_000,
        "7be5be79",
    ),
    "vgg": RemoteFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        553_000_000,
        "397923af",
    ),
    "inception": RemoteFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        96_000_000,
        "6726825d",
    ),
}

LPIPS = {
    "lpips_alex": ("alex", False),
    "lpips_vgg": ("vgg", False),
    "lpips_alex_01": ("alex", True),
    "lpips_vgg_01": ("vgg", True),
}
"""Network, and whether it sees images in [0, 1]. The package asks for [-1, 1]; the released code of
the paper's authors gives it [0, 1], which halves all contrasts and makes another number."""

SMALLEST = 32  # side of an image of which AlexNet leaves a pixel in its last layer


def weights_of(net: str) -> Path:
    """Returns the file of one of :data:`WEIGHTS`, in the cache or in the folder of torch's hub."""
    return find(WEIGHTS[net], Path(torch.hub.get_dir()) / "checkpoints")


def download() -> list[Path]:
    """Fetches the weights of all networks into the cache, 0.9 GB; raises as `fetch` does."""
    return [fetch(file) for file in WEIGHTS.values()]


def missing_metrics() -> dict[str, str]:
    """Returns why LPIPS and FID, by name, cannot be computed here, and where their weights go.

    >>> for name, reason in missing_metrics().items():
    ...     print(f"{name}: {reason}")
    """
    missing = {}
    needs = {"lpips_alex": ("alex", "lpips"), "lpips_vgg": ("vgg", "lpips")}
    for name, (net, package) in (needs | {"fid": ("inception", "torch_fidelity")}).items():
        if find_spec(package) is None:
            missing[name] = f"the package {package} is missing: pip install -e '.[metrics]'"
            continue
        try:
            weights_of(net)
        except FileNotFoundError as error:
            missing[name] = str(error)
    return missing


def perceptual_metrics(
    images: Tensor,
    truth: Tensor,
    names: Sequence[str] = ("lpips_alex", "lpips_vgg"),
    batch: int = 16,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns LPIPS of images, (B,) each on the CPU, and for other names why there is none.

    Images are (B, C, H, W), C 1 or 3, H and W at least 32, and are clipped to [-1, 1]; grey becomes
    three channels. Names are keys of :data:`LPIPS`, and a network sees `batch` images at once.

    Source: Zhang et al. 2018, arXiv:1801.03924, version 0.1 of the package.
    """
    if unknown := set(names) - set(LPIPS):
        raise ValueError(f"names has {sorted(unknown)}, expected some of {', '.join(LPIPS)}")
    if images.shape != truth.shape:
        raise ValueError(f"images and truth have shapes {images.shape} and {truth.shape}")
    images, truth = _as_colour(images, "images"), _as_colour(truth, "truth")
    if min(images.shape[-2:]) < SMALLEST:
        raise ValueError(f"images are {tuple(images.shape)}, expected sides of {SMALLEST} or more")
    values, missing = {}, {}
    for name in names:
        net, unit_range = LPIPS[name]
        try:
            distance = _lpips_network(net, weights_of(net)).to(images.device)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            missing[name] = str(error)
            continue
        pairs = [((x + 1) / 2 if unit_range else x).split(batch) for x in (images, truth)]
        with torch.no_grad():
            distances = [distance(a, b).flatten() for a, b in zip(*pairs, strict=True)]
        values[name] = torch.cat(distances).cpu()
    return values, missing


@cache
def _lpips_network(net: str, path: Path) -> nn.Module:
    """Returns the package's LPIPS, of images (B, 3, H, W) in [-1, 1], with a trunk from a file."""
    import lpips

    # The package would download the trunk, so it gets a random one first; it warns of its own use
    # of torchvision.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = read_torch_file(path)
    # slice2.3.weight of the trunk is torchvision's features.3.weight.
    names = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
    if missing := set(names.values()) - set(state):
        raise ValueError(f"{path} has no {min(missing)}: remove it and try again")
    network.net.load_state_dict({key: state[name] for key, name in names.items()})
    return network.eval().requires_grad_(False)


def inception() -> nn.Module:
    """Returns the network of FID: images (B, 3, H, W) uint8 to features (B, 2048).

    It is torchmetrics', resizing to 299 x 299 as the original TensorFlow code does; torch-fidelity
    is the package that has the network.
    """
    path = weights_of("inception")
    read_torch_file(path)  # refuses a file with code in it, which torch-fidelity would run
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
    return network.requires_grad_(False)


def _as_colour(images: Tensor, name: str) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name} has shape {tuple(images.shape)}, expected (B, 1 or 3, H, W)")
    if not images.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    return images.float().clamp(-1, 1).expand(-1, 3, -1, -1)

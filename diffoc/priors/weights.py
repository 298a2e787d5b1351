"""Weights on disk: ours as safetensors in half precision, those of others as torch files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffoc.data.downloads import read_torch_file
from diffoc.data.files import replacing
from diffoc.data.manifest import LICENSES, load_weights, register_file
from diffoc.priors.networks import DigitClassifier, ResidualClassifier

# What each network was trained on.
TRAINED_ON = {
    "mnist": "mnist",
    "classifier": "mnist",
    "judge": "mnist",
    "faces64": "faces",
    "faces64_rgb": "faces",
    "faces64_autoencoder": "faces",
    "faces64_latent": "faces",
    "faces64_severity": "faces",
    "faces64_rgb_autoencoder": "faces",
    "faces64_rgb_latent": "faces",
    "faces64_rgb_severity": "faces",
}


def write_weights(network: nn.Module, name: str, folder: Path) -> Path:
    """Writes a network's weights as `name`.safetensors and its entry in the manifest.

    Args:
        network: whose weights.
        name: a key of :data:`TRAINED_ON`.
        folder: an existing folder.

    Raises:
        ValueError: for another name, or weights that are not finite: nothing is written then.
        OSError: if the file cannot be written; an older one is then as it was.
    """
    if name not in TRAINED_ON:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(TRAINED_ON)}")
    state = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"network has weights that are not finite: {name} is not written")
    path = folder / f"{name}.safetensors"
    with replacing(path) as part:
        save_file(state, part)
    license = LICENSES[TRAINED_ON[name]]
    register_file(path.name, license, f"python -m diffoc train {name}", folder)
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The float32 weights in a file of :func:`write_weights`, wherever it lies.

    Args:
        path: of the safetensors file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path {path} is no file: name the weights of an earlier training")
    try:
        return {k: v.float() for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"path {path} is damaged or no safetensors file: {error}") from error


def difference(network: nn.Module, weights: Mapping[str, object]) -> str | None:
    """What is first found in weights that makes them those of another network; None if nothing."""
    expected = network.state_dict()
    if unlike := expected.keys() ^ weights.keys():
        name = min(map(str, unlike))
        return f"{name} is {'missing' if name in expected else 'not of this network'}"
    for name, value in expected.items():
        found = weights[name]
        if not isinstance(found, Tensor):
            return f"{name} is no tensor"
        if found.shape != value.shape or found.is_floating_point() != value.is_floating_point():
            return f"{name} is {found.dtype} {tuple(found.shape)}, expected {tuple(value.shape)}"
    return None


def load_into(network: nn.Module, weights: Mapping[str, Any], place: Path | str) -> None:
    """Gives a network its weights, in its own precision.

    Args:
        network: is as it was if they are refused.
        weights: all of its state.
        place: where they are from, for the message.

    Raises:
        ValueError: if they are of another network, or not finite.
    """
    if found := difference(network, weights):
        raise ValueError(f"{place} holds another network: {found}")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{place} has weights that are not finite: {name}")
    network.load_state_dict(weights)


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint that :func:`diffoc.training.trainer.save` wrote, on the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path {path} is no checkpoint: call start() for a new run")
    state = read_torch_file(path)
    kinds = {"network": dict, "average": dict, "optimizer": dict, "generator": Tensor, "seen": int}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind) or isinstance(state[key], bool):
            raise ValueError(
                f"path {path} is no checkpoint of this trainer: {key} is missing or of another "
                "kind; take another, or begin anew without it"
            )
    return state


_CLASSIFIERS: dict[str, tuple[str, type[DigitClassifier | ResidualClassifier]]] = {
    "mnist": ("classifier", DigitClassifier),
    "judge": ("judge", ResidualClassifier),
}


def classifier(
    name: str = "mnist", folder: Path | None = None
) -> DigitClassifier | ResidualClassifier:
    """A trained classifier of handwritten digits, in evaluation mode, float32.

    Args:
        name: "mnist", the paper's, which guides and whose features measure; or "judge", of another
            architecture and seed, which has no part in what it judges.
        folder: where its weights lie, by default the repository's `data/`.

    Raises:
        ValueError: for another name, or weights that are not those of the manifest.
        FileNotFoundError: if the weights are missing.
    """
    if name not in _CLASSIFIERS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(_CLASSIFIERS)}")
    file, build = _CLASSIFIERS[name]
    network = build()
    load_into(network, load_weights(file, folder), f"{file}.safetensors")
    return network.eval().requires_grad_(False)

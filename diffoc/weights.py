"""Weights of the small networks on disk: safetensors in half precision, with checksums."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from diffoc.data import LICENSES, load_weights, register_file
from diffoc.networks import DigitClassifier

# What each network was trained on.
TRAINED_ON = {"mnist": "mnist", "classifier": "mnist", "faces64": "faces"}


def write_weights(network: nn.Module, name: str, folder: Path) -> Path:
    """Writes a network's weights as `name`.safetensors and its entry in the manifest.

    Args:
        network: whose weights.
        name: a key of :data:`TRAINED_ON`.
        folder: an existing folder.
    """
    state = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    path = folder / f"{name}.safetensors"
    save_file(state, path)
    license = LICENSES[TRAINED_ON[name]]
    register_file(path.name, license, f"python -m diffoc train {name}", folder)
    return path


def classifier(name: str = "mnist", folder: Path | None = None) -> DigitClassifier:
    """The trained classifier of handwritten digits, in evaluation mode, float32.

    Args:
        name: "mnist", the only one there is.
        folder: where its weights lie, by default the repository's `data/`.

    Raises:
        ValueError: for another name, or weights that are not those of the manifest.
        FileNotFoundError: if the weights are missing.
    """
    if name != "mnist":
        raise ValueError(f"name is {name!r}, expected 'mnist'")
    network = DigitClassifier()
    network.load_state_dict({k: v.float() for k, v in load_weights("classifier", folder).items()})
    return network.eval().requires_grad_(False)

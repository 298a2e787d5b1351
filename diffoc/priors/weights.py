"""Weights on disk: ours as safetensors in half precision, those of others as torch files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffoc.checks import check_member
from diffoc.data.downloads import read_torch_file
from diffoc.data.manifest import LICENSES, load_weights, store_weights
from diffoc.priors.networks import DigitClassifier, ResidualClassifier

# What each network was trained on.
TRAINED_ON = dict.fromkeys(("mnist", "classifier", "judge"), "mnist") | {
    f"faces64{part}": "faces" for part in ("", "_autoencoder", "_latent", "_severity")
}


def write_weights(network: nn.Module, name: str, folder: Path) -> Path:
    """Writes a network's weights as `name`.safetensors, and its entry in the folder's manifest.

    The name is a key of :data:`TRAINED_ON`. What was measured and not trained, the buffers, keeps
    its precision. Where anything is wrong, an older file is left as it was.
    """
    check_member(TRAINED_ON, name=name)
    measured = {key for key, _ in network.named_buffers()}
    state = network.state_dict()
    state = {key: value if key in measured else value.half() for key, value in state.items()}
    source = f"python -m diffoc train {name}"
    return store_weights(name, state, LICENSES[TRAINED_ON[name]], source, folder)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the float32 weights in a file of :func:`write_weights`, wherever it lies."""
    if not path.is_file():
        raise FileNotFoundError(f"path {path} is no file: name the weights of an earlier training")
    try:
        return {k: v.float() for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"path {path} is damaged or no safetensors file: {error}") from error


def difference(network: nn.Module, weights: Mapping[str, object]) -> str | None:
    """Returns the first thing that makes weights those of another network, None if nothing does."""
    expected = network.state_dict()
    if unlike := expected.keys() ^ weights.keys():
        name = min(map(str, unlike))
        return f"{name} is {'missing' if name in expected else 'not of this network'}"
    for name, value in expected.items():
        weight = weights[name]
        if not isinstance(weight, Tensor):
            return f"{name} is no tensor"
        if weight.shape != value.shape or weight.is_floating_point() != value.is_floating_point():
            return f"{name} is {weight.dtype} {tuple(weight.shape)}, expected {tuple(value.shape)}"
    return None


def load_into(network: nn.Module, weights: Mapping[str, Any], place: Path | str) -> None:
    """Gives a network weights, all of its state, in its own precision; errors name their place."""
    if unlike := difference(network, weights):
        raise ValueError(f"{place} holds another network: {unlike}")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{place} has weights that are not finite: {name}")
    network.load_state_dict(weights)


def read_checkpoint(path: Path) -> dict:
    """Returns what :func:`diffoc.training.trainer.save` wrote into a checkpoint, on the CPU."""
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


Network = TypeVar("Network", bound=nn.Module)


def load_shipped(build: Callable[[], Network], name: str, folder: Path | None = None) -> Network:
    """Returns a trained network by name, in float32, to evaluate; the default folder is `data/`."""
    network = build()
    load_into(network, load_weights(name, folder), f"{name}.safetensors")
    return network.eval().requires_grad_(False)


def classifier(name: str = "mnist") -> DigitClassifier | ResidualClassifier:
    """Returns a trained classifier of handwritten digits, see :func:`load_shipped`.

    "mnist" is the paper's, which guides and whose features measure; "judge" has another
    architecture and seed, and no part in what it judges.
    """
    check_member(("mnist", "judge"), name=name)
    if name == "mnist":
        return load_shipped(DigitClassifier, "classifier")
    return load_shipped(ResidualClassifier, name)

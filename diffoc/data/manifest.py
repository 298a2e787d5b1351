"""The files that ship in the repository's `data/`, each with its checksum in `manifest.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from diffoc.data.files import replacing

MANIFEST = "manifest.json"
# Of the data sets, and so of the weights that are fitted to them.
LICENSES = {
    "mnist": "CC BY-SA 3.0, as MNIST (Yann LeCun, Corinna Cortes, Christopher J.C. Burges)",
    "faces": "research use, as Labeled Faces in the Wild (Huang et al. 2007)",
}


def data_folder() -> Path:
    """Returns the repository's ``data/`` folder, beside the package."""
    folder = Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the folder {folder} is missing: diffoc reads its weights and images from the "
            "repository, so install it from a clone with `pip install -e .`"
        )
    return folder


def checked_bytes(file: str, folder: Path | None = None) -> bytes:
    """Returns the bytes of a shipped file, once their SHA-256 agrees with the manifest.

    File and manifest lie in a folder, by default the repository's ``data/``.
    """
    folder = data_folder() if folder is None else Path(folder)
    for path in (folder / file, folder / MANIFEST):
        if not path.is_file():
            back = (
                f"it is part of the repository, get it back with `git checkout -- data/{path.name}`"
            )
            if folder != data_folder():
                back = f"make it there first, or copy it from {data_folder()} with its {MANIFEST}"
            raise FileNotFoundError(f"file {path} is missing: {back}")
    entry = manifest_entry(file, folder)
    content = (folder / file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(
            f"{folder / file} is not the file that the manifest describes: {len(content)} bytes, "
            f"sha256 {digest[:12]}..., expected {entry['bytes']} bytes, sha256 "
            f"{entry['sha256'][:12]}...; restore it with `git checkout -- data/{file}`, or, if it "
            "was made anew on purpose, register it with register_file"
        )
    return content


def manifest_entry(file: str, folder: Path | None = None) -> dict:
    """Returns what the manifest of a folder says of a file: sha256, bytes, license and source."""
    folder = data_folder() if folder is None else Path(folder)
    entry = _entries(folder).get(file)
    if entry is None:
        raise ValueError(f"{file} has no entry in {folder / MANIFEST}: add it with register_file")
    kinds = {"sha256": str, "bytes": int, "license": str, "source": str}
    for key, kind in kinds.items():
        if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
            raise ValueError(
                f"{folder / MANIFEST} is damaged, {key} of {file} is missing or no "
                f"{kind.__name__}: restore it with `git checkout -- data/{MANIFEST}`"
            )
    return entry


def _entries(folder: Path) -> dict:
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        entries = error
    if not isinstance(entries, dict):
        raise ValueError(
            f"{folder / MANIFEST} is damaged ({entries!s:.60}): restore it with `git checkout -- "
            f"data/{MANIFEST}`"
        )
    return entries


def register_file(file: str, license: str, source: str, folder: Path) -> dict:
    """Writes or replaces the entry of a file in the manifest of its folder, and returns it.

    License and source say in words what may be done with it and how it came about.
    """
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder / file} is missing: write it before it is registered")
    content = (folder / file).read_bytes()
    manifest = folder / MANIFEST
    entries = _entries(folder) if manifest.is_file() else {}
    entries[file] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "license": license,
        "source": source,
    }
    with replacing(manifest) as part:
        part.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")
    return entries[file]


def load_weights(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a shipped file by its name, with or without ending, once checked."""
    file = f"{name.removesuffix('.safetensors')}.safetensors"
    try:
        return load(checked_bytes(file, folder))
    except SafetensorError as error:
        raise ValueError(f"{file} is registered, but no safetensors file: {error}") from error


def store_weights(
    name: str,
    tensors: Mapping[str, Tensor],
    license: str,
    source: str,
    folder: Path,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes tensors as `name`.safetensors, with their entry in the manifest; returns the path.

    License and source are as for :func:`register_file`. Tensors that are not finite are refused,
    before anything is written.
    """
    if not all(value.isfinite().all() for value in tensors.values()):
        raise ValueError(f"network has weights that are not finite: {name} is not written")
    path = folder / f"{name}.safetensors"
    with replacing(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
    register_file(path.name, license, source, folder)
    return path

"""Large weight files of others: where they are kept, fetched from, and how they are checked."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gdown
import requests
import torch
from gdown.exceptions import DownloadError
from platformdirs import user_cache_path
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


@dataclass(frozen=True)
class RemoteFile:
    """A file that is downloaded when it is first needed.

    Its name is the one in the cache, its address direct or of Google Drive. Its size is a rough one
    where `sha256` is None, which is its checksum or the first digits of it.
    """

    name: str
    url: str
    bytes: int
    sha256: str | None = None


def cache_folder() -> Path:
    """Returns the folder $DIFFOC_CACHE, by default the platform's cache folder for diffoc."""
    named = os.environ.get("DIFFOC_CACHE")
    return Path(named).expanduser() if named else user_cache_path("diffoc")


def fetch(file: RemoteFile) -> Path:
    """Returns the path of a file in the cache, after it was downloaded if need be, and checked.

    An interrupted download goes on where it stopped; a complete one is never repeated.
    """
    path = cache_folder() / file.name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            gdown.download(file.url, str(path), resume=True, timeout=(10, 60), retries=2)
        except (DownloadError, requests.RequestException) as error:
            raise FileNotFoundError(
                f"{file.name} is not in {path.parent} and cannot be downloaded ({error}): fetch "
                f"{file.url} ({file.bytes / 1e6:,.0f} MB) by hand and put it at {path}, or set "
                "DIFFOC_CACHE to the folder that has it"
            ) from error
        except OSError as error:
            raise OSError(
                f"{path} could not be written ({error}): free some disk space, or set DIFFOC_CACHE "
                "to another folder, and try again; here it goes on where it stopped"
            ) from error
    return _checked(file, path)


def find(file: RemoteFile, *elsewhere: Path) -> Path:
    """Returns the path of a file that is in the cache or `elsewhere`; it downloads nothing."""
    folders = [cache_folder(), *elsewhere]
    for folder in folders:
        if (folder / file.name).is_file():
            return _checked(file, folder / file.name)
    raise FileNotFoundError(
        f"{file.name} is missing: fetch {file.url} ({file.bytes / 1e6:,.0f} MB) and put it, under "
        f"that name, into {' or '.join(map(str, folders))}, or set DIFFOC_CACHE to the folder that "
        "has it"
    )


def _checked(file: RemoteFile, path: Path) -> Path:
    if file.sha256 is not None and not (sha256 := sha256_of(path)).startswith(file.sha256):
        raise ValueError(
            f"{path} is not {file.name}: its sha256 is {sha256[:12]}..., expected "
            f"{file.sha256[:12]}...; remove it and try again"
        )
    return path


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_torch_file(path: Path, stand_ins: bool = False) -> dict[str, Tensor | dict]:
    """Returns the content of an existing torch file, on the CPU; no code in it is run.

    With `stand_ins`, an empty class stands for each that the file names, as checkpoints of training
    programs do.
    """
    try:
        named = get_unsafe_globals_in_checkpoint(path) if stand_ins else []
        with safe_globals([(_StandIn, name) for name in named]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the reader fail anywhere
        raise ValueError(
            f"{path} is damaged or no file of tensors alone ({type(error).__name__}): name "
            "another, or fetch it again"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is no file of named tensors: name another")
    return dict(state)


class _StandIn:
    """What is made in place of an object whose class is not to be run."""

    def __init__(self, *_args: object, **_keywords: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

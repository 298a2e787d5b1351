"""Large weight files of others: where they are kept, fetched from, and how they are checked."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import gdown
import requests
from gdown.exceptions import DownloadError
from platformdirs import user_cache_path


@dataclass(frozen=True)
class RemoteFile:
    """A file that is downloaded when it is first needed.

    Attributes:
        name: in the cache.
        url: direct, or of Google Drive.
        bytes: its size; a rough one where `sha256` is None.
        sha256: its checksum, or the first digits of it, where they are known.
    """

    name: str
    url: str
    bytes: int
    sha256: str | None = None


def cache_folder() -> Path:
    """The folder $DIFFOC_CACHE, by default the platform's cache folder for diffoc."""
    named = os.environ.get("DIFFOC_CACHE")
    return Path(named).expanduser() if named else user_cache_path("diffoc")


def fetch(file: RemoteFile) -> Path:
    """The path of a file in the cache, after it was downloaded if need be, and checked.

    An interrupted download goes on where it stopped; a complete one is never repeated.

    Args:
        file: what is wanted.

    Raises:
        FileNotFoundError: if it is not there and cannot be downloaded.
        OSError: if it cannot be written.
        ValueError: if its checksum is known and another.
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
    """The path of a file that is there already, checked; nothing is ever downloaded.

    Args:
        file: what is wanted.
        elsewhere: folders to look into after the cache.

    Raises:
        FileNotFoundError: if it is in none of them.
        ValueError: if its checksum is known and another.
    """
    folders = [cache_folder(), *elsewhere]
    for folder in folders:
        if (folder / file.name).is_file():
            return _checked(file, folder / file.name)
    raise FileNotFoundError(
        f"{file.name} is missing: fetch {file.url} ({file.bytes / 1e6:,.0f} MB) and put it into "
        f"{' or '.join(map(str, folders))}, or set DIFFOC_CACHE to the folder that has it"
    )


def _checked(file: RemoteFile, path: Path) -> Path:
    if file.sha256 is not None and not (found := sha256_of(path)).startswith(file.sha256):
        raise ValueError(
            f"{path} is not {file.name}: its sha256 is {found[:12]}..., expected "
            f"{file.sha256[:12]}...; remove it and try again"
        )
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where a number comes from: versions, commit, machine, and digests of what went in."""

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
_DIGITS = 16  # of a SHA-256 in hexadecimal: 64 bits tell everything here apart


def environment(device: str = "cpu") -> dict[str, str]:
    """Returns columns "versions", "commit", "device", "threads" of what this process computes."""
    packages = ("torch", "azula", "deepinv", "diffoc")
    versions = [f"{package} {version(package)}" for package in packages]
    return {
        "versions": " ".join([f"python {platform.python_version()}", *versions]),
        "commit": commit(),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
    }


def told(error: object) -> str:
    """Returns what an error says, in one line, without what is of this machine or this user alone.

    Names and passwords in addresses are left out, paths begin at the project or at the home.
    """
    text = re.sub(r"(?<=://)[^/@\s]+@", "", " ".join(str(error).split()))
    for folder, short in ((ROOT, ""), (Path.home(), "~/")):
        text = text.replace(f"{folder}/", short)
    return text


@cache
def commit(root: Path = ROOT) -> str:
    """Returns the git commit of a checkout, "+changes" if code or data were changed; else empty.

    Records may be new or changed, they are what is being made. The first answer is kept.
    """
    if not (root / ".git").exists():  # a file in a linked worktree
        return ""
    paths = ("diffoc", "data", ":!data/records")
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + "+changes" * bool(_git(root, "status", "--porcelain", "--", *paths))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@cache
def device_name(device: str) -> str:
    """Returns a device in words: a GPU's model, or a CPU's with the instructions it may use.

    CPUs of one name differ, in virtual machines above all, and so do their last digits: family,
    model and stepping follow the name.
    """
    if torch.device(device).type == "cuda":
        tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        name = torch.cuda.get_device_name(device)
        return f"{name}, CUDA {torch.version.cuda}" + ", TF32" * tf32
    names = [platform.processor()]
    if Path("/proc/cpuinfo").exists():
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        known = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.MULTILINE))
        names = [known.get(key, "") for key in ("model name", "cpu family", "model", "stepping")]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    parts = [platform.machine(), *names, torch.backends.cpu.get_cpu_capability(), limit]
    return " ".join(part for part in parts if part)


def digest(tensors: dict[str, Tensor] | Tensor) -> str:
    """Returns the first digits of the SHA-256 of tensors: names, types, shapes, values."""
    sha256 = hashlib.sha256()
    for name, tensor in ({"": tensors} if isinstance(tensors, Tensor) else tensors).items():
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()[:_DIGITS]


def short(sha256: str) -> str:
    """Returns a SHA-256 as :func:`digest` gives it."""
    return sha256[:_DIGITS]

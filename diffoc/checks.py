"""What doors ask of their arguments, and how networks are used behind them.

Every error names the argument, and says what is expected of it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_default_device() -> None:
    """Raises a ValueError unless torch makes new tensors on the CPU, where it draws numbers."""
    if (device := torch.get_default_device()).type != "cpu":
        raise ValueError(
            f"torch's default device is {device}: leave it cpu, and move prior, physics and y with "
            f".to({str(device)!r})"
        )


def check_tensor(name: str, x: Tensor) -> None:
    """Raises unless a tensor is dense, not empty, not on "meta", and has finite numbers only.

    These are of a floating-point type.
    """
    check_default_device()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor")
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"{name} is a sparse or nested tensor, expected a dense one")
    if x.dtype not in FLOATS or not x.numel():
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected floating-point numbers, at "
            "least one"
        )
    if x.is_meta or not x.isfinite().all():
        raise ValueError(f"{name} has values that are not finite, or none at all")


def check_images(name: str, x: Tensor) -> None:
    """Does as :func:`check_tensor`, for images (B, C, H, W)."""
    check_tensor(name, x)
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, C, H, W)")


def check_alike(**tensors: Tensor) -> None:
    """Raises a ValueError unless tensors have one dtype, that of the first, and one device."""
    (first, x), *others = tensors.items()
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{first} is {x.dtype}, expected float32 or float64")
    for name, other in others:
        if (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(
                f"{name} is {other.dtype} on {other.device}, {first} {x.dtype} on {x.device}"
            )


def check_shape(shape: Sequence[int], letters: str) -> None:
    """Raises a ValueError unless a shape has as many sides as `letters`, of 1 or more each."""
    check_default_device()
    sides: Any = shape if isinstance(shape, tuple | list) else ()
    if len(sides) != len(letters) or not all(isinstance(n, int) and n > 0 for n in sides):
        expected = ", ".join(letters)
        raise ValueError(f"shape is {shape!r}, expected ({expected}) of 1 or more each")


def check_size(expected: Sequence[int], **tensors: Tensor) -> None:
    """Raises a ValueError unless tensors have the expected shape, a TypeError if they are none."""
    for name, x in tensors.items():
        check_kind(Tensor, **{name: x})
        if tuple(x.shape) != tuple(expected):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)}")


def check_above(low: float, **numbers: float) -> None:
    """Raises unless numbers are finite and above `low`: a TypeError if they are no numbers."""
    _check_numbers(numbers, lambda value: low < value < math.inf, f"finite and above {low}")


def check_at_least(low: float, **numbers: float) -> None:
    """Raises unless numbers are finite and not below `low`: a TypeError if they are no numbers."""
    _check_numbers(numbers, lambda value: low <= value < math.inf, f"finite and at least {low}")


def check_within(low: float, high: float, **numbers: float) -> None:
    """Raises unless numbers are from `low` to `high`: a TypeError if they are no numbers."""
    _check_numbers(numbers, lambda value: low <= value <= high, f"{low} to {high}")


def check_whole(low: int, **numbers: int | None) -> None:
    """Does as :func:`check_at_least`, for whole numbers, or None where there is none."""
    for name, value in numbers.items():
        if value is None:
            continue
        check_at_least(low, **{name: value})
        if value != int(value) or isinstance(value, float):
            raise TypeError(f"{name} is {value}, expected a whole number")
        if value >= 2**63:  # of which no tensor is made
            raise ValueError(f"{name} is {value}, expected less than 2^63")


MOST_STEPS = 10**6
"""Of a process: its times and numbers are lists."""


def check_steps(**counts: int) -> None:
    """Raises unless numbers of steps are whole, from 1 to :data:`MOST_STEPS`."""
    check_whole(1, **counts)
    check_within(1, MOST_STEPS, **counts)


def _check_numbers(numbers: Mapping[str, Any], fits: Callable[[Any], bool], expected: str) -> None:
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            number = not (value.ndim or value.is_complex() or value.is_meta)
            number = number and value.dtype != torch.bool
        else:
            number = isinstance(value, Real) and not isinstance(value, bool | Fraction)
        if not number:
            raise TypeError(f"{name} is {shown(value)}, expected a single number")
        if not fits(value):
            raise ValueError(f"{name} is {value}, expected {expected}")


def as_numbers(name: str, values: Any) -> Tensor:
    """Returns numbers as a tensor in float64; raises as :func:`check_tensor`."""
    try:
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError("torch would only warn")
        numbers = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {shown(values)}, expected numbers") from error
    check_tensor(name, numbers)
    return numbers


def shown(value: object) -> str:
    """Returns what a value is, in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = one_line(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(text: object) -> str:
    """Returns what a text or an error says, in one line."""
    return " ".join(str(text).split())


def memory_is_full(error: Exception) -> bool:
    """Whether that is what an error says, torch's of any device or Python's."""
    text = str(error).lower()
    full = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(words in text for words in full)


def device_failed(error: Exception) -> bool:
    """Returns whether an error says that a GPU, or one of its libraries, failed.

    A matrix that could not be decomposed is no failure of the device, whichever library says so.
    """
    failed = ("cuda error", "cudnn", "cublas", "cusolver", "cufft", "nvml", "find an engine")
    text = str(error).lower()
    return not isinstance(error, torch.linalg.LinAlgError) and any(word in text for word in failed)


def check_callable(**functions: object) -> None:
    """Raises a TypeError unless arguments can be called, or are None."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {shown(value)}, expected a function")


def check_kind(kind: Any, **values: object) -> None:
    """Raises a TypeError unless values are of a kind."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {shown(value)}, expected a {kind.__name__}")


def check_member(members: Iterable[str], **names: str) -> None:
    """Raises a ValueError unless names are among `members`."""
    for name, value in names.items():
        if value not in list(members):  # a dict or set cannot be asked for a value without a hash
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(members)}")


@contextmanager
def evaluating(*networks: object) -> Iterator[None]:
    """Keeps networks in evaluation mode: no dropout, and no batch's own statistics.

    In training mode two runs differ, and images depend on their neighbours. Every door does this to
    what it is given, and afterwards each module is in the mode that it was in: whoever samples in
    the middle of a training goes on as before. What is no module, as a function is, is left alone;
    so are modules that only a function knows of.
    """
    modules = [
        m for network in networks if isinstance(network, nn.Module) for m in network.modules()
    ]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def check_weights(**networks: object) -> None:
    """Raises a ValueError if a network has weights without values.

    Some products with them are whatever the memory holds. What is no module is not looked into.
    """
    for name, network in networks.items():
        if any(w.is_meta for w in _weights(network)):
            raise ValueError(f"{name} has weights on the device meta, which has no values")


def check_networks(**networks: object) -> None:
    """Does as :func:`check_weights`, and where a network cannot have derivatives."""
    check_weights(**networks)
    off = torch.is_inference_mode_enabled()
    for name, network in networks.items():
        if off or any(w.is_inference() for w in _weights(network)):
            raise ValueError(
                f"{name} has no derivatives in torch.inference_mode: make and use it outside, or "
                "with torch.no_grad()"
            )


def _weights(network: object) -> list[Tensor]:
    module = network if isinstance(network, nn.Module) else nn.Module()
    return [*module.parameters(), *module.buffers()]


def check_precision(prior: nn.Module, x: Tensor) -> None:
    """Raises a ValueError if all of the prior's weights are of another kind, and it minds."""
    weights = [w for w in _weights(prior) if w.is_floating_point()]
    if not weights or any((w.dtype, w.device) == (x.dtype, x.device) for w in weights):
        return
    try:
        with torch.no_grad():
            prior(x[:1], torch.ones((), dtype=x.dtype, device=x.device))
    except RuntimeError as error:
        raise ValueError(
            f"y is {x.dtype} on {x.device}, but the prior's weights are {weights[0].dtype} on "
            f"{weights[0].device}: convert one of them with .to(...)"
        ) from error

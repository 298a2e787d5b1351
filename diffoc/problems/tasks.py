r"""The inverse problems of Section 6 as `deepinv` physics, with the settings of DPS.

A task is an operator A with :math:`y = A(x_0) + \eta`, for images (B, C, H, W) in [-1, 1] and
noise of standard deviation 0.05. The settings are those of Chung et al. 2023 (arXiv:2209.14687) at
256 x 256; lengths in pixels scale with the image's side. `physics.A` is the operator for the
controller, and linear ones have `physics.A_adjoint`; deepinv's samplers take the physics itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from deepinv.physics import Blur, DownsamplingMatlab, Inpainting, LinearPhysics, Physics
from deepinv.physics.functional import conv2d
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from diffoc.checks import check_images, check_shape, check_tensor
from diffoc.costs import GaussianLikelihood
from diffoc.problems.kernels import motion_kernel

NOISE_STD = 0.05
_FULL_SIDE = 256  # of the images that the settings are for


class UnsupportedTask(ValueError):
    """The method cannot do this task at all; tables show a dash."""


def super_resolution(factor: int = 4) -> DownsamplingMatlab:
    """Bicubic anti-aliased down-sampling to (B, C, H / factor, W / factor), as MATLAB's imresize.

    Args:
        factor: at least 1; it must divide the image's sides.

    Raises:
        ValueError: if `factor` is below 1.
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}, expected at least 1")
    return DownsamplingMatlab(factor=factor)


def random_inpainting(
    shape: Sequence[int], generator: torch.Generator, dropped: float = 0.92
) -> Inpainting:
    """Random pixels, dropped in all channels and images alike; A has zeros in their place.

    Args:
        shape: (C, H, W).
        generator: of the mask.
        dropped: their fraction, in [0, 1[.

    Raises:
        ValueError: if `dropped` is out of its range or keeps no pixel.
    """
    check_shape(shape, "CHW")
    _, height, width = shape
    pixels = height * width
    if not 0 <= dropped < 1 or round(dropped * pixels) == pixels:
        raise ValueError(f"dropped is {dropped}, expected 0 <= dropped < 1 and a pixel to be kept")
    mask = torch.ones(pixels)
    mask[torch.randperm(pixels, generator=generator)[: round(dropped * pixels)]] = 0
    return Inpainting(tuple(shape), mask=mask.reshape(1, 1, height, width))


def box_inpainting(
    shape: Sequence[int],
    generator: torch.Generator,
    box: int | None = None,
    margin: int | None = None,
) -> Inpainting:
    """A square at a random place is dropped in all channels and images; A has zeros there.

    Args:
        shape: (C, H, W).
        generator: of the place.
        box: side of the square in pixels, by default half of the image's shorter side.
        margin: least distance to the border, by default a sixteenth of it.

    Raises:
        ValueError: if the square with its margins does not fit into the image.
    """
    check_shape(shape, "CHW")
    _, height, width = shape
    side = min(height, width)
    box = side // 2 if box is None else box
    margin = side // 16 if margin is None else margin
    if box < 1 or margin < 0 or box + 2 * margin > side:
        raise ValueError(f"box and margin are {box} and {margin}: they do not fit {height}x{width}")
    top, left = (
        torch.randint(margin, length - margin - box + 1, (), generator=generator).item()
        for length in (height, width)
    )
    mask = torch.ones(1, 1, height, width)
    mask[..., top : top + box, left : left + box] = 0
    return Inpainting(tuple(shape), mask=mask)


def gaussian_blur(side: int) -> Blur:
    """A Gaussian kernel of 61 x 61 pixels and standard deviation 3, reflected at the border.

    Args:
        side: of the images in pixels; the kernel is for 256 and scales with it.

    Raises:
        ValueError: if `side` is below 1.
    """
    size = _kernel_size(side)
    delta = torch.zeros(size, size, dtype=torch.float64)
    delta[size // 2, size // 2] = 1
    # Cut off at four standard deviations, as in DPS.
    kernel = torch.from_numpy(gaussian_filter(delta.numpy(), 3 * side / _FULL_SIDE))
    return _blur(kernel)


def motion_blur(side: int, generator: torch.Generator, intensity: float = 0.5) -> Blur:
    """A random :func:`motion_kernel` of 61 x 61 pixels, reflected at the border.

    Args:
        side: of the images in pixels; the kernel is for 256 and scales with it.
        generator: of the path.
        intensity: in [0, 1].

    Raises:
        ValueError: if `side` or `intensity` is out of its range.
    """
    return _blur(motion_kernel(_kernel_size(side), intensity, generator))


def nonlinear_blur(side: int, generator: torch.Generator, intensity: float = 0.5) -> Physics:
    r"""A camera that moves: light adds up, not pixel values.

    .. math:: A(x) = R(h * R^{-1}(x))

    with a random :func:`motion_kernel` h and the camera's response R, that of sRGB (IEC 61966-2-1),
    extended smoothly beyond [-1, 1]. It needs no weights.

    Args:
        side, generator, intensity: as for :func:`motion_blur`.
    """
    return Physics(A=_CameraBlur(motion_kernel(_kernel_size(side), intensity, generator)))


def phase_retrieval(shape: Sequence[int], oversampling: float = 2.0) -> Physics:
    r"""Magnitudes of the orthonormal, centred Fourier transform of the zero-padded image.

    Args:
        shape: (C, H, W); every side is padded by `oversampling` / 8 of it at both ends.
        oversampling: not negative; 2 pads 256 to 384.

    Raises:
        ValueError: if `oversampling` is negative.
    """
    check_shape(shape, "CHW")
    if not 0 <= oversampling < math.inf:
        raise ValueError(f"oversampling is {oversampling}, expected finite and at least 0")
    vertical, horizontal = (int(oversampling / 8 * length) for length in shape[-2:])

    def magnitudes(x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (horizontal, horizontal, vertical, vertical))
        centred = torch.fft.ifftshift(padded, dim=(-2, -1))
        spectrum = torch.fft.fft2(centred, norm="ortho")
        return torch.fft.fftshift(spectrum, dim=(-2, -1)).abs()

    return Physics(A=magnitudes)


TASKS: dict[str, Callable[[Sequence[int], torch.Generator], Physics]] = {
    "super_resolution": lambda shape, generator: super_resolution(),
    "random_inpainting": random_inpainting,
    "box_inpainting": box_inpainting,
    "gaussian_blur": lambda shape, generator: gaussian_blur(min(shape[-2:])),
    "motion_blur": lambda shape, generator: motion_blur(min(shape[-2:]), generator),
    "nonlinear_blur": lambda shape, generator: nonlinear_blur(min(shape[-2:]), generator),
    "phase_retrieval": lambda shape, generator: phase_retrieval(shape),
}
"""The tasks with their standard settings, from an image's shape (C, H, W) and a generator."""


def task(name: str, shape: Sequence[int], generator: torch.Generator) -> Physics:
    """A task of :data:`TASKS` for images of one shape.

    Args:
        name: its name.
        shape: (C, H, W).
        generator: of masks and kernels, on the CPU.

    Raises:
        ValueError: for another name.
    """
    check_shape(shape, "CHW")
    if name not in TASKS:
        raise ValueError(f"task is {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name](shape, generator)


class PerImage(Physics):
    """An operator for a batch, whose image i is measured by `parts[i]`.

    Args:
        parts: each for a batch of one.
    """

    def __init__(self, parts: Sequence[Physics]) -> None:
        super().__init__()
        self.parts = list(parts)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """Measurements (B, ...) of images (B, C, H, W); ValueError for another batch size."""
        return _each([part.A for part in self.parts], x)


class LinearPerImage(PerImage, LinearPhysics):
    """The same of linear parts."""

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """The adjoint: images (B, C, H, W) of measurements (B, ...)."""
        return _each([part.A_adjoint for part in self.parts], y)


class BlurPerImage(Blur):
    """The same of blurs, by one convolution, which is five times as fast."""

    def __init__(self, parts: Sequence[Blur]) -> None:
        super().__init__(torch.cat([part.filter for part in parts]), padding=parts[0].padding)
        self.parts = list(parts)


def for_each(parts: Sequence[Physics]) -> Physics:
    """One operator for a batch, whose image i is measured by `parts[i]`.

    Args:
        parts: of one kind. Where they are equal, the first of them is returned, and masks make an
            `Inpainting` with a mask for each image.
    """
    first, states = parts[0], [dict(part.named_buffers()) for part in parts]
    if all(torch.equal(state[name], states[0][name]) for state in states for name in state):
        return first
    if isinstance(first, Inpainting):
        return Inpainting(first.img_size, mask=torch.cat([state["mask"] for state in states]))
    if isinstance(first, Blur):
        return BlurPerImage(parts)
    return LinearPerImage(parts) if isinstance(first, LinearPhysics) else PerImage(parts)


def parts_of(physics: Physics) -> list[Physics]:
    """The operators of single images that :func:`for_each` has put together, or the only one."""
    if isinstance(physics, PerImage | BlurPerImage):
        return physics.parts
    if isinstance(physics, Inpainting) and len(physics.mask) > 1:
        return [Inpainting(physics.img_size, mask=mask[None]) for mask in physics.mask]
    return [physics]


def _each(maps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    if len(x) != len(maps):
        raise ValueError(f"x has {len(x)} images, expected {len(maps)}: each has its operator")
    return torch.cat([f(one) for f, one in zip(maps, x.split(1), strict=True)])


def measure(
    physics: Physics, x: Tensor, generator: torch.Generator, noise_std: float = NOISE_STD
) -> Tensor:
    r"""Measurements :math:`A(x) + \eta` with Gaussian noise; none where nothing is measured.

    Args:
        physics: made by a function of this module.
        x: images, (B, C, H, W) in [-1, 1].
        generator: of the noise, on the CPU.
        noise_std: of the noise, not negative.

    Raises:
        ValueError: if it is, or `x` is of another shape or not finite.
    """
    check_images("x", x)
    _check_noise(noise_std)
    y = physics.A(x)
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return y + noise_std * noise * measured(physics, y)


def measured(physics: Physics, y: Tensor) -> Tensor:
    """1 where `y` has a measurement, 0 where it has a dropped pixel, in the shape of `y`."""
    if isinstance(physics, Inpainting):
        return (physics.mask != 0).to(y).expand_as(y)
    return torch.ones_like(y)


def likelihood(physics: Physics, y: Tensor, noise_std: float = NOISE_STD) -> GaussianLikelihood:
    """The terminal cost -log p(y | x_0) of a task; arguments as for :func:`noise_level`."""
    return GaussianLikelihood(physics.A, y, noise_std)


def noise_level(physics: Physics, y: Tensor, noise_std: float = NOISE_STD) -> float:
    """The root mean square of the residual A(x) - y of the truth, which a solution need not beat.

    Args:
        physics, noise_std: as for :func:`measure`.
        y: measurements, of which pixels that were dropped count as right.
    """
    check_tensor("y", y)
    _check_noise(noise_std)
    return noise_std * measured(physics, y).mean().sqrt().item()


def _check_noise(noise_std: float) -> None:
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std is {noise_std}, expected finite and at least 0")


def _kernel_size(side: int) -> int:
    """61 pixels of 256, in proportion, to the nearest odd number from 3 up."""
    if side < 1:
        raise ValueError(f"side is {side}, expected at least 1")
    return max(3, 2 * round((61 * side / _FULL_SIDE - 1) / 2) + 1)


def _blur(kernel: Tensor) -> Blur:
    return Blur(kernel[None, None].float(), padding="reflect")


class _CameraBlur(nn.Module):
    """See :func:`nonlinear_blur`."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel[None, None].float())

    def forward(self, x: Tensor) -> Tensor:
        light = _to_light((x + 1) / 2)
        return 2 * _from_light(conv2d(light, self.kernel.to(x), padding="reflect")) - 1


def _to_light(value: Tensor) -> Tensor:
    """sRGB values to linear light; linear below the threshold, also where negative."""
    curved = ((value.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(value <= 0.04045, value / 12.92, curved)


def _from_light(light: Tensor) -> Tensor:
    """Linear light to sRGB values, the inverse of :func:`_to_light`."""
    curved = 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, 12.92 * light, curved)


def as_picture(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A measurement as the encoder sees it: scaled up to the image's size where it is smaller.

    Args:
        y: (B, C, h, w).
        shape: of the images, (C, H, W).

    Raises:
        UnsupportedTask: if it is no picture.
    """
    if y.ndim != 4 or y.shape[1] != shape[0] or y.shape[2] > shape[1] or y.shape[3] > shape[2]:
        raise UnsupportedTask(
            f"a severity encoder needs a picture of at most {tuple(shape)}, but a measurement has "
            f"shape {tuple(y.shape[1:])}"
        )
    if y.shape[1:] == tuple(shape):
        return y
    return nn.functional.interpolate(y, tuple(shape[1:]), mode="bicubic", align_corners=False)

r"""The inverse problems of Section 6 as `deepinv` physics, with the settings of DPS.

A task is an operator A with :math:`y = A(x_0) + \eta`, for images (B, C, H, W) in [-1, 1] and
noise of standard deviation 0.05. The settings are those of Chung et al. 2023 (arXiv:2209.14687) at
256 x 256; lengths in pixels scale with the image's side. `physics.A` is the operator for the
controller, and linear ones have `physics.A_adjoint`; deepinv's samplers take the physics itself.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from deepinv.physics import Blur, Inpainting, LinearPhysics, Physics
from deepinv.physics.functional import conv2d
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from diffoc.checks import (
    check_at_least,
    check_images,
    check_member,
    check_shape,
    check_weights,
    check_whole,
    check_within,
    memory_is_full,
    one_line,
)
from diffoc.problems.kernels import motion_kernel

NOISE_STD = 0.05
_FULL_SIDE = 256  # of the images that the settings are for


class UnsupportedTask(ValueError):
    """The method cannot do this task at all; tables show a dash."""


class Bicubic(LinearPhysics):
    """Bicubic anti-aliased down-sampling by a factor, as one matrix for lines and one for columns.

    The numbers are those of deepinv's `DownsamplingMatlab`, which takes as long as a network does.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """Returns images (B, C, H / factor, W / factor) of images (B, C, H, W)."""
        rows, columns = (_bicubic(length, self.factor).to(x) for length in x.shape[-2:])
        return rows @ x @ columns.mT

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """Returns images (B, C, factor H, factor W) of images (B, C, H, W): the adjoint."""
        rows, columns = (_bicubic(self.factor * n, self.factor).to(y) for n in y.shape[-2:])
        return rows.mT @ y @ columns


def _bicubic(length: int, factor: int) -> Tensor:
    return torch.from_numpy(_bicubic_weights(length, factor))


@lru_cache
def _bicubic_weights(length: int, factor: int) -> np.ndarray:
    """Returns how MATLAB's imresize weighs a line, (length / factor rounded up, length).

    Keys's cubic kernel with a = -1/2 is as wide as the factor says, and the line goes on mirrored.
    """
    count = -(-length // factor)
    centre = ((np.arange(count) + 0.5) * factor - 0.5)[:, None]
    place = np.floor(centre).astype(int) + np.arange(-2 * factor, 2 * factor + 2)
    d = np.abs(place - centre) / factor
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d <= 1, near, np.where(d <= 2, far, 0))
    mirrored = place % (2 * length)
    matrix = np.zeros((count, length))
    source = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    np.add.at(matrix, (np.arange(count)[:, None], source), weights / weights.sum(1, keepdims=True))
    return matrix


def super_resolution(factor: int = 4) -> Bicubic:
    """Returns bicubic anti-aliased down-sampling to (B, C, H / factor, W / factor).

    It is that of MATLAB's imresize; the factor, 1 to 256, must divide the image's sides.
    """
    check_whole(1, factor=factor)
    check_within(1, 256, factor=factor)
    return Bicubic(factor)


def random_inpainting(
    shape: Sequence[int], generator: torch.Generator, dropped: float = 0.92
) -> Inpainting:
    """Returns an operator on (C, H, W) that drops a fraction of the pixels, in [0, 1[, at random.

    All channels and images drop the same, and A has zeros in their place.
    """
    check_shape(shape, "CHW")
    _, height, width = shape
    pixels = height * width
    if not 0 <= dropped < 1 or round(dropped * pixels) == pixels:
        raise ValueError(f"dropped is {dropped}, expected 0 <= dropped < 1 and a pixel to be kept")
    mask = torch.ones(pixels)
    mask[torch.randperm(pixels, generator=generator)[: round(dropped * pixels)]] = 0
    return Inpainting(tuple(shape), mask=mask.reshape(1, 1, height, width))


def box_inpainting(shape: Sequence[int], generator: torch.Generator) -> Inpainting:
    """Returns an operator on (C, H, W) that drops a square at a random place; A has zeros there.

    All channels and images drop the same. The side of the square is half of the image's shorter
    side, its least distance to the border a sixteenth of it.
    """
    check_shape(shape, "CHW")
    _, height, width = shape
    box, margin = min(height, width) // 2, min(height, width) // 16
    if not box:
        raise ValueError(f"shape is {tuple(shape)}, expected sides of 2 pixels or more")
    top, left = (
        torch.randint(margin, length - margin - box + 1, (), generator=generator).item()
        for length in (height, width)
    )
    mask = torch.ones(1, 1, height, width)
    mask[..., top : top + box, left : left + box] = 0
    return Inpainting(tuple(shape), mask=mask)


def gaussian_blur(side: int) -> Blur:
    """Returns a blur by a Gaussian kernel of 61 x 61 pixels, reflected at the border.

    Its standard deviation is 3 pixels. That is for images of 256 pixels a side; it scales with it.
    """
    size = _kernel_size(side)
    delta = torch.zeros(size, size, dtype=torch.float64)
    delta[size // 2, size // 2] = 1
    # Cut off at four standard deviations, as in DPS.
    kernel = torch.from_numpy(gaussian_filter(delta.numpy(), 3 * side / _FULL_SIDE))
    return _blur(kernel)


def motion_blur(side: int, generator: torch.Generator) -> Blur:
    """Returns a blur by a random :func:`motion_kernel` of 61 x 61 pixels, reflected at the border.

    That is for images of 256 pixels a side, and scales with it. The kernel's intensity is 0.5.
    """
    return _blur(motion_kernel(_kernel_size(side), 0.5, generator))


def nonlinear_blur(side: int, generator: torch.Generator) -> Physics:
    r"""Returns what a camera that moves measures: light adds up, not pixel values.

    .. math:: A(x) = R(h * R^{-1}(x))

    with the kernel h of :func:`motion_blur` and the camera's response R, that of sRGB
    (IEC 61966-2-1), extended smoothly beyond [-1, 1]. It needs no weights.
    """
    return Physics(A=_CameraBlur(motion_kernel(_kernel_size(side), 0.5, generator)))


def phase_retrieval(shape: Sequence[int]) -> Physics:
    r"""Returns the magnitudes of the orthonormal, centred Fourier transform of the padded image.

    Every side of (C, H, W) is padded with zeros by a fourth of it at both ends: 256 to 384.
    """
    check_shape(shape, "CHW")
    vertical, horizontal = (length // 4 for length in shape[-2:])

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
    """Returns a task of :data:`TASKS` for images (C, H, W); the generator is on the CPU."""
    check_shape(shape, "CHW")
    check_member(TASKS, task=name)
    return TASKS[name](shape, generator)


class PerImage(Physics):
    """An operator for a batch, whose image i is measured by `parts[i]`, each for a batch of one."""

    def __init__(self, parts: Sequence[Physics]) -> None:
        super().__init__()
        self.parts = list(parts)

    def A(self, x: Tensor, **kwargs: object) -> Tensor:
        """Returns measurements (B, ...) of images (B, C, H, W)."""
        return _each([part.A for part in self.parts], x)


class LinearPerImage(PerImage, LinearPhysics):
    """The same of linear parts."""

    def A_adjoint(self, y: Tensor, **kwargs: object) -> Tensor:
        """Returns images (B, C, H, W) of measurements (B, ...): the adjoint."""
        return _each([part.A_adjoint for part in self.parts], y)


class BlurPerImage(Blur):
    """The same of blurs, by one convolution, which is five times as fast."""

    def __init__(self, parts: Sequence[Blur]) -> None:
        super().__init__(torch.cat([part.filter for part in parts]), padding=parts[0].padding)
        self.parts = list(parts)


def for_each(parts: Sequence[Physics]) -> Physics:
    """Returns one operator for a batch, whose image i is measured by `parts[i]`, of one kind.

    Where they are equal, it is the first of them; masks make an `Inpainting` with a mask for each
    image.
    """
    first, states = parts[0], [dict(part.named_buffers()) for part in parts]
    factors = {part.factor for part in parts if isinstance(part, Bicubic)}
    if len(factors) < 2 and all(
        torch.equal(state[name], states[0][name]) for state in states for name in state
    ):
        return first
    if isinstance(first, Inpainting):
        return Inpainting(first.img_size, mask=torch.cat([state["mask"] for state in states]))
    if isinstance(first, Blur):
        return BlurPerImage(parts)
    return LinearPerImage(parts) if isinstance(first, LinearPhysics) else PerImage(parts)


def parts_of(physics: Physics) -> list[Physics]:
    """Returns the operators that :func:`for_each` has put together, or the only one."""
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
    physics: Physics,
    x: Tensor,
    generator: torch.Generator,
    noise_std: float = NOISE_STD,
    on_dropped: bool = False,
) -> Tensor:
    r"""Returns measurements :math:`A(x) + \eta` of images x, (B, C, H, W) in [-1, 1].

    The physics was made by a function of this module. The noise is Gaussian; where nothing is
    measured there is none unless it is asked for, `on_dropped` pixels; its generator is on the CPU.
    """
    check_images("x", x)
    check_at_least(0, noise_std=noise_std)
    check_weights(physics=physics)
    try:
        y = physics.A(x)
        back = physics.A_adjoint(y).shape if isinstance(physics, LinearPhysics) else x.shape
    except (IndexError, RuntimeError) as error:  # deepinv looks at no size
        if memory_is_full(error):
            raise
        raise ValueError(
            f"physics cannot measure images of shape {tuple(x.shape)}: {one_line(error)}"
        ) from error
    if back != x.shape:
        raise ValueError(
            f"physics does not fit images of shape {tuple(x.shape)}: its adjoint makes "
            f"{tuple(back)} of their measurements"
        )
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return y + noise_std * noise * (1 if on_dropped else measured(physics, y))


def measured(physics: Physics, y: Tensor) -> Tensor:
    """Returns 1 where `y` has a measurement and 0 where it has a dropped pixel, like `y`."""
    if isinstance(physics, Inpainting):
        return (physics.mask != 0).to(y).expand_as(y)
    return torch.ones_like(y)


def _kernel_size(side: int) -> int:
    """Returns 61 pixels of 256, in proportion, to the nearest odd number from 3 up."""
    check_at_least(1, side=side)
    return max(3, 2 * round((61 * side / _FULL_SIDE - 1) / 2) + 1)


def _filter(kernel: Tensor) -> Tensor:
    """Returns a kernel for images, without subnormal numbers, which some processes flush."""
    kernel = kernel.float()
    return kernel.where(kernel >= torch.finfo(kernel.dtype).tiny, 0)[None, None]


def _blur(kernel: Tensor) -> Blur:
    return Blur(_filter(kernel), padding="reflect")


class _CameraBlur(nn.Module):
    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", _filter(kernel))

    def forward(self, x: Tensor) -> Tensor:
        light = _to_light((x + 1) / 2)
        return 2 * _from_light(conv2d(light, self.kernel.to(x), padding="reflect")) - 1


def _to_light(value: Tensor) -> Tensor:
    """Turns sRGB values to linear light; linear below the threshold, also where negative."""
    curved = ((value.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(value <= 0.04045, value / 12.92, curved)


def _from_light(light: Tensor) -> Tensor:
    """Turns linear light to sRGB values, the inverse of :func:`_to_light`."""
    curved = 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, 12.92 * light, curved)


def as_picture(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a measurement (B, C, h, w) scaled up to the images' size (C, H, W) if it is smaller.

    An UnsupportedTask refuses a measurement that is no picture.
    """
    if y.ndim != 4 or y.shape[1] != shape[0] or y.shape[2] > shape[1] or y.shape[3] > shape[2]:
        raise UnsupportedTask(
            f"a severity encoder needs a picture of at most {tuple(shape)}, but a measurement has "
            f"shape {tuple(y.shape[1:])}"
        )
    if y.shape[1:] == tuple(shape):
        return y
    return nn.functional.interpolate(y, tuple(shape[1:]), mode="bicubic", align_corners=False)

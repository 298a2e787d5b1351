"""The paper's inverse problems against independent computations, and DPS's settings at 256."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from deepinv.physics import DownsamplingMatlab
from PIL import Image
from scipy.ndimage import convolve
from skimage import color
from torch.autograd import gradcheck

from diffoc.problem import Problem
from diffoc.problems import kernels
from diffoc.problems.kernels import motion_kernel
from diffoc.problems.operators import as_matrix
from diffoc.problems.tasks import (
    TASKS,
    _from_light,
    _to_light,
    box_inpainting,
    for_each,
    gaussian_blur,
    measure,
    measured,
    motion_blur,
    nonlinear_blur,
    phase_retrieval,
    random_inpainting,
    super_resolution,
    task,
)

LINEAR = [
    "super_resolution",
    "random_inpainting",
    "box_inpainting",
    "gaussian_blur",
    "motion_blur",
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def double(physics):
    return physics.to(torch.float64)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 24, 32)])
def test_linear_tasks_have_an_adjoint(name, shape):
    physics = double(task(name, shape, seeded()))
    x = normal(2, *shape)
    y = physics.A(x)
    v = torch.randn(y.shape, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close((y * v).sum(), (x * physics.A_adjoint(v)).sum(), rtol=1e-9, atol=0)


def cubic(distance):
    """Keys' kernel with a = -1/2."""
    d = abs(distance)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def bicubic_matrix(length, factor):
    """Anti-aliased bicubic down-sampling along one side, reflected at the border, by loops."""
    matrix = np.zeros((length // factor, length))
    for i, row in enumerate(matrix):
        centre = (i + 0.5) * factor - 0.5
        weights = {}
        for j in range(math.floor(centre - 2 * factor), math.ceil(centre + 2 * factor) + 1):
            source = -j - 1 if j < 0 else 2 * length - 1 - j if j >= length else j
            weights[j] = (source, cubic((j - centre) / factor))
        total = sum(weight for _, weight in weights.values())
        for source, weight in weights.values():
            row[source] += weight / total
    return matrix


def test_super_resolution_is_anti_aliased_bicubic():
    shape = (1, 16, 24)
    rows, columns = bicubic_matrix(16, 4), bicubic_matrix(24, 4)
    expected = np.kron(rows, columns)
    found = as_matrix(double(super_resolution()).A, shape, torch.float64)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("factor", "height", "width"), [(4, 64, 48), (2, 30, 8), (3, 64, 62)])
def test_super_resolution_is_deepinvs(factor, height, width):
    x = torch.randn(2, 3, height, width, generator=seeded(), dtype=torch.float64)
    ours, theirs = super_resolution(factor), double(DownsamplingMatlab(factor=factor))
    y = theirs.A(x)
    torch.testing.assert_close(ours.A(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.A_adjoint(y), theirs.A_adjoint(y), rtol=0, atol=1e-12)


def test_operators_of_several_factors_are_not_one():
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    parts = [super_resolution(4), super_resolution(2)]
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        for_each(parts).A(x)
    assert for_each([parts[0], super_resolution(4)]) is parts[0]


def test_super_resolution_agrees_with_pillow_away_from_the_border():
    pixels = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    found = super_resolution().A(torch.from_numpy(pixels)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(found[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_blur", "motion_blur"])
def test_blurs_are_convolutions_reflected_at_the_border(name):
    shape = (1, 24, 32)
    physics = double(task(name, shape, seeded(2)))
    kernel = physics.filter[0, 0].numpy()
    found = as_matrix(physics.A, shape, torch.float64).mT.reshape(-1, 24, 32)
    for k in range(0, 24 * 32, 37):
        unit = np.zeros((24, 32))
        unit.flat[k] = 1
        # SciPy calls "mirror" what reflects about the centre of the outermost pixel.
        np.testing.assert_allclose(found[k], convolve(unit, kernel, mode="mirror"), atol=1e-12)


def test_the_gaussian_kernel_is_a_gaussian_cut_off_at_four_standard_deviations():
    kernel = double(gaussian_blur(256)).filter[0, 0]
    at = torch.arange(61, dtype=torch.float64) - 30
    line = torch.where(at.abs() <= 12, torch.exp(-at.square() / 18), 0)
    line /= line.sum()
    torch.testing.assert_close(kernel, line[:, None] * line, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["random_inpainting", "box_inpainting"])
def test_masks_are_the_same_for_all_channels_and_images(name):
    physics = task(name, (3, 32, 48), seeded())
    y = physics.A(torch.ones(2, 3, 32, 48))
    assert set(y.unique().tolist()) == {0, 1}
    assert torch.equal(y, y[:1, :1].expand_as(y))
    x = torch.rand(2, 3, 32, 48)
    assert torch.equal(physics.A(x), torch.where(y == 1, x, 0))
    other = task(name, (3, 32, 48), seeded(1)).A(torch.ones(2, 3, 32, 48))
    assert not torch.equal(y, other)


def test_boxes_keep_their_margin_and_go_everywhere():
    tops, lefts = set(), set()
    for seed in range(300):
        hidden = box_inpainting((1, 16, 20), seeded(seed)).mask[0, 0] == 0
        rows, columns = hidden.any(1).nonzero().flatten(), hidden.any(0).nonzero().flatten()
        assert hidden.sum() == 64
        assert len(rows) == len(columns) == 8
        tops.add(rows[0].item())
        lefts.add(columns[0].item())
    assert tops == set(range(1, 8))
    assert lefts == set(range(1, 12))


def test_the_settings_of_dps_at_full_size():
    shape = (3, 256, 256)
    x = 2 * torch.rand(1, *shape, generator=seeded()) - 1
    shapes = {name: tuple(task(name, shape, seeded()).A(x).shape) for name in TASKS}
    assert shapes.pop("super_resolution") == (1, 3, 64, 64)
    assert shapes.pop("phase_retrieval") == (1, 3, 384, 384)
    assert set(shapes.values()) == {(1, 3, 256, 256)}
    kept = random_inpainting(shape, seeded()).mask
    assert kept.sum() == round(0.08 * 65536)
    assert (box_inpainting(shape, seeded()).mask == 0).sum() == 128 * 128
    for physics in (gaussian_blur(256), motion_blur(256, seeded())):
        assert physics.filter.shape == (1, 1, 61, 61)
        assert physics.filter.sum().item() == pytest.approx(1, abs=1e-6)
    assert gaussian_blur(64).filter.shape == (1, 1, 15, 15)


def test_phase_retrieval_is_the_magnitude_of_a_discrete_fourier_transform():
    x = normal(1, 1, 8, 16)
    padded = np.zeros((12, 24))
    padded[2:10, 4:20] = x[0, 0]
    rows, columns = (np.arange(n) - n // 2 for n in padded.shape)
    left = np.exp(-2j * np.pi * np.outer(rows, rows) / 12)
    right = np.exp(-2j * np.pi * np.outer(columns, columns) / 24)
    expected = abs(left @ padded @ right) / math.sqrt(12 * 24)
    found = phase_retrieval((1, 8, 16)).A(x)[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # The sign of an image, and where it is, cannot be seen.
    torch.testing.assert_close(phase_retrieval((1, 8, 16)).A(-x)[0, 0], found)


def test_the_camera_s_response_is_that_of_srgb():
    values = np.linspace(0, 1, 101)
    # scikit-image's XYZ of a grey is its linear light times that of white.
    white = color.rgb2xyz(np.ones((1, 1, 3)))[0, 0, 1]
    light = color.rgb2xyz(np.repeat(values[:, None, None], 3, -1))[:, 0, 1] / white
    np.testing.assert_allclose(_to_light(torch.from_numpy(values)), light, atol=1e-6)
    beyond = torch.linspace(-0.5, 1.5, 201, dtype=torch.float64)
    torch.testing.assert_close(_from_light(_to_light(beyond)), beyond, rtol=1e-6, atol=1e-6)


def test_the_camera_blurs_light():
    shape = (1, 24, 24)
    x = 1.6 * torch.rand(1, *shape, generator=seeded(), dtype=torch.float64) - 0.8
    physics = nonlinear_blur(24, seeded(3))
    kernel = motion_kernel(5, 0.5, seeded(3)).float().double().numpy()
    light = convolve(_to_light((x[0, 0] + 1) / 2).numpy(), kernel, mode="mirror")
    expected = 2 * _from_light(torch.from_numpy(light)) - 1
    torch.testing.assert_close(physics.A(x)[0, 0], expected)
    # A uniform image is not changed, a mixture of bright and dark is brighter than its mean.
    torch.testing.assert_close(physics.A(torch.full_like(x, 0.3)), torch.full_like(x, 0.3))
    assert physics.A(x).mean() > x.mean()


@pytest.mark.parametrize("name", TASKS)
def test_gradients_are_those_of_finite_differences(name):
    shape = (1, 8, 8)
    physics = double(task(name, shape, seeded(4)))
    x = 0.8 * (2 * torch.rand(1, *shape, generator=seeded(5), dtype=torch.float64) - 1)
    v = torch.randn(physics.A(x).shape, generator=seeded(6), dtype=torch.float64)
    assert gradcheck(lambda z: (physics.A(z) * v).sum(), x.requires_grad_())


@pytest.mark.parametrize("name", TASKS)
def test_images_of_a_batch_do_not_influence_each_other(name):
    physics = task(name, (1, 32, 32), seeded())
    x = 2 * torch.rand(3, 1, 32, 32, generator=seeded(1)) - 1
    both = physics.A(x)
    for i in range(3):
        torch.testing.assert_close(both[i : i + 1], physics.A(x[i : i + 1]))


@pytest.mark.parametrize("name", TASKS)
def test_the_residual_of_the_truth_is_the_noise_level(name):
    shape = (1, 64, 64)
    physics = task(name, shape, seeded())
    x = 2 * torch.rand(8, *shape, generator=seeded(1)) - 1
    y = measure(physics, x, seeded(2), 0.1)
    residual = (physics.A(x) - y).square().mean().sqrt().item()
    assert residual == pytest.approx(Problem(physics, y, 0.1).noise_level[0].item(), rel=0.05)
    assert not y[measured(physics, y) == 0].any()
    assert torch.equal(y, measure(physics, x, seeded(2), 0.1))


def test_kernels_are_centred_and_sum_to_one():
    for seed in range(50):
        kernel = motion_kernel(61, 0.5, seeded(seed))
        assert kernel.shape == (61, 61)
        assert kernel.min() >= 0
        assert kernel.sum().item() == pytest.approx(1)
    assert torch.equal(kernel, motion_kernel(61, 0.5, seeded(seed)))
    assert not torch.equal(kernel, motion_kernel(61, 0.5, seeded(0)))


def test_without_intensity_the_path_is_straight():
    at = torch.arange(61, dtype=torch.float64) - 30
    for seed in range(5):
        kernel = motion_kernel(61, 0.0, seeded(seed))
        rows, columns = at[:, None].expand(61, 61), at.expand(61, 61)
        points, weights = torch.stack([rows, columns]).flatten(1), kernel.flatten()
        spread = torch.cov(points, aweights=weights, correction=0)
        # Across the path there is only the pen, of half a pixel, which the grid just resolves.
        assert 0.2 < torch.linalg.eigvalsh(spread)[0] < 0.3


@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_paths_have_the_distributions_of_the_library_that_the_paper_uses(intensity):
    """Total length 3/4 (U + I^2 U') diagonals, and at most a step more; headings within bounds."""
    generator = seeded(7)
    totals, headings = [], []
    for _ in range(400):
        steps = kernels._random_steps(1.0, intensity, generator)
        totals.append(steps.abs().sum().item())
        headings.append(steps.angle().abs().max().item())
    step = (1.1 - intensity) / 31  # the mean of Beta(1, 30), scaled
    expected = 0.75 * (0.5 + intensity**2 / 2)
    assert expected - 0.02 < np.mean(totals) < expected + 2 * step + 0.02
    assert max(headings) < math.pi * intensity + 0.1 + 1e-9
    if intensity == 0:
        assert max(headings) == 0


def test_the_heading_seldom_changes_its_sign():
    """With probability Beta(2, 20), which is 1/11 on average."""
    generator, flips, turns = seeded(8), 0, 0
    for _ in range(400):
        angles = kernels._random_steps(1.0, 0.5, generator).angle().tolist()
        flips += sum(a * b < 0 for a, b in pairwise(angles))
        turns += len(angles) - 1
    assert flips / turns == pytest.approx(1 / 11, rel=0.1)


def measured_at(physics, height, width):
    return measure(physics, torch.zeros(2, 1, height, width), seeded())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: super_resolution(0), "factor"),
        (lambda: random_inpainting((1, 8, 8), seeded(), 1.0), "dropped"),
        (lambda: random_inpainting((1, 8, 8), seeded(), 0.999), "dropped"),
        (lambda: box_inpainting((1, 8, 1), seeded()), "shape"),
        (lambda: motion_kernel(4, 0.5, seeded()), "side"),
        (lambda: motion_kernel(5, 1.5, seeded()), "intensity"),
        (lambda: measured_at(super_resolution(4), 2, 2), "physics does not fit"),
        (lambda: measured_at(super_resolution(4), 30, 30), "physics does not fit"),
        (lambda: measured_at(super_resolution(4), 32, 30), "physics does not fit"),
        (lambda: measured_at(gaussian_blur(64), 7, 7), "physics cannot"),
        (lambda: measured_at(motion_blur(64, seeded()), 1, 1), "physics cannot"),
        (lambda: measured_at(nonlinear_blur(64, seeded()), 7, 7), "physics cannot"),
        (lambda: measured_at(random_inpainting((1, 8, 8), seeded()), 9, 8), "physics cannot"),
        (lambda: task("deblurring", (1, 8, 8), seeded()), "task"),
    ],
)
def test_the_door(call, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()
